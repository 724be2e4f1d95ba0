"""The objective and the optimiser.

Tangled from book/chapters/08_objective.md; change it there, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gptlib.workshop.muon import Muon


def cosine(
    step: int, *, peak: float, final: float, warmup_steps: int, decay_steps: int
) -> float:
    """Rate of the 0-based `step`: linear warm-up, then half a cosine down to `final`.

    Step 0 has peak / warmup_steps, not 0; from `decay_steps` on the rate is `final`.
    Source: Loshchilov and Hutter 2017.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= decay_steps:
        return final
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)  # 0 .. 1
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def perplexity(loss: float) -> float:
    """e to the loss (nats per token): an even choice among this many tokens."""
    return math.exp(loss)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Nats per token -> bits per byte of text, which no tokenizer can change."""
    return loss * tokens / math.log(2) / text_bytes


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, vectors (biases and norms) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its rate, 0 at first, is set before every step.

    Source: Loshchilov and Hutter 2019.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def trapezoid(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    steps: int,
    cooldown_steps: int,
) -> float:
    """Rate of the 0-based `step`: linear warm-up, the peak, a straight line to `final`.

    The line fills the last `cooldown_steps` of `steps`. Also called WSD.
    Source: Hägele et al. 2024.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = min(1, max(0, steps - step) / max(1, cooldown_steps))  # 1 .. 0
    return final + (peak - final) * left


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "trapezoid": trapezoid}


class CombinedOptimizer:
    """Several optimisers, each with its own parameters, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, its_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its_state)


def make_muon(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float]
) -> CombinedOptimizer:
    """Muon for the matrices of the blocks (`model.h`), AdamW for everything else.

    Both take the same rate, 0 at first, which is set before every step.
    """
    inner = [p for p in model.get_submodule("h").parameters() if p.dim() == 2]
    taken = {id(p) for p in inner}
    groups = parameter_groups(model, weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    muon = Muon(inner, weight_decay)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
    return CombinedOptimizer(muon, adamw)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer | CombinedOptimizer]] = {
    "adamw": make_adamw,
    "muon": make_muon,
}
