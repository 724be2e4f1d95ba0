"""Several processes, one run.

Tangled from book/workshop/W4_distribution.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptlib import GptlibError
from gptlib.training import World
from gptlib.workshop.devices import pick_device


class DistributionError(GptlibError):
    """Processes that were started in a way that does not fit."""


@dataclass(frozen=True)
class Processes(World):
    """The processes that train one model together, one alone or several."""

    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, made to average gradients over the processes in backward."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def accumulate(self, module: nn.Module, last: bool):
        """Context of one micro-batch: only the last of a step exchanges gradients."""
        if last or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all decide alike."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item() > 0)

    def from_main(self, number: int) -> int:
        """The number that the first process has, in all of them."""
        if self.size == 1:
            return number
        box = torch.tensor([number], device=self.device)
        dist.broadcast(box, src=0)
        return int(box.item())

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells each process


def process_device(name: str = "auto") -> torch.device:
    """This process's own device: under `torchrun` each takes a GPU of its own.

    Call it before anything else touches CUDA. Raises DeviceError, DistributionError.
    """
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` started this one with; without it, one alone.

    Joins a process group, and leaves it if it is the one who made it. Raises
    DistributionError if `torchrun`'s variables are set in part.
    """
    missing = [name for name in PLACE if name not in os.environ]
    if "WORLD_SIZE" not in os.environ:
        missing, rank, size = [], 0, 1
    elif missing:
        raise DistributionError(
            f"WORLD_SIZE is set without {', '.join(missing)}; start the processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ours = size > 1 and not dist.is_initialized()
    if ours:  # hours, since the first process may tokenize a corpus meanwhile
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield Processes(rank, size, device)
    finally:
        if ours:
            dist.destroy_process_group()
