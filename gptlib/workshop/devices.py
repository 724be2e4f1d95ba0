"""Which machine am I on.

Tangled from book/workshop/W3_devices.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import gptlib
from gptlib import GptlibError
from gptlib.training import Precision


class DeviceError(GptlibError):
    """A device or precision that this machine does not have."""


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` is CUDA where there is one, else the CPU.

    MPS must be asked for by name, and is tested first. Pick before the first tensor: a
    CPU then gets its memory in large pages. Raises DeviceError for a name that is no
    device, and for a device that is not there or computes wrongly.
    """
    use_large_pages()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"unknown device {name!r}; there are auto, cpu, cuda:N, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(f"no device {name}; there are {count}, counted from 0")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("no MPS device here; use --device cpu")
        check_against_cpu(device)
    return device


def check_against_cpu(device: torch.device, tolerance: float = 1e-4) -> None:
    """Raises DeviceError if attention or its gradient differs from the CPU's."""
    q, k, v = torch.randn(3, 2, 4, 32, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for place in (torch.device("cpu"), device):
        leaf = q.detach().clone().to(place).requires_grad_()
        y = torch.nn.functional.scaled_dot_product_attention(
            leaf, k.to(place), v.to(place), is_causal=True
        )
        y.log_softmax(-1).square().sum().backward()
        results.append(torch.cat([t.detach().flatten().cpu() for t in (y, leaf.grad)]))
    worst = (results[0] - results[1]).abs().max().item()
    if not worst < tolerance:
        raise DeviceError(
            f"{device} computes attention that is {worst:.1e} off the CPU's; "
            "use --device cpu"
        )


PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_precision(device: torch.device, name: str = "auto") -> Precision:
    """A precision by name; `auto` is what the device has instructions for.

    bf16 if it has them, else fp16 on CUDA, else fp32. Raises DeviceError for an unknown
    name, and for fp16 on the CPU.
    """
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise DeviceError(f"unknown precision {name!r}; there are {known}")
    if name == "fp16" and device.type == "cpu":
        raise DeviceError("fp16 training needs CUDA; use bf16 or fp32 on the CPU")
    if name != "auto":
        return Precision(name, device.type)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = f"compute capability {major}.{minor}"
        if major >= 8:  # is_bf16_supported() says yes where bf16 is emulated, too
            return Precision("bf16", "cuda", f"{capability} has bf16 units")
        if major >= 7 and fp16_is_sound(device):
            return Precision("fp16", "cuda", f"{capability} has no bf16 units")
        return Precision("fp32", "cuda", f"{capability} has no fp16, or a faulty one")
    if device.type == "cpu":
        has, why = cpu_has_bf16(cpu_information())
        kernels = torch.backends.cpu.get_cpu_capability()
        if has and not kernels.startswith("AVX512"):  # ATEN_CPU_CAPABILITY can say so
            has, why = False, f"PyTorch uses its kernels for {kernels}"
        return Precision("bf16" if has else "fp32", "cpu", why)
    return Precision("fp32", device.type, "the safe choice on this device")


def fp16_is_sound(device: torch.device) -> bool:
    """GTX 16xx cards can return NaN from fp16 products: try one, both passes."""
    with torch.autocast("cuda", dtype=torch.float16):
        layer = torch.nn.Linear(384, 384, device=device)
        out = layer(torch.ones(64, 384, device=device))
        out.float().square().mean().backward()
    grad = layer.weight.grad
    return grad is not None and bool(out.isfinite().all() and grad.isfinite().all())


def cpu_information(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says of its first processor; empty on other systems."""
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_has_bf16(information: dict[str, str]) -> tuple[bool, str]:
    """Whether a processor multiplies bf16 matrices faster than fp32 ones, and why."""
    flags = information.get("flags", "").split()
    if "amx_bf16" in flags:
        return True, "the processor has AMX for bf16"
    if "avx512_bf16" in flags and information.get("vendor_id") == "AuthenticAMD":
        return True, "the processor has AVX-512 for bf16, at AMD's full speed"
    if "avx512_bf16" in flags:
        return False, "bf16 without AMX is slow on this maker's processors"
    return False, "the processor has no bf16 instructions"


# dense peak in TFLOP/s from the makers' data sheets:
# fp32 without TF32, and 16 bits with fp32 accumulation
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
    """Peak FLOP/s of a device in a precision; None where no data sheet is at hand."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (fp32, half) in GPU_PEAKS.items():
            if re.search(rf"\b{key}\b", name):
                return 1e12 * (fp32 if precision == "fp32" else half)
    return None


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the CUDA allocator, or of the process on the CPU."""
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


OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever class, says that memory ran out."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """Turns an error that says that memory ran out into a DeviceError with the cure."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            "out of memory; halve --micro-batch-size (the tokens per step stay the "
            "same); if it is 1 already, the model or its block_size is too large here"
        ) from error


def describe_machine(device: torch.device) -> dict:
    """What a run records about where it runs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = cpu_information().get("model name") or platform.processor()
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        "device": device.type,
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe_code() -> dict:
    """Version, commit (None if it is not a checkout) and hash of gptlib's own files."""
    folder, digest = Path(gptlib.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    commit = None
    if (folder.parent / ".git").exists():
        with contextlib.suppress(OSError):
            asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            answer = subprocess.run(asked, capture_output=True, text=True)
            commit = answer.stdout.strip() or None
    files = digest.hexdigest()[:16]
    return {"version": gptlib.__version__, "commit": commit, "files": files}


def make_deterministic() -> None:
    """Deterministic CUDA kernels from here on; call it before the first of them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def use_large_pages() -> None:
    """Ask Linux for memory in pages of 2 MB; call it before the first tensor.

    PyTorch reads the request once. Numbers do not change. Without it a large new matrix
    costs a call to the system for every 4 kB of it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
