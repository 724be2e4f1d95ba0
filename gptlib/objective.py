"""The objective and the optimiser.

Tangled from book/chapters/08_objective.md; change it there, not here.
"""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["perplexity", "bits_per_byte", "parameter_groups", "make_adamw", "learning_rate"]

# What a loss is worth in other units


def perplexity(loss: float) -> float:
    """e to the loss (nats per token): the number of equally likely tokens that would be as surprising."""
    return math.exp(loss)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Loss in nats per token -> bits per byte of text, which does not depend on the tokenizer."""
    return loss * tokens / math.log(2) / text_bytes


# AdamW's two groups


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (and embeddings) decay, vectors (biases and norms) do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its rate is set before every step. Source: Loshchilov and Hutter 2019."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


# The learning rate of a step


def learning_rate(
    step: int, *, peak: float, final: float, warmup_steps: int, decay_steps: int
) -> float:
    """Linear warm-up, then half a cosine down to `final`, for the 0-based `step`.

    The first step has peak / warmup_steps, not 0; after `decay_steps` the rate stays at `final`.
    Source: Loshchilov and Hutter 2017 (cosine).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= decay_steps:
        return final
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)  # 0 .. 1
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
