"""Several heads in one matmul.

Tangled from book/chapters/05_multi_head.md; change it there, not here.
"""

from __future__ import annotations

from torch import Tensor, nn

from gptlib import GptlibError
from gptlib.attention import causal_attention


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, (B, T, C) -> (B, T, C).

    One matmul makes queries, keys and values of all heads; names as in GPT-2. Raises
    GptlibError if `n_embd` is not a multiple of `n_head`. Source: Vaswani et al. 2017,
    section 3.2.2.
    """

    def __init__(
        self, n_embd: int, n_head: int, *, bias: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        if n_embd % n_head:
            raise GptlibError(
                f"n_embd {n_embd} is not divisible by n_head {n_head}; "
                "every head needs the same width"
            )
        self.n_head, self.dropout = n_head, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        """cache: None, or an object whose `update(k, v)` adds the new keys and values
        to those of earlier positions and returns all of them."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        shape = (B, T, self.n_head, C // self.n_head)
        q, k, v = (z.view(shape).transpose(1, 2) for z in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nh, S, hs) with S >= T
        y = causal_attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> heads side by side
        return self.resid_dropout(self.c_proj(y))
