"""Weights of eight bits.

Tangled from book/workshop/W23_int8.md; change it there, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptlib.gpt import GPT
from gptlib.speed import SamplingCopy, is_trusted
from gptlib.workshop.watching import say


class Int8Linear(nn.Module):
    """A Linear with weights of 8 bits, a scale for each row, and no gradient.

    (..., C) float32 -> (..., V) float32, on a CPU. The input is rounded to 7 bits in
    each call.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (V, C)
        scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        stored = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = linear.bias if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(stored, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, True)


def int8_copy(model: GPT) -> GPT:
    """A copy that draws one text faster on a CPU, from weights of 8 bits.

    Where the machine or the model's device cannot, the model itself and one line.
    """
    method, kind = "arithmetic of 8 bits", model.device.type
    if kind != "cpu":
        say(
            f"{method} is not used for sampling: it needs a CPU, the model is on {kind}"
        )
        return model
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 48), torch.randn(1, 64)
        trusted = is_trusted(
            "sampling",
            lambda: [Int8Linear(layer)(x)],
            lambda: [layer(x)],
            tolerance=0.05,
            method=method,
        )
    return SamplingCopy(model, Int8Linear).train(model.training) if trusted else model
