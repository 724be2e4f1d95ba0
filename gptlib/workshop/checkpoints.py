"""Checkpoints that cannot be half-written.

Tangled from book/workshop/W5_checkpoints.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or damaged, or a folder in use; the message says what to do."""


class HashingFile:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[HashingFile], None]) -> str:
    """Call `write(file)`, and only when all of it is on the disk give the file its name. Returns its SHA-256.

    Temporary file in the same folder, flush, fsync, rename, fsync of the folder: at every moment
    `path` is absent, the old file or the new one, never a part. A failed write leaves nothing behind.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as raw:
            file = HashingFile(raw)
            write(file)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return file.sha256.hexdigest()


def write_text(path: Path, text: str) -> None:
    """A small text file, atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def remove_leftovers(run: Path) -> None:
    """Delete temporary files of writes that a kill cut short; only for the process that holds the lock."""
    for pattern in ("*.tmp-*", "checkpoints/*.tmp-*"):
        for path in Path(run).glob(pattern):
            path.unlink(missing_ok=True)


class Checkpoints:
    """Checkpoints of one run: the last `keep` and the best, each with its SHA-256 beside it.

    A checkpoint counts only when its `.sha256` is there and agrees. The hash is written after the
    data, so a kill at any moment leaves an older whole checkpoint as the newest.
    """

    NAME = re.compile(r"step-(\d{8})\.pt")

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print):
        self.folder, self.keep, self.say = Path(folder), keep, say
        self.damaged: set[int] = set()  # found on loading; they count for nothing

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def hash_path(self, step: int) -> Path:
        return self.path(step).with_suffix(".sha256")

    def steps(self) -> list[int]:
        """Steps with a checkpoint and a hash, oldest first; whether they agree is seen on loading."""
        found = [self.NAME.fullmatch(p.name) for p in self.folder.glob("step-*.pt")]
        return sorted(
            int(m[1]) for m in found if m and self.hash_path(int(m[1])).exists()
        )

    def best(self) -> int | None:
        """Step of the best checkpoint, or None if it is not there."""
        path = self.folder / "best"
        said = path.read_text().strip() if path.exists() else ""
        return int(said) if said.isdigit() and int(said) in self.steps() else None

    def save(self, step: int, state: dict, *, best: int | None = None) -> None:
        """Write one checkpoint, note which is the best, delete those no longer kept. Raises CheckpointError."""
        save_checkpoint(self, step, state, best)
        self.damaged.discard(step)
        self.clean(step)

    def clean(self, newest: int) -> None:
        """Delete all but the last `keep` up to `newest` and the best.

        What a kill left half-done goes too, and so does what is newer: it could not be read.
        """
        steps = [
            step for step in self.steps() if step <= newest and step not in self.damaged
        ]
        kept = set(steps[-self.keep :]) | {self.best()}
        for path in self.folder.glob("step-*"):
            found = re.match(r"step-(\d{8})", path.name)
            if found and int(found[1]) not in kept:
                path.unlink(missing_ok=True)

    def load(self, step: int) -> dict:
        """The state saved at a step. Raises CheckpointError if the file is damaged or holds code."""
        try:
            return load_checkpoint(self.path(step), self.hash_path(step))
        except CheckpointError:
            self.damaged.add(step)
            raise

    def load_best(self) -> tuple[int, dict] | None:
        """(step, state) of the best checkpoint; None if there is none, or if it is damaged, which is reported."""
        best = self.best()
        try:
            return None if best is None else (best, self.load(best))
        except CheckpointError as error:
            self.say(f"{error}; it was the best one, taking the newest")
            return None

    def load_newest(self) -> tuple[int, dict] | None:
        """(step, state) of the newest whole checkpoint; each damaged newer one is reported and passed over.

        None if there is no checkpoint at all; CheckpointError if there are some and none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.load(step)
            except CheckpointError as error:
                self.say(f"{error}; trying the one before it")
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of {len(steps)} checkpoints is whole; delete the run to begin again"
            )
        return None


def save_checkpoint(
    checkpoints: Checkpoints, step: int, state: dict, best: int | None
) -> None:
    """Data, then hash, then the note of the best. Raises CheckpointError if the disk is full, for example."""
    path, folder = checkpoints.path(step), checkpoints.folder
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        checkpoints.hash_path(step).unlink(
            missing_ok=True
        )  # of a damaged one that is written anew
        digest = write_atomically(path, lambda file: torch.save(state, file))
        write_text(checkpoints.hash_path(step), f"{digest}  {path.name}\n")
        if best is not None:
            write_text(folder / "best", f"{best}\n")
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch reports a failed write as RuntimeError
        raise CheckpointError(
            f"step {step} could not be saved in {folder} ({error}); the checkpoints before it are whole: "
            "make room and run the same command again"
        ) from error


def load_checkpoint(path: Path, hash_path: Path) -> dict:
    """A state that agrees with its hash, read without running code. Raises CheckpointError."""
    try:
        said = hash_path.read_text().split()[0]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, IndexError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path.name}: the file or its .sha256 is missing or empty"
        ) from None
    if found != said:
        raise CheckpointError(
            f"{path.name}: damaged (SHA-256 {found[:8]}, written as {said[:8]})"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path.name}: refused: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from None


class RunLock:
    """Keeps two processes from writing one run folder. The lock ends with the process, however it ends."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / "lock"

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+")
        try:
            lock_file(self.file, wait=False)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            self.file.close()
            raise CheckpointError(
                f"{self.path.parent} is being written by process {holder}; wait for it or choose another --out"
            ) from None
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


@contextlib.contextmanager
def one_at_a_time(path: Path):
    """Context in which no other process is inside the same one; waits for its turn. `path` is a lock file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        lock_file(file, wait=True)
        yield


def lock_file(file, *, wait: bool) -> None:
    """Lock an open file for this process until it is closed; BlockingIOError if it is taken and `wait` is not set.

    On a file system that knows no locks there is none, and nothing is raised.
    """
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:  # locks a byte far behind the text, the same for every process
            import msvcrt

            file.seek(2**30)
            msvcrt.locking(
                file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1
            )
    except BlockingIOError:
        raise
    except OSError as error:
        if os.name != "posix":
            raise BlockingIOError from error
