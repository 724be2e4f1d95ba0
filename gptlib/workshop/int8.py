"""Weights of eight bits.

Tangled from book/workshop/W23_int8.md; change it there, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptlib.gpt import GPT
from gptlib.speed import SamplingCopy
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
    reason = ""
    if model.device.type != "cpu":
        reason = f"the model is on {model.device.type}"
    else:
        generator = torch.Generator().manual_seed(0)
        plain, x = nn.Linear(64, 48), torch.randn(1, 64, generator=generator)
        try:
            with torch.no_grad():
                gap = (Int8Linear(plain)(x) - plain(x)).abs().max().item()
            if not gap < 0.1:
                reason = f"wrong by {gap:.1e}"
        except Exception as error:  # no engine for this processor
            reason = (" ".join(str(error).split()) or type(error).__name__)[:80]
    if reason:
        say(f"no weights of 8 bits: {reason}; the model stays as it is")
        return model
    return SamplingCopy(model, Int8Linear).train(model.training)
