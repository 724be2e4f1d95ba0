"""Checkpoints that cannot be half-written.

Tangled from book/workshop/W5_checkpoints.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from gptlib import GptlibError
from gptlib.gpt import GPT
from gptlib.workshop.devices import is_out_of_memory
from gptlib.workshop.files import sync_folder, write_whole


class CheckpointError(GptlibError):
    """A checkpoint that is missing or damaged, or cannot be written."""


def load_part(path: Path, digest: str) -> dict:
    """A dictionary of tensors from a file that agrees with its SHA-256.

    Runs no code that the file may hold. Raises CheckpointError.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror})"
        ) from None
    if found != digest:
        raise CheckpointError(
            f"{path.name}: damaged (SHA-256 {found[:8]}, written as {digest[:8]})"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path.name}: refused: {reason}") from None


class Checkpoints:
    """Checkpoints of one run: the last `keep` and the best.

    A checkpoint is the weights, `step-N.model.pt`; what only training needs,
    `step-N.pt`; and `step-N.sha256`, which names both files with their hashes. The
    hashes are written last and make it count, so a kill at any moment leaves an older
    whole checkpoint as the newest.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print):
        self.folder, self.keep, self.say = Path(folder), keep, say
        self.unreadable: set[int] = set()  # found on loading; they count for nothing

    def path(self, step: int, ending: str) -> Path:
        return self.folder / f"step-{step:08d}.{ending}"

    def steps(self) -> list[int]:
        """Steps that count, oldest first; whether they are whole is seen on loading."""
        found = (
            int(p.stem[5:]) for p in self.folder.glob("step-" + "[0-9]" * 8 + ".sha256")
        )
        return sorted(set(found) - self.unreadable)

    def best(self) -> int | None:
        """Step of the best checkpoint, or None if it is not there."""
        path = self.folder / "best"
        said = path.read_text().strip() if path.exists() else ""
        return int(said) if said.isdigit() and int(said) in self.steps() else None

    def parts(self, step: int) -> dict[Path, str]:
        """The files of a checkpoint and their hashes, as `step-N.sha256` has them."""
        path, line = self.path(step, "sha256"), r"([0-9a-f]{64})  (step-[\w.]+)"
        try:
            text = path.read_bytes().decode("ascii", errors="replace")
        except OSError as error:
            raise CheckpointError(
                f"{path.name}: cannot be read ({error.strerror})"
            ) from None
        found = [re.fullmatch(line, row) for row in text.splitlines()]
        if not found or None in found:
            raise CheckpointError(f"{path.name}: damaged, it names no files")
        return {self.folder / match[2]: match[1] for match in found if match}

    def save(self, step: int, state: dict, *, best: int | None = None) -> None:
        """Write a checkpoint, note which one is the best, delete those no longer kept.

        `state["model"]`, if there is one, gets a file of its own. Raises
        CheckpointError if the disk is full, for example.
        """
        rest = {key: value for key, value in state.items() if key != "model"}
        model = {key: value for key, value in state.items() if key == "model"}
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                sync_folder(self.folder.parent)
            self.set_aside()
            self.path(step, "sha256").unlink(missing_ok=True)  # while it is overwritten
            lines = ""
            for ending, part in (("model.pt", model), ("pt", rest)):
                path = self.path(step, ending)
                if part:
                    save_part = lambda file, part=part: torch.save(part, file)
                    lines += f"{write_whole(path, save_part)}  {path.name}\n"
            write_whole(self.path(step, "sha256"), lines)
            if best is not None:
                write_whole(self.folder / "best", f"{best}\n")
        except (OSError, RuntimeError) as error:  # torch's for a failed write
            raise CheckpointError(
                f"step {step} could not be saved in {self.folder} ({error}); the "
                "checkpoints before it are whole: make room and run the command again"
            ) from error
        self.clean(step)

    def clean(self, newest: int) -> None:
        """Delete what is older than `newest`, but for the last `keep` and the best."""
        steps = [step for step in self.steps() if step <= newest]
        kept = {*steps[-self.keep :], self.best()}
        for path in self.folder.glob("step-*"):
            found = re.match(r"step-(\d{8})", path.name)
            if found and int(found[1]) < newest and int(found[1]) not in kept:
                path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Move what could not be read into a folder of its own; nothing is deleted."""
        aside = self.folder / "unreadable"
        for step in sorted(self.unreadable):
            aside.mkdir(exist_ok=True)
            for path in self.folder.glob(f"step-{step:08d}.*"):
                target = aside / path.name
                while target.exists():
                    target = target.with_name(target.name + "~")
                os.replace(path, target)
        self.unreadable.clear()

    def load(self, step: int, *, model_only: bool = False) -> dict:
        """The state saved at a step. Raises CheckpointError if it is not whole.

        With `model_only` the optimiser's state stays on the disk.
        """
        try:
            parts = self.parts(step)
            model = self.path(step, "model.pt")
            if model_only and model in parts:
                parts = {model: parts[model]}
            state: dict = {}
            for path, digest in parts.items():
                state |= load_part(path, digest)
            return state
        except CheckpointError:
            self.unreadable.add(step)
            raise

    def load_best(self, *, model_only: bool = False) -> tuple[int, dict] | None:
        """(step, state) of the best checkpoint; None if it is not there or damaged."""
        best = self.best()
        try:
            return (
                None if best is None else (best, self.load(best, model_only=model_only))
            )
        except CheckpointError as error:
            self.say(f"{error}; it was the best one, taking the newest")
            return None

    def load_newest(self, *, model_only: bool = False) -> tuple[int, dict] | None:
        """(step, state) of the newest whole checkpoint; a damaged one is passed over.

        None if there is no checkpoint; CheckpointError if there are and none is whole.
        """
        steps, known_bad = self.steps(), len(self.unreadable)
        for step in reversed(steps):
            try:
                return step, self.load(step, model_only=model_only)
            except CheckpointError as error:
                self.say(f"{error}; trying the one before it")
        if found := known_bad + len(steps):
            raise CheckpointError(
                f"{self.folder}: none of {found} checkpoints is whole; restore "
                "one, or choose another --out to begin again"
            )
        return None


def weights_hash(model: GPT) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
