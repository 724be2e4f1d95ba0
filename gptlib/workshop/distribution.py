"""Several processes, one run.

Tangled from book/workshop/W4_distribution.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptlib.workshop.devices import pick_device


@dataclass(frozen=True)
class World:
    """The processes that train one model together; one alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, made to average its gradients over the processes in each backward pass."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model)

    def accumulate(self, model: nn.Module, last: bool):
        """Context for one micro-batch: gradients are exchanged only in the last of a step."""
        return contextlib.nullcontext() if self.size == 1 or last else model.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process, so that all decide alike."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=device)
        dist.all_reduce(votes)
        return bool(votes.item() > 0)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()


def join_world(device: torch.device) -> tuple[World, torch.device]:
    """The world that `torchrun` started this process in, and this process's device; a world of one without it."""
    if "WORLD_SIZE" not in os.environ:
        return World(), device
    world = World(
        *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    )
    if device.type == "cuda":
        device = pick_device(f"cuda:{world.local_rank}")
        torch.cuda.set_device(device)
    if world.size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(hours=6)
        )  # the first one tokenizes meanwhile
    return world, device


def leave_world() -> None:
    """Undo `join_world`; does nothing for a world of one."""
    if dist.is_initialized():
        dist.destroy_process_group()
