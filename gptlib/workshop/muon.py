"""A step for a matrix: Muon.

Tangled from book/workshop/W14_muon.md; change it there, not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """(m, n): nearly the matrix with all its singular values set to 1.

    Source: Jordan et al. 2024.
    """
    if len(matrix) > len(matrix.T):  # the smaller product is the cheaper one
        return orthogonalize(matrix.T, rounds).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Steps that are equally large in all directions of a matrix.

    For parameters of two dimensions. The rate, 0 at first, is set before every step.
    Sources: Jordan et al. 2024; Liu et al. 2025 (the scale).
    """

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every parameter that has a gradient; it calls no closure."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 0.05)
                ahead = p.grad.lerp(average, 0.95)  # Nesterov: where the average goes
                size = group["lr"] * 0.2 * math.sqrt(max(p.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalize(ahead), alpha=-size)
