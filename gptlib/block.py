"""The block: attention, MLP and the residual stream.

Tangled from book/chapters/06_block.md; change it there, not here.
"""

from __future__ import annotations

from torch import Tensor, nn

from gptlib.multi_head import CausalSelfAttention


ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> PyTorch's `approximate`


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (B, T, C) -> (B, T, C), 4C inside.

    activation: `gelu` (exact) or `gelu_tanh` (GPT-2's approximation).
    Source: Hendrycks and Gimpel 2016.
    """

    def __init__(
        self,
        n_embd: int,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation: str = "gelu",
    ):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[activation])
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, C) -> (B, T, C).

    Attention and MLP each add to the residual stream. Source: Radford et al. 2019,
    section 2.3 (layer norm moved to the input of each sub-block).
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation: str = "gelu",
    ):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = CausalSelfAttention(n_embd, n_head, bias=bias, dropout=dropout)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd, bias=bias, dropout=dropout, activation=activation)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))
