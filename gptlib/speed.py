"""Speed: where time and memory go.

Tangled from book/chapters/11_speed.md; change it there, not here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gptlib.gpt import GPT
from gptlib.training import plain_loss

__all__ = [
    "softmax_gradient",
    "fused_softmax_gradient",
    "ChunkedCrossEntropy",
    "chunked_loss",
    "no_grad_loss",
    "fast_loss",
]

# A loss that never holds all logits


def softmax_gradient(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, and the gradient of `scale` times it by the logits, in the logits' type.

    logits: (N, V); targets: (N,) int64. Computed in fp32 (fp64 for fp64 logits).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True)
    exp = (wide - top).exp()
    total = exp.sum(-1, keepdim=True)  # (N, 1)
    loss = (total.log() + top - wide.gather(-1, targets[:, None])).sum()
    hit = (
        torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    )  # (N, V), fused away
    return loss, ((exp / total - hit.to(exp.dtype)) * scale).to(logits.dtype)


@functools.cache
def fused_softmax_gradient(device_type: str) -> Callable:
    """`softmax_gradient` through torch.compile where a compiler works, tried once; else as it is."""
    compiled = torch.compile(softmax_gradient, dynamic=True)
    try:
        example = torch.zeros(2, 3, device=device_type)
        compiled(example, torch.zeros(2, dtype=torch.int64, device=device_type), 1.0)
        return compiled
    except Exception as error:  # no compiler, no Triton, an unsupported Python: all of them slow, none of them wrong
        reason = str(error).strip().splitlines()[0][:80]
        print(
            f"torch.compile does not work here ({reason}); the loss runs unfused", file=sys.stderr
        )
        return softmax_gradient


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T` without ever holding more than `rows` rows of logits.

    The gradient is formed in the forward pass, while a chunk's logits are at hand, and scaled in the
    backward pass; so logits are computed once. Source of the idea: Hsu et al. 2024 (Liger kernels).
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, fuse: bool
    ) -> Tensor:
        step = fused_softmax_gradient(hidden.device.type) if fuse else softmax_gradient
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, w = hidden.to(dtype), weight.to(dtype)  # (N, C), (V, C)
            loss = torch.zeros(
                (), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device
            )
            grad_hidden, grad_weight = torch.empty_like(hidden), None
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = narrow[part] @ w.T  # (rows, V)
                part_loss, grad = step(logits, targets[part], 1 / len(targets))
                loss += part_loss
                grad_hidden[part] = grad @ w
                if grad_weight is None:
                    grad_weight = (grad.T @ narrow[part]).to(
                        weight.dtype
                    )  # (V, C), summed in the weight's own type
                else:
                    grad_weight += grad.T @ narrow[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def chunked_loss(
    model: GPT, tokens: Tensor, targets: Tensor, *, rows: int = 1024, fuse: bool = True
) -> Tensor:
    """The loss of `plain_loss`, with at most `rows` x V logits in memory; plugs into `run_training(loss_fn=...)`."""
    if not torch.is_grad_enabled():
        return no_grad_loss(model, tokens, targets, rows)
    hidden = model.hidden(tokens).flatten(0, 1)
    return ChunkedCrossEntropy.apply(hidden, model.wte.weight, targets.flatten(), rows, fuse)


def no_grad_loss(model: GPT, tokens: Tensor, targets: Tensor, rows: int) -> Tensor:
    """The same without gradients, for evaluation."""
    hidden, targets = model.hidden(tokens).flatten(0, 1), targets.flatten()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), rows):
        logits = model.head(hidden[start : start + rows]).float()
        total += torch.nn.functional.cross_entropy(
            logits, targets[start : start + rows], reduction="sum"
        )
    return total / len(targets)


def fast_loss(vocab_size: int) -> Callable[[GPT, Tensor, Tensor], Tensor]:
    """The loss function to train with: chunked where all logits at once would be most of the memory."""
    return chunked_loss if vocab_size > 8192 else plain_loss
