"""The training engine against kills, signals, damaged files, full disks and several processes.

Everything runs offline on a small text with a tokenizer of its own. "Equal" means equal in every bit
unless a tolerance is named.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptlib import speed, training
from gptlib.workshop.checkpoints import CheckpointError, Checkpoints, RunLock
from gptlib.workshop.devices import Precision
from gptlib.gpt import GPTConfig
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import (
    NonFiniteError,
    RunError,
    RunOptions,
    TrainConfig,
    run_training,
)
from gptlib.training import errors_in_one_line as one_line
from gptlib.workshop.watching import read_rows

posix = pytest.mark.skipif(
    os.name != "posix", reason="needs POSIX signals and processes"
)
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=320)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A run of 40 steps with dropout, on 20 kB of text. One thread: two would wait for each other here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("engine")
    before = os.environ.get(
        "GPTLIB_RUNS"
    )  # child processes read it, so it is set for the session
    os.environ["GPTLIB_RUNS"] = str(home / "runs")
    words = random.Random(0)
    lines = [
        " ".join(
            words.choice(["sun", "moon", "star", "sea", "stone"]) for _ in range(9)
        )
        for _ in range(500)
    ]
    (home / "text.txt").write_text(" .\n".join(lines))
    Tokenizer.from_merges(train_bpe(lines, 300), "small").save(home / "tokenizer.json")
    yield TrainConfig(
        model=dataclasses.replace(SHAPE, dropout=0.1),
        corpus=str(home / "text.txt"),
        tokenizer=str(home / "tokenizer.json"),
        steps=40,
        batch_size=8,
        learning_rate=3e-3,
        final_learning_rate=3e-4,
        warmup_fraction=0.1,
        decay_fraction=1.0,
        eval_interval=10,
        eval_sequences=10,
    )
    torch.set_num_threads(threads)
    os.environ.pop("GPTLIB_RUNS")
    if before is not None:
        os.environ["GPTLIB_RUNS"] = before


def without_dropout(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, model=SHAPE, **changes)


def options(out: Path, **changes) -> RunOptions:
    defaults = {
        "device": "cpu",
        "precision": "fp32",
        "micro_batch_size": 4,
        "progress": False,
    }
    return RunOptions(out=out, **(defaults | changes))


def leg(
    config: TrainConfig,
    run_options: RunOptions,
    seconds_per_step: float = 0.0,
    file_limit: int | None = None,
):
    """What a child process does; ends as the command line would. What it says goes to OUT.log."""
    torch.set_num_threads(1)
    sys.stderr = run_options.out.with_suffix(".log").open("a", buffering=1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

    def loss_fn(model, x, y):
        time.sleep(seconds_per_step)
        return training.plain_loss(model, x, y)

    with training.errors_in_one_line():
        run_training(config, run_options, loss_fn=loss_fn)


def child(target, *arguments):
    """A process of its own that has torch imported already, so that twenty of them take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptlib.training", "torch._dynamo"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def said_by_children(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def rows(out: Path, key: str = "loss") -> list[dict]:
    return [row for row in read_rows(out / "metrics.jsonl") if key in row]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def wait_for_rows(process, out: Path, n: int) -> None:
    end = time.monotonic() + 60
    while process.is_alive() and len(rows(out)) < n:
        assert time.monotonic() < end, f"no {n} rows within a minute"
        time.sleep(0.005)


def wait_for_rows_of(process: subprocess.Popen, out: Path, n: int) -> None:
    end = time.monotonic() + 90
    while len(rows(out)) < n:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def last_state(out: Path) -> dict:
    return Checkpoints(out / "checkpoints").load_newest()[1]


def assert_same(a, b, where: str = "state") -> None:
    """Equality of nested states, tensors compared bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} is not {b}"


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes(), (
        "metrics.jsonl differs"
    )
    assert_same(last_state(a), last_state(b))


# Resuming is exact


@posix
@pytest.mark.slow
def test_twenty_kills_leave_no_trace(config, tmp_path):
    config = dataclasses.replace(config, steps=300)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = child(leg, config, options(straight, save_minutes=0))
    process.join(120)
    assert process.exitcode == 0
    moments = random.Random(1)
    for kill in range(20):
        began = len(rows(killed))
        process = child(leg, config, options(killed, save_minutes=0))
        if (
            kill % 4
        ):  # three in four while it trains, the others at any moment from the start on
            wait_for_rows(process, killed, began + moments.randint(1, 4))
            time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, (
        "the run was over before the last kill; give it more steps"
    )
    process = child(leg, config, options(killed, save_minutes=0))
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(straight, killed)
    assert not list(killed.rglob("*.tmp-*")), (
        "a kill left temporary files that nobody removed"
    )


FAST = {"optimizer": "muon", "zero_projections": True, "cooldown_fraction": 0.5}


@pytest.mark.parametrize("changes", [{}, FAST])
def test_resuming_with_dropout_is_exact(config, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    run_training(config, options(tmp_path / "straight"))
    for _ in range(3):
        run_training(config, options(tmp_path / "legs", max_steps=9))
    run_training(config, options(tmp_path / "legs"))
    assert_same_run(tmp_path / "straight", tmp_path / "legs")


@pytest.mark.slow
def test_resuming_with_compiled_parts_is_exact_with_the_same_compiler(
    config, tmp_path, capfd
):
    """In one process or, as here, with the compiled code thrown away and made anew between the legs."""
    if not speed.compiler_works("cpu"):
        pytest.skip("no working compiler for torch.compile here")
    loss = speed.FastLoss(chunked=True, compiled=True)
    run_training(config, options(tmp_path / "straight"), loss_fn=loss)
    for limit in (9, None):
        torch.compiler.reset()
        run_training(config, options(tmp_path / "legs", max_steps=limit), loss_fn=loss)
    assert_same_run(tmp_path / "straight", tmp_path / "legs")
    record = json.loads((tmp_path / "legs" / "run.json").read_text())
    assert record["machine"]["loss"] == "FastLoss(chunked=True, compiled=True)"
    plain = speed.FastLoss(chunked=True, compiled=False)
    run_training(config, options(tmp_path / "other", max_steps=2), loss_fn=loss)
    run_training(config, options(tmp_path / "other", max_steps=2), loss_fn=plain)
    assert "not bit for bit the same run" in capfd.readouterr().err


def test_resuming_with_a_scaler_is_exact(config, tmp_path, monkeypatch):
    """fp16 on the CPU, which the library refuses, for the sake of the scaler's state."""
    monkeypatch.setattr(
        training, "pick_precision", lambda *_: Precision("fp16", "a test", "cpu")
    )

    def scaler(self):
        return torch.amp.GradScaler(
            "cpu", init_scale=2.0**24, growth_interval=7, enabled=True
        )

    monkeypatch.setattr(Precision, "scaler", scaler)
    run_training(config, options(tmp_path / "straight"))
    for _ in range(3):
        run_training(config, options(tmp_path / "legs", max_steps=9))
    run_training(config, options(tmp_path / "legs"))
    assert_same_run(tmp_path / "straight", tmp_path / "legs")
    scales = [row["scale"] for row in rows(tmp_path / "legs")]
    assert len(set(scales)) > 2, "the scale should have moved"
    skipped = [row for row in rows(tmp_path / "legs") if row["grad_norm"] is None]
    assert last_state(tmp_path / "legs")["skipped"] == len(skipped), (
        "skipped steps are miscounted"
    )


def test_a_kill_in_the_first_moment_leaves_a_folder_that_can_be_used(config, tmp_path):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "killed"
    out.mkdir()
    (out / "lock").touch()
    (out / "run.json.tmp-123").write_text("{")
    Tokenizer.load(config.tokenizer).save(out / "tokenizer.json")
    run_training(config, options(out))
    assert_same_run(tmp_path / "straight", out)


def test_rows_spoiled_by_a_power_cut_are_written_again(config, tmp_path):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "cut"
    run_training(config, options(out, max_steps=13))
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 14, "loss": 3.0}\n' + b"\0" * 100 + b"\n\xff\xfe")
    run_training(config, options(out))
    assert_same_run(tmp_path / "straight", out)


# What may not change the numbers


def test_micro_batches_change_only_the_rounding(config, tmp_path):
    for size in (8, 4, 1):
        run_training(
            without_dropout(config, steps=15),
            options(tmp_path / str(size), micro_batch_size=size),
        )
    for size in ("4", "1"):
        assert losses(tmp_path / size) == pytest.approx(
            losses(tmp_path / "8"), abs=1e-5
        )


def test_a_micro_batch_that_does_not_divide_is_made_smaller(config, tmp_path):
    assert (
        training.fit_micro_batch(8, 5) == 4
        and training.fit_micro_batch(480, 12, 3) == 10
    )
    run_training(
        without_dropout(config, steps=3),
        options(tmp_path / "fives", micro_batch_size=5),
    )
    run_training(
        without_dropout(config, steps=3),
        options(tmp_path / "fours", micro_batch_size=4),
    )
    assert losses(tmp_path / "fives") == losses(tmp_path / "fours")
    with pytest.raises(RunError, match="batch_size 8 is not a multiple"):
        training.fit_micro_batch(8, 4, world_size=3)


def test_evaluating_saving_and_logging_change_no_step(config, tmp_path):
    run_training(config, options(tmp_path / "seldom"))
    often = dataclasses.replace(config, eval_interval=3, eval_sequences=5)
    run_training(
        often, options(tmp_path / "often", save_minutes=0, keep=1, progress=True)
    )
    assert losses(tmp_path / "seldom") == losses(tmp_path / "often")
    assert_same(
        last_state(tmp_path / "seldom")["model"],
        last_state(tmp_path / "often")["model"],
    )


def test_logged_loss_is_the_mean_of_the_step(config, tmp_path):
    """One micro-batch or eight: the first row's loss is that of the whole batch before the first update."""
    plain = without_dropout(config, steps=1)
    run = run_training(plain, options(tmp_path / "run", micro_batch_size=1))
    _, _, batches, _ = training.open_data(plain, progress=False)
    torch.manual_seed(plain.seed)
    model = training.GPT(plain.model)
    x, y = next(batches.micro_batches(0, 8))
    assert losses(tmp_path / "run") == pytest.approx([model(x, y)[1].item()], abs=1e-5)
    assert run.step == 1


# Stopping


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_leg_with_everything_saved(config, tmp_path, number):
    process = child(leg, config, options(tmp_path / "run"), 0.01)
    wait_for_rows(process, tmp_path / "run", 3)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    state = last_state(tmp_path / "run")
    assert (
        3 <= state["step"] < config.steps
        and state["step"] == rows(tmp_path / "run")[-1]["step"]
    )
    for out in ("run", "straight"):  # in a process with as many threads as the first
        process = child(leg, config, options(tmp_path / out))
        process.join(60)
        assert process.exitcode == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@posix
def test_a_second_signal_leaves_at_once(config, tmp_path):
    process = child(leg, config, options(tmp_path / "run", micro_batch_size=8), 0.3)
    wait_for_rows(process, tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == -signal.SIGTERM


@posix
def test_nobody_left_to_read_is_no_reason_to_lose_steps(config, tmp_path):
    """Ctrl-C in `... 2>&1 | tee log` ends tee as well: what is said then must not end the run unsaved."""

    program = tmp_path / "p"
    config = dataclasses.replace(config, steps=20_000, eval_interval=20_000)
    process = start(
        program, config, tmp_path / "run", 1, save_minutes=60, progress=True
    )
    wait_for_rows_of(process, tmp_path / "run", 3)
    process.stderr.close()  # from here on every write to it raises BrokenPipeError
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert (
        last_state(tmp_path / "run")["step"] == rows(tmp_path / "run")[-1]["step"] >= 3
    )


def test_running_out_of_memory_is_one_line_with_the_cure(config, tmp_path):
    for error in (
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ):

        def loss_fn(model, x, y, error=error):
            raise error

        with pytest.raises(SystemExit, match="halve --micro-batch-size"), one_line():
            run_training(config, options(tmp_path / "run"), loss_fn=loss_fn)
    with pytest.raises(RuntimeError, match="shapes"), one_line():
        raise RuntimeError("shapes do not fit")  # a mistake of ours keeps its traceback


def test_limits_end_a_leg(config, tmp_path):
    assert run_training(config, options(tmp_path / "steps", max_steps=5)).step == 5
    assert run_training(config, options(tmp_path / "steps", max_steps=5)).step == 10
    assert (
        run_training(config, options(tmp_path / "minutes", max_minutes=0.0)).step == 1
    )
    with pytest.raises(ValueError, match="max_steps is 0"):
        options(tmp_path, max_steps=0)


def test_a_finished_run_says_so(config, tmp_path, capfd):
    config = dataclasses.replace(config, steps=3)
    run_training(config, options(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_training(config, options(tmp_path / "run")).step == 3
    assert "is finished: 3 steps" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


# One folder, one run, one writer


@posix
def test_two_processes_cannot_write_one_folder(config, tmp_path):
    first = child(leg, config, options(tmp_path / "run"), 0.05)
    wait_for_rows(first, tmp_path / "run", 1)
    second = child(leg, config, options(tmp_path / "run"))
    second.join(60)
    assert second.exitcode == 1
    assert f"is being written by process {first.pid}" in said_by_children(
        tmp_path / "run"
    )
    first.kill()
    first.join()
    with RunLock(tmp_path / "run"):
        pass  # the lock died with its process


def test_another_configuration_is_refused(config, tmp_path):
    run_training(config, options(tmp_path / "run", max_steps=2))
    with pytest.raises(RunError, match=r"a run with learning_rate = 0\.003, not 0\.1"):
        run_training(
            dataclasses.replace(config, learning_rate=0.1), options(tmp_path / "run")
        )
    with pytest.raises(RunError, match=r"model\.dropout = 0\.1, not 0\.0"):
        run_training(without_dropout(config), options(tmp_path / "run"))


def test_other_data_under_the_same_name_are_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(config.corpus).read_text())
    config = dataclasses.replace(config, corpus=str(text))
    run_training(config, options(tmp_path / "run", max_steps=2))
    text.write_text(text.read_text() + "one more line\n" * 20)
    with pytest.raises(RunError, match="another data under the same name"):
        run_training(config, options(tmp_path / "run"))


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        run_training(config, options(tmp_path))


def test_a_changed_machine_is_announced(config, tmp_path, capfd):
    run_training(config, options(tmp_path / "run", max_steps=2))
    run_training(config, options(tmp_path / "run", max_steps=2, micro_batch_size=2))
    assert "micro_batch_size 4 -> 2" in capfd.readouterr().err


# Checkpoints


def save_until_killed(folder: Path, nth: int) -> None:
    """Save step 1, then die by SIGKILL just before the nth fsync or rename of step 2."""
    saved = Checkpoints(folder, keep=2)
    saved.save(1, {"step": 1, "weight": torch.ones(1000)}, best=1)
    events = iter(range(1, 100))

    def armed(real):
        def call(*arguments):
            if next(events) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    os.fsync, os.replace = armed(os.fsync), armed(os.replace)
    saved.save(2, {"step": 2, "weight": torch.full((1000,), 2.0)}, best=2)


@posix
@pytest.mark.parametrize("nth", range(1, 11))
def test_kill_at_every_stage_of_a_save(tmp_path, nth):
    """Three files, each with fsync, rename, fsync of the folder: nine stages; the tenth is no kill."""
    process = child(save_until_killed, tmp_path, nth)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if nth <= 9 else 0)
    said = []
    step, state = Checkpoints(tmp_path, say=said.append).load_newest()
    assert step == state["step"] == (1 if nth <= 5 else 2) and not said
    assert (state["weight"] == step).all()
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(3, state, best=3)
    assert saved.load_newest()[0] == saved.best() == 3


def half_written(state, file) -> None:
    file.write(b"half of it")
    raise RuntimeError("unexpected pos 64 vs 0")


STAGES = [
    ("os.fsync", n, n >= 4) for n in range(1, 7)
]  # data, its folder, hash, folder, best, folder
STAGES += [("os.replace", n, n >= 3) for n in range(1, 4)] + [("torch.save", 1, False)]


@pytest.mark.parametrize(("stage", "nth", "whole"), STAGES)
def test_failure_at_every_stage_of_a_save(tmp_path, monkeypatch, stage, nth, whole):
    """whole: data and hash were in place when it failed, so that step 2 may count."""
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, {"step": 1}, best=1)
    calls, real = (
        iter(range(1, 100)),
        getattr(eval(stage.partition(".")[0]), stage.partition(".")[2]),
    )

    def failing(*arguments):
        if next(calls) != nth:
            return real(*arguments)
        if stage == "torch.save":
            half_written(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(stage, failing)
        expected = r"step 2 could not be saved .* the checkpoints before it are whole"
        with pytest.raises(CheckpointError, match=expected):
            saved.save(2, {"step": 2}, best=2)
    step, state = saved.load_newest()
    assert step == state["step"] == (2 if whole else 1)
    assert not list(tmp_path.glob("*.tmp-*")), "a failed write left its temporary file"
    saved.save(3, {"step": 3}, best=3)
    assert saved.load_newest()[0] == saved.best() == 3


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(
        {"flipped": data, "truncated": data[: len(data) // 2], "empty": b""}[how]
    )


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    config, tmp_path, how, capfd
):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=13))
    run_training(config, options(out, max_steps=2))
    damage(out / "checkpoints" / "step-00000015.pt", how)
    run_training(config, options(out))
    assert (
        "step-00000015.pt: damaged" in (said := capfd.readouterr().err)
        and "from step 13" in said
    )
    assert_same_run(tmp_path / "straight", out)


def test_a_damaged_hash_falls_back_too(tmp_path):
    said = []
    saved = Checkpoints(tmp_path, say=said.append)
    saved.save(1, {"step": 1})
    saved.save(2, {"step": 2})
    saved.hash_path(2).write_bytes(b"\xff\xfe")
    assert saved.load_newest()[0] == 1 and "missing or empty" in said[0]


def test_when_all_are_damaged_nothing_is_trained(config, tmp_path):
    run_training(config, options(tmp_path / "run", max_steps=2))
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        damage(path, "truncated")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        run_training(config, options(tmp_path / "run"))


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(tmp_path):
    saved = Checkpoints(tmp_path, keep=2, say=lambda text: None)
    for step in (80, 90, 100):
        saved.keep = 3
        saved.save(step, {"step": step})
    damage(saved.path(90), "flipped")
    damage(saved.path(100), "flipped")
    saved.keep = 2
    assert saved.load_newest()[0] == 80
    for step in (81, 82, 83):
        saved.save(step, {"step": step})
        assert saved.load_newest()[0] == step
    assert saved.steps() == [82, 83]


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=2, say=lambda text: None)
    for step in (80, 90):
        saved.save(step, {"step": step})
    damage(saved.path(90), "flipped")
    assert saved.load_newest()[0] == 80
    saved.save(100, {"step": 100})
    damage(saved.path(100), "flipped")
    assert saved.load_newest()[0] == 80, "the damaged 90 pushed out the whole 80"


@pytest.mark.parametrize("how", ["flipped", "empty"])
def test_a_damaged_best_checkpoint_gives_way_to_the_newest(
    config, tmp_path, how, capfd
):
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=12))
    saved = Checkpoints(out / "checkpoints")
    saved.save(13, last_state(out) | {"step": 13}, best=10)
    damage(saved.path(10), how)
    assert training.load_run(out).step == 13
    assert "it was the best one, taking the newest" in capfd.readouterr().err
    (out / "checkpoints" / "best").write_text("")
    assert training.load_run(out).step == 13


def test_the_last_and_the_best_are_kept(config, tmp_path):
    run_training(config, options(tmp_path / "run", save_minutes=0, keep=3))
    saved = Checkpoints(tmp_path / "run" / "checkpoints")
    best = min(
        rows(tmp_path / "run", "validation_loss"),
        key=lambda row: row["validation_loss"],
    )["step"]
    assert saved.best() == best and set(saved.steps()) == {38, 39, 40, best}
    assert training.load_run(tmp_path / "run").step == best


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused(config, tmp_path, capfd):
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=2))
    saved, proof = Checkpoints(out / "checkpoints"), tmp_path / "it-ran"
    buffer = io.BytesIO()
    torch.save(last_state(out) | {"model": Malicious(proof)}, buffer)
    saved.path(3).write_bytes(buffer.getvalue())
    saved.hash_path(3).write_text(hashlib.sha256(buffer.getvalue()).hexdigest())
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt: refused"):
        saved.load(3)
    run_training(config, options(out))  # passes over it
    assert "refused" in capfd.readouterr().err and not proof.exists()


@posix
def test_a_full_disk_ends_the_run_with_the_older_checkpoint_whole(config, tmp_path):
    """The kernel refuses to write past 20 kB of a file, as a full disk would refuse."""
    out = tmp_path / "run"
    for name in ("run", "straight"):
        process = child(
            leg,
            config,
            options(tmp_path / name, max_steps=7 if name == "run" else None),
        )
        process.join(60)
    process = child(leg, config, options(out), 0.0, 20_000)
    process.join(60)
    said = said_by_children(out)
    assert (
        process.exitcode == 1
        and "could not be saved" in said
        and "Traceback" not in said
    )
    assert last_state(out)["step"] == 7 and not list(out.rglob("*.tmp-*"))
    process = child(leg, config, options(out))
    process.join(60)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "straight", out)


def test_a_full_disk_between_checkpoints_is_named_with_the_cure(config, tmp_path):
    """Rows are written at every step, so they are what meets a full disk first."""
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=2))
    process = child(leg, config, options(out, save_minutes=60), 0.0, 700)
    process.join(60)
    said = said_by_children(out)
    assert process.exitcode == 1 and "Traceback" not in said
    assert "s.jsonl cannot be written (File too large)" in said and "make room" in said
    run_training(config, options(out))
    run_training(config, options(tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", out)


# Numbers that go wrong


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    calls = iter(range(10_000))

    def poisoned(model, x, y):
        loss = training.plain_loss(model, x, y)
        return (
            loss * math.inf if model.training and next(calls) == 11 else loss
        )  # step 6: two parts a step

    with pytest.raises(NonFiniteError) as caught:
        run_training(
            config, options(tmp_path / "run", save_minutes=0), loss_fn=poisoned
        )
    _, _, batches, _ = training.open_data(config, progress=False)
    assert "step 6: loss inf" in str(
        caught.value
    ) and f"tokens {batches.offsets(5)[0]}," in str(caught.value)
    assert last_state(tmp_path / "run")["step"] == 5
    run_training(config, options(tmp_path / "run"))
    run_training(config, options(tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_skipped_fp16_steps_are_counted_and_limited(config):
    _, _, batches, _ = training.open_data(config, progress=False)
    model = training.GPT(config.model)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = training.TrainState(model, training.optimizer_of(model, config), scaler)
    for _ in range(training.MAX_SKIPPED_IN_A_ROW):
        row = {"loss": 2.0, "grad_norm": math.inf}
        training.check_finite(state, row, batches)
        assert row["grad_norm"] is None and json.dumps(row)
    training.check_finite(state, {"loss": 2.0, "grad_norm": 1.0}, batches)
    assert (
        state.skipped_in_a_row == 0 and state.skipped == training.MAX_SKIPPED_IN_A_ROW
    )
    with pytest.raises(NonFiniteError, match="21 steps skipped in a row"):
        for _ in range(training.MAX_SKIPPED_IN_A_ROW + 1):
            training.check_finite(state, {"loss": 2.0, "grad_norm": math.nan}, batches)
    with pytest.raises(NonFiniteError, match="loss nan"):
        training.check_finite(state, {"loss": math.nan, "grad_norm": math.nan}, batches)


# Several processes

PROGRAM = """
import json, os, signal, sys
from pathlib import Path

import torch

from gptlib import training

torch.set_num_threads(1)
config = training.TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
options = training.RunOptions(out=Path(sys.argv[2]), **json.loads(sys.argv[3]))
dies_at, calls = int(sys.argv[4]), 0


def loss_fn(model, x, y):
    global calls
    calls += model.training
    if dies_at and calls == dies_at and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return training.plain_loss(model, x, y)


# count the exchanges of gradients: the last bucket of each comes by once
wrap, exchanges = training.World.wrap, []


def counting(world, module):
    module = wrap(world, module)

    def hook(state, bucket):
        exchanges.append(bucket.is_last())
        work = torch.distributed.all_reduce(bucket.buffer().div_(world.size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    if world.size > 1:
        module.register_comm_hook(None, hook)
    return module


training.World.wrap = counting
with training.errors_in_one_line():
    training.run_training(config, options, loss_fn=loss_fn)
if os.environ.get("RANK") == "0":
    Path("exchanges").write_text(str(sum(exchanges)))
"""


def start(
    folder: Path, config: TrainConfig, out: Path, n: int, *, dies_at: int = 0, **changes
) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    given = json.dumps(
        {"device": "cpu", "precision": "fp32", "micro_batch_size": 2, "progress": False}
        | changes
    )
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        if n > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        "program.py",
        "config.json",
        str(out),
        given,
        str(dies_at),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said[-3000:]
    return said


@posix
@pytest.mark.slow
def test_two_processes_equal_one_and_resume_as_one(config, tmp_path):
    config = without_dropout(config, steps=20)
    finish(start(tmp_path / "p", config, tmp_path / "one", 1))
    finish(start(tmp_path / "p", config, tmp_path / "two", 2))
    assert int((tmp_path / "p" / "exchanges").read_text()) == 20, (
        "one exchange of gradients a step"
    )
    finish(start(tmp_path / "p", config, tmp_path / "both", 2, max_steps=10))
    assert last_state(tmp_path / "both")["step"] == 10
    said = finish(start(tmp_path / "p", config, tmp_path / "both", 1))
    assert "processes 2 -> 1" in said
    one = last_state(tmp_path / "one")["model"]
    for name in ("two", "both"):
        assert losses(tmp_path / name) == pytest.approx(
            losses(tmp_path / "one"), abs=1e-5
        )
        for key, weight in last_state(tmp_path / name)["model"].items():
            assert torch.allclose(weight, one[key], atol=1e-5), key


@posix
@pytest.mark.slow
def test_a_worker_that_dies_stops_the_others(config, tmp_path):
    process = start(
        tmp_path / "p", config, tmp_path / "run", 2, dies_at=13, save_minutes=0
    )
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "SIGKILL" in said
    step = last_state(tmp_path / "run")["step"]
    assert step in (5, 6), (
        "two micro-batches a step and process: the seventh step was under way"
    )
    finish(start(tmp_path / "p", config, tmp_path / "run", 2))
    assert last_state(tmp_path / "run")["step"] == config.steps


@posix
@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_stops_all(config, tmp_path):
    config = dataclasses.replace(config, steps=20_000, eval_interval=20_000)
    process = start(tmp_path / "p", config, tmp_path / "run", 2, save_minutes=60)
    wait_for_rows_of(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    state = last_state(tmp_path / "run")
    assert state["step"] == rows(tmp_path / "run")[-1]["step"], said[-2000:]
    assert f"stopped at step {state['step']} of 20000" in said


# Watching by others


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_dashboard_changes_no_step_and_survives_a_second_leg(
    config, tmp_path, name, monkeypatch
):
    pytest.importorskip(name, reason=f"{name} is not installed; it is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(config, steps=10)
    run_training(config, options(tmp_path / "none"))
    run_training(config, options(tmp_path / "run", log=name, max_steps=6))
    identity = tmp_path / "run" / "wandb-id"
    before = identity.read_text() if name == "wandb" else None
    run_training(config, options(tmp_path / "run", log=name))
    assert_same_run(tmp_path / "none", tmp_path / "run")
    assert any((tmp_path / "run" / name).rglob("*"))
    assert name != "wandb" or identity.read_text() == before, (
        "the legs are two runs there"
    )
