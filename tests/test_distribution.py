# ruff: noqa: F811 (fixtures are arguments)
"""Several processes as one: against one alone, with the losses that ship."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from engine import (
    ROOT,
    config,  # noqa: F401
    finish,
    last_state,
    losses,
    posix,
    rows,
    start,
    wait_until,
    without_dropout,
)

from gptlib import GptlibError
from gptlib.decoder import DecoderConfig
from gptlib.workshop.distribution import Processes, process_device, processes


CPU = torch.device("cpu")


def test_one_process_alone_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes(CPU) as world:
        assert world == Processes(0, 1, CPU) and world.is_main
        assert not dist.is_initialized()
        module = torch.nn.Linear(1, 1)
        assert world.wrap(module) is module
        assert world.any(True) and not world.any(False) and world.from_main(7) == 7
        world.wait()


def test_several_processes_average_and_vote(monkeypatch):
    """With the exchange replaced by what two more processes would send."""

    def add(tensor):
        tensor += torch.tensor([4.0, 5.0]).sum() if tensor.item() == 3.0 else 1.0

    monkeypatch.setattr(dist, "all_reduce", add)
    world = Processes(1, 3, CPU)
    assert world.mean(torch.tensor(3.0)).item() == 4.0
    assert world.any(False) is True and not world.is_main


def test_a_world_size_without_a_rank_is_named(monkeypatch):
    """It once was a KeyError."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        pytest.raises(
            GptlibError, match="WORLD_SIZE is set without RANK; start .*torchrun"
        ),
        processes(CPU),
    ):
        pass


def test_a_group_that_somebody_else_made_is_left_alone(monkeypatch, tmp_path):
    """It once was destroyed."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with processes(CPU) as world:
            assert world.size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_each_process_takes_a_card_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process_device() == torch.device("cuda:3") == taken[0]
    monkeypatch.delenv("LOCAL_RANK")
    assert process_device("cuda:1").index == 1 and process_device("cpu") == CPU


# without zero_projections, whose first gradients are rounding that Muon makes large
FAST = {"optimizer": "muon", "schedule": "trapezoid"}
OTHER_PARTS = {
    "model": DecoderConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=320, norm="rms",
        positions="alibi", mlp="swiglu", n_kv_head=1, tied_head=False,
    )
}  # fmt: skip


@posix
@pytest.mark.parametrize(
    ("changes", "loss"),
    [({}, "plain"), (FAST, "chunked"), (FAST, "compiled"), (OTHER_PARTS, "chunked")],
)
def test_two_processes_equal_one_and_resume_as_one(config, tmp_path, changes, loss):
    config = without_dropout(config, steps=12, **changes)
    out = {name: tmp_path / name for name in ("one", "two", "both")}
    program = {"program": {"loss": loss}}
    finish(start(config, out["one"], 1, **program))
    finish(start(config, out["two"], 2, **program))
    exchanges = int((tmp_path / "two.exchanges").read_text())
    assert exchanges == 12, "one exchange of gradients a step"
    finish(start(config, out["both"], 2, max_steps=6, **program))
    assert last_state(out["both"])["step"] == 6
    said = finish(start(config, out["both"], 1, **program))
    assert "processes 2 -> 1" in said
    one, atol = last_state(out["one"])["model"], 5e-3 if changes else 1e-5
    for name in ("two", "both"):
        assert losses(out[name]) == pytest.approx(
            losses(out["one"]), abs=1e-3 if changes else 1e-5
        )
        for key, weight in last_state(out[name])["model"].items():
            assert torch.allclose(weight, one[key], atol=atol), key


@posix
def test_a_worker_that_dies_stops_the_others(config, tmp_path):
    out, program = tmp_path / "run", {"dies_at": 13}
    process = start(config, out, 2, program=program, save_minutes=0)
    said = process.communicate(timeout=180)[1]
    assert process.returncode != 0 and "SIGKILL" in said
    step = last_state(out)["step"]
    assert step in (5, 6), "two micro-batches a step: the seventh step was under way"
    finish(start(config, out, 2, max_steps=2))
    assert last_state(out)["step"] == step + 2


@posix
def test_sigterm_to_torchrun_saves_and_stops_all(config, tmp_path):
    config = without_dropout(config, steps=10**6, eval_interval=10**6)
    out = tmp_path / "run"
    process = start(config, out, 2, save_minutes=60)
    wait_until(lambda: len(rows(out)) >= 3, process)
    process.terminate()
    said = process.communicate(timeout=180)[1]
    state = last_state(out)
    assert state["step"] == rows(out)[-1]["step"], said[-2000:]
    assert f"stopped at step {state['step']} of 1000000" in said


@posix
def test_the_command_of_the_readme(config, tmp_path):
    """torchrun --nproc-per-node=2 -m gptlib.pretraining --preset demo --out FOLDER"""
    shape = {
        "n-layer": 1,
        "n-head": 2,
        "n-embd": 16,
        "block-size": 16,
        "vocab-size": 320,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "gptlib.pretraining", "--preset", "demo"]
    command += ["--out", str(tmp_path / "two"), "--corpus", config.corpus]
    command += ["--tokenizer", config.tokenizer, "--steps", "4", "--no-progress"]
    command += ["--eval-sequences", "4", "--eval-interval", "2", "--crops", "random"]
    for name, value in shape.items():
        command += [f"--model.{name}", str(value)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_state(tmp_path / "two")["step"] == 4
