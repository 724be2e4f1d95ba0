"""Attention: a weighted average of the past.

Tangled from book/chapters/04_attention.md; change it there, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """One causal self-attention head: (B, T, C) -> (B, T, head_size).

    Source: Vaswani et al. 2017, section 3.2.1.
    """

    def __init__(self, n_embd: int, head_size: int):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return causal_attention(self.query(x), self.key(x), self.value(x))


def _past(q: Tensor, k: Tensor) -> Tensor:
    """(T, S), True where a query may read; queries are the last T of S positions."""
    T, S = q.shape[-2], k.shape[-2]
    return torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights, the softmax of equation (1) of the report.

    q: (..., T, d) queries, k: (..., S, d) keys, S >= T: the queries are those of the
    last T of S positions. Returns (..., T, S); each row is non-negative, sums to 1 and
    is 0 after its position. Source: Vaswani et al. 2017, section 3.2.1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    return scores.masked_fill(~_past(q, k), float("-inf")).softmax(dim=-1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0
) -> Tensor:
    """The average of the values of the past: `attention_weights(q, k) @ v`.

    q: (..., T, d), k: (..., S, d), v: (..., S, d), S >= T. Returns (..., T, d), by the
    fused kernel (Dao et al. 2022). dropout: the probability of dropping a weight.
    """
    square = q.shape[-2] == k.shape[-2]  # for T < S, is_causal would cut elsewhere
    mask = None if square or q.shape[-2] == 1 else _past(q, k)  # one query reads all
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=square
    )


def influence(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Which input each output depends on, by automatic differentiation.

    function: (T, C) -> (T, D); x: (T, C), where to differentiate. Returns (T, T): entry
    [t, s] is the largest |d function(x)[t] / d x[s]| over channels. Causal means that
    all entries above the diagonal are exactly 0.
    """
    jacobian = torch.autograd.functional.jacobian(function, x)  # (T, D, T, C)
    return jacobian.abs().amax(dim=(1, 3))
