"""Checkpoints against kills, failing disks, damage and malice."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path

import pytest
import torch
from engine import child, count_events, damage, die, finished, posix

from gptlib import GptlibError
from gptlib.workshop import checkpoints
from gptlib.workshop.checkpoints import CheckpointError, Checkpoints


def state(step: int) -> dict:
    weight = torch.full((1000,), float(step))
    return {"model": {"w": weight}, "optimizer": {"m": weight}, "step": step}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def save_until_killed(folder: Path, nth: int) -> None:
    """Save step 1, then die just before the nth fsync or rename of step 2."""
    saved = Checkpoints(folder, keep=2)
    saved.save(1, state(1), best=1)
    count_events(nth, die)
    saved.save(2, state(2), best=2)


@posix
@pytest.mark.parametrize("nth", range(1, 14))
def test_kill_at_every_stage_of_a_save(tmp_path, nth):
    """Four files, each with fsync, rename, fsync of the folder; 13 is no kill."""
    code = finished(child(save_until_killed, tmp_path, nth))
    assert (code != 0) == (nth <= 12)
    said = []
    step, found = Checkpoints(tmp_path, say=said.append).load_newest()
    assert step == found["step"] == (1 if nth <= 8 else 2) and not said
    assert (found["model"]["w"] == step).all()
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(3, state(3), best=3)
    assert saved.load_newest()[0] == saved.best() == 3


STAGES = [("os.fsync", n, n >= 6) for n in range(1, 9)]
STAGES += [("os.replace", n, n >= 4) for n in range(1, 5)]
STAGES += [("torch.save", n, False) for n in (1, 2)]


@pytest.mark.parametrize(("stage", "nth", "whole"), STAGES)
def test_failure_at_every_stage_of_a_save(tmp_path, monkeypatch, stage, nth, whole):
    """whole: both files and their hashes were in place, so that step 2 may count."""
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, state(1), best=1)
    module = {"os": os, "torch": torch}[stage.partition(".")[0]]
    calls, real = iter(range(1, 100)), getattr(module, stage.partition(".")[2])

    def failing(*arguments):
        if next(calls) != nth:
            return real(*arguments)
        if stage == "torch.save":
            arguments[1].write(b"half of it")
            raise RuntimeError("unexpected pos 64 vs 0")
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(stage, failing)
        expected = r"step 2 could not be saved .* before it are whole"
        with pytest.raises(CheckpointError, match=expected):
            saved.save(2, state(2), best=2)
    step, found = saved.load_newest()
    assert step == found["step"] == (2 if whole else 1)
    assert not list(tmp_path.glob("*.tmp-*")), "a failed write left its temporary file"
    saved.save(3, state(3), best=3)
    assert saved.load_newest()[0] == saved.best() == 3


def test_the_last_and_the_best_are_kept_and_nothing_else(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        saved.save(step, state(step), best=min(step, 2))
    assert saved.steps() == [2, 5, 6] and saved.best() == 2
    endings = {
        f"step-{n:08d}.{e}" for n in (2, 5, 6) for e in ("pt", "model.pt", "sha256")
    }
    assert names(tmp_path) == endings | {"best"}


def test_weights_can_be_had_without_the_optimiser(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1))
    saved.path(1, "pt").unlink()  # nobody reads it
    assert saved.load(1, model_only=True).keys() == {"model"}
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt: cannot be read"):
        saved.load(1)


def test_checkpoints_of_one_file_are_still_read(tmp_path):
    """As older versions wrote them."""
    buffer = io.BytesIO()
    torch.save(state(7), buffer)
    (tmp_path / "step-00000007.pt").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (tmp_path / "step-00000007.sha256").write_text(f"{digest}  step-00000007.pt\n")
    saved = Checkpoints(tmp_path)
    step, found = saved.load_newest()
    assert step == 7 and found.keys() == {"model", "optimizer", "step"}
    assert "model" in saved.load(7, model_only=True)
    saved.save(8, state(8))
    assert saved.steps() == [7, 8]


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
@pytest.mark.parametrize("ending", ["pt", "model.pt", "sha256"])
def test_a_damaged_checkpoint_gives_way_and_is_set_aside(tmp_path, how, ending):
    said, saved = [], Checkpoints(tmp_path, keep=1)
    saved.keep = 3
    for step in (1, 2):
        saved.save(step, state(step))
    damage(saved.path(2, ending), how)
    bytes_of_damaged = saved.path(2, ending).read_bytes()
    saved = Checkpoints(tmp_path, keep=1, say=said.append)
    assert saved.load_newest()[0] == 1 and "step-00000002" in said[0]
    assert saved.path(2, ending).exists(), "whoever only reads moves nothing"
    saved.save(2, state(2))
    assert saved.load_newest()[0] == 2 and saved.steps() == [2]
    aside = tmp_path / "unreadable" / saved.path(2, ending).name
    assert aside.read_bytes() == bytes_of_damaged, (
        "an unreadable checkpoint was deleted"
    )
    saved.unreadable.add(2)
    saved.save(3, state(3))
    assert aside.read_bytes() == bytes_of_damaged and aside.with_name(aside.name + "~")


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(tmp_path):
    saved = Checkpoints(tmp_path, keep=3, say=lambda text: None)
    for step in (80, 90, 100):
        saved.save(step, state(step))
    for step in (90, 100):
        damage(saved.path(step, "pt"), "flipped")
    saved.keep = 2
    assert saved.load_newest()[0] == 80
    for step in (81, 82, 83):
        saved.save(step, state(step))
        assert saved.load_newest()[0] == step
    assert saved.steps() == [82, 83]


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=2, say=lambda text: None)
    for step in (80, 90):
        saved.save(step, state(step))
    damage(saved.path(90, "model.pt"), "flipped")
    assert saved.load_newest()[0] == 80
    saved.save(100, state(100))
    damage(saved.path(100, "model.pt"), "flipped")
    assert saved.load_newest()[0] == 80, "the damaged 90 pushed out the whole 80"


def test_when_none_is_whole_nothing_is_invented(tmp_path):
    assert Checkpoints(tmp_path).load_newest() is None
    saved = Checkpoints(tmp_path, say=lambda text: None)
    saved.save(1, state(1))
    damage(saved.path(1, "pt"), "empty")
    with pytest.raises(
        GptlibError, match="none of 1 checkpoints is whole; restore one"
    ):
        saved.load_newest()


def test_a_file_that_cannot_be_read_is_passed_over_and_kept(tmp_path, monkeypatch):
    """A failing disk says EIO; the checkpoint may be whole for all one knows."""
    said, saved = [], Checkpoints(tmp_path, keep=1)
    saved.keep = 2
    for step in (1, 2):
        saved.save(step, state(step))
    real = Path.open

    def failing(path, *arguments, **options):
        if path.name == "step-00000002.pt":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    saved = Checkpoints(tmp_path, keep=1, say=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        assert saved.load_newest()[0] == 1 and "cannot be read (Input" in said[0]
    saved.save(2, state(2))
    assert (tmp_path / "unreadable" / "step-00000002.pt").exists()


def test_too_little_memory_is_not_called_damage(tmp_path, monkeypatch):
    """It once was, and the newest checkpoint was deleted at the next save."""
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1))
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def load(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(checkpoints.torch, "load", load)
        with pytest.raises(type(error)):
            saved.load_newest()
        assert not saved.unreadable


@pytest.mark.parametrize("how", ["flipped", "empty"])
def test_a_damaged_best_gives_way_to_the_newest(tmp_path, how):
    said, saved = [], Checkpoints(tmp_path, keep=2)
    for step in (10, 12):
        saved.save(step, state(step), best=10)
    damage(saved.path(10, "model.pt"), how)
    saved = Checkpoints(tmp_path, say=said.append)
    assert saved.load_best() is None and "taking the newest" in said[0]
    damage(saved.path(12, "pt"), how)  # and then nothing is left
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        saved.load_newest()
    for text in ("", "99", "x"):
        (tmp_path / "best").write_text(text)
        assert saved.best() is None


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused(tmp_path):
    saved, proof, buffer = Checkpoints(tmp_path), tmp_path / "it-ran", io.BytesIO()
    torch.save({"model": Malicious(proof)}, buffer)
    saved.path(3, "pt").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    saved.path(3, "sha256").write_text(f"{digest}  step-00000003.pt\n")
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt: refused"):
        saved.load(3)
    assert not proof.exists()


def test_a_list_of_hashes_leads_nowhere_else(tmp_path):
    (tmp_path / "step-00000001.sha256").write_text("0" * 64 + "  ../step-secret\n")
    with pytest.raises(CheckpointError, match=r"step-00000001\.sha256: damaged"):
        Checkpoints(tmp_path).load(1)
