"""Which machine am I on.

Tangled from book/workshop/W3_devices.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from dataclasses import dataclass

import torch


class DeviceError(ValueError):
    """A device or precision that this machine does not have; the message says what it has."""


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; MPS must be asked for by name, and is tested first.

    Raises DeviceError for a name that is no device and for a device that is not there or computes wrongly.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(
            f"unknown device {name!r}; there are auto, cpu, cuda, cuda:N, mps"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"no device {name} here; there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("no MPS device here; use --device cpu")
        check_against_cpu(device)
    return device


def check_against_cpu(device: torch.device, tolerance: float = 1e-4) -> None:
    """Compare attention, softmax and their gradient on `device` with the CPU's; raises DeviceError if they differ."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 32, 16, generator=generator)
    results = []
    for place in (torch.device("cpu"), device):
        leaf = (
            q.detach().clone().to(place).requires_grad_()
        )  # a leaf of its own on each device
        y = torch.nn.functional.scaled_dot_product_attention(
            leaf, k.to(place), v.to(place), is_causal=True
        )
        y.log_softmax(-1).square().sum().backward()
        results.append(
            torch.cat([y.detach().flatten().cpu(), leaf.grad.flatten().cpu()])
        )
    worst = (results[0] - results[1]).abs().max().item()
    if not worst < tolerance:
        raise DeviceError(
            f"{device} computes attention that is {worst:.1e} off the CPU's; use --device cpu"
        )


@dataclass(frozen=True)
class Precision:
    """In which type the matmuls run, and why. `name` is fp32, bf16 or fp16; weights stay fp32 in all three."""

    name: str
    reason: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.name
        ]

    def autocast(self):
        """Context in which matmuls run in `dtype`; does nothing for fp32."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """fp16 needs its gradients scaled up; for the other types the scaler passes everything through."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_precision(device: torch.device, name: str = "auto") -> Precision:
    """Choose a precision for a device: bf16 if it really has it, else fp16 on CUDA, else fp32.

    Raises DeviceError for an unknown name and for fp16 training on the CPU.
    """
    if name not in PRECISIONS:
        raise DeviceError(
            f"unknown precision {name!r}; there are {', '.join(PRECISIONS)}"
        )
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise DeviceError("fp16 training needs CUDA; use bf16 or fp32 on the CPU")
        return Precision(name, "asked for", device.type)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:  # is_bf16_supported() also says yes where bf16 is emulated
            return Precision(
                "bf16", f"compute capability {major}.{minor} has bf16 units", "cuda"
            )
        if major >= 7 and fp16_is_sound(device):
            return Precision(
                "fp16", f"compute capability {major}.{minor} has no bf16 units", "cuda"
            )
        return Precision(
            "fp32",
            f"fp16 of compute capability {major}.{minor} is missing or gives NaN",
            "cuda",
        )
    if device.type == "cpu":
        ratio = cpu_bf16_speed()
        if ratio > 1.2:
            return Precision(
                "bf16", "this processor multiplies bf16 faster than fp32", "cpu"
            )
        return Precision("fp32", "bf16 is no faster than fp32 on this processor", "cpu")
    return Precision("fp32", "the safe choice on this device", device.type)


def fp16_is_sound(device: torch.device) -> bool:
    """GTX 16xx cards can return NaN from fp16 matmuls: try one, forward and backward."""
    with torch.autocast("cuda", dtype=torch.float16):
        layer = torch.nn.Linear(384, 384, device=device)
        out = layer(torch.ones(64, 384, device=device))
        out.float().square().mean().backward()
    return bool(torch.isfinite(out).all() and torch.isfinite(layer.weight.grad).all())


def cpu_bf16_speed(size: int = 768, seconds: float = 0.1) -> float:
    """How many times faster the CPU multiplies bf16 matrices than fp32 ones; 0 where it only emulates bf16."""
    if (
        platform.machine() in ("x86_64", "AMD64")
        and not torch.cpu._is_avx512_bf16_supported()
    ):
        return 0.0
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        a @ a  # the first call sets up the kernel
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            a @ a
            done += 1
        rates.append(done / (time.perf_counter() - began))
    return rates[1] / rates[0]


# dense peak in TFLOP/s from the makers' data sheets: (fp32 without TF32, bf16 or fp16 with fp32 accumulation)
GPU_PEAKS = {
    "H200": (67, 989),
    "H100 PCIe": (51, 756),
    "H100": (67, 989),
    "A100": (19.5, 312),
    "L40S": (91.6, 362),
    "L4": (30.3, 121),
    "A10G": (31.2, 70),
    "T4": (8.1, 65),
    "V100": (15.7, 125),
    "RTX 4090": (82.6, 165.2),
    "RTX 3090": (35.6, 71),
    "GTX 1660 Ti": (5.4, 10.9),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in a precision, or None where no data sheet is at hand (any CPU, other cards)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, (fp32, half) in GPU_PEAKS.items():
        if re.search(rf"\b{key}\b", name):
            return 1e12 * (fp32 if precision == "fp32" else half)
    return None


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the CUDA allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has, or None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def describe_machine(device: torch.device) -> dict:
    """What a run records about where it runs."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
