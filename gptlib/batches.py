"""From a file of tokens to batches.

Tangled from book/chapters/03_batches.md; change it there, not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gptlib import GptlibError


def crops(
    ids: np.ndarray, offsets: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (B, T) int64: the targets are one token further on."""
    windows = np.stack([ids[o : o + block_size + 1] for o in offsets])
    tokens = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def crop_offsets(seed: int, step: int, n: int, n_starts: int) -> np.ndarray:
    """`n` offsets in [0, n_starts), (n,) int64: a pure function of (seed, step).

    Philox is a counter-based generator: key in, bits out (Salmon et al. 2011). Only its
    raw bits are used, since NumPy may change how its other methods use them. Raises
    ValueError for more than 2**32 starts.
    """
    if n_starts > 2**32:
        raise ValueError(f"{n_starts} starts are more than 2**32; split the file")
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(n)
    r = bits >> np.uint64(32)  # the upper half: a whole number below 2**32
    return ((r * np.uint64(n_starts)) >> np.uint64(32)).astype(np.int64)


class BatchError(GptlibError):
    """Tokens from which no batch can be drawn."""


@dataclass(frozen=True)
class Batches:
    """Training batches: batch `step` depends on (seed, step) alone.

    ids: the token stream; batch_size: windows of a whole step; block_size: tokens of a
    window; mark: if given, a window begins at the last such token before its place.
    Raises BatchError if the stream is shorter than one window and its target.
    """

    ids: np.ndarray
    batch_size: int
    block_size: int
    seed: int
    mark: int | None = None

    def __post_init__(self):
        if len(self.ids) <= self.block_size:
            raise BatchError(
                f"{len(self.ids)} tokens are too few for one block of "
                f"{self.block_size} and its target; use a longer text or a smaller "
                "block_size"
            )

    def offsets(self, step: int) -> np.ndarray:
        """Where the windows of a step begin, (batch_size,) int64."""
        n_starts = len(self.ids) - self.block_size
        offsets = crop_offsets(self.seed, step, self.batch_size, n_starts)
        if self.mark is None:
            return offsets
        return self.starts[np.searchsorted(self.starts, offsets, side="right") - 1]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where windows may begin if there is a mark: at each mark, and at 0."""
        return np.union1d([0], np.flatnonzero(self.ids == self.mark))

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The step's windows in groups: group rank, rank + world_size, ... of them."""
        offsets = self.offsets(step)
        first, stride = rank * micro_batch_size, world_size * micro_batch_size
        for start in range(first, self.batch_size, stride):
            group = offsets[start : start + micro_batch_size]
            yield crops(self.ids, group, self.block_size)


def to_device(
    batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Move batches to a device, one ahead of its use.

    On CUDA the copy is from pinned memory and does not wait for the computation.
    """

    def move(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if device.type == "cuda":
            batch = tuple(t.pin_memory() for t in batch)
        return tuple(t.to(device, non_blocking=True) for t in batch)

    ahead = None
    for batch in map(move, batches):
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead
