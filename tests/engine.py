"""What the tests of the engine share: a small run, child processes, comparison of runs.

Everything runs offline on a small text with a tokenizer of its own. "Equal" means equal
in every bit unless a tolerance is named.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptlib import training
from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import TrainConfig
from gptlib.workshop import watching
from gptlib.workshop.checkpoints import Checkpoints
from gptlib.workshop.runs import RunOptions, run_training
from gptlib.workshop.watching import errors_in_one_line, read_rows


posix = pytest.mark.skipif(
    os.name != "posix", reason="needs POSIX signals and processes"
)
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=320)
WIKITEXT = "wikitext-sample:wikitext-103-raw-v1"
SMALL = GPTConfig(2, 2, 16, 16, False, 264)  # for the tokenizer BYTES
BYTES = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})


def randomise(model, std: float = 0.3):
    """The model, each parameter unlike its default and unlike the others."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def model_of(config: GPTConfig = SMALL, *, kind=GPT, seed: int = 0, std: float = 0.3):
    """A model with weights large enough to make a choice, in evaluation mode."""
    torch.manual_seed(seed)
    return randomise(kind(config), std).eval()


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A run of 40 steps with dropout, on 20 kB of text, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("engine")
    before = os.environ.get("GPTLIB_RUNS")  # child processes read it
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
    return dataclasses.replace(config, **{"model": SHAPE} | changes)


def options(out: Path, **changes) -> RunOptions:
    defaults = {"device": "cpu", "precision": "fp32", "micro_batch_size": 4}
    return RunOptions(out=out, **({"progress": False} | defaults | changes))


def count_events(at: int, action) -> None:
    """Call `action` before the at-th step of this process, of any of these kinds:
    a forward pass, a row written, data forced to the disk, a file renamed."""
    events = iter(range(1, 10**6))

    def armed(real):
        def call(*arguments, **keywords):
            if next(events) == at:
                action()
            return real(*arguments, **keywords)

        return call

    os.fsync, os.replace = armed(os.fsync), armed(os.replace)
    watching.RowWriter.write = armed(watching.RowWriter.write)
    training.WithLoss.forward = armed(training.WithLoss.forward)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leg(
    config: TrainConfig,
    run_options: RunOptions,
    *,
    kill_at: int = 0,
    signal_at: tuple[int, int] | None = None,
    file_limit: int | None = None,
    pause: float = 0.0,
) -> None:
    """What a child process does, as a command line would. It talks to OUT.log."""
    torch.set_num_threads(1)
    sys.stderr = run_options.out.with_suffix(".log").open("a", buffering=1)
    if file_limit:
        import resource

        limits = (file_limit, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if kill_at:
        count_events(kill_at, die)
    if signal_at:
        number, at = signal_at
        count_events(at, lambda: os.kill(os.getpid(), number))

    def loss_fn(model, x, y):
        time.sleep(pause)
        return training.plain_loss(model, x, y)

    with errors_in_one_line():
        run_training(config, run_options, loss_fn=loss_fn)


def child(target, *arguments, **keywords):
    """A process that has torch imported already, so that twenty take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptlib.workshop.runs", "torch._dynamo"])
    process = context.Process(target=target, args=arguments, kwargs=keywords)
    process.start()
    return process


def finished(process) -> int:
    process.join(120)
    return process.exitcode


def said_by_children(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def rows(out: Path, key: str = "loss") -> list[dict]:
    return [row for row in read_rows(out / "metrics.jsonl") if key in row]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


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
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (a, b)]
    assert metrics[0] == metrics[1], "metrics.jsonl differs"
    assert_same(last_state(a), last_state(b))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    kinds = {"flipped": data, "truncated": data[: len(data) // 2], "empty": b""}
    path.write_bytes(kinds[how])


PROGRAM = Path(__file__).with_name("engine_program.py")
ROOT = PROGRAM.parent.parent


def start(config: TrainConfig, out: Path, n: int = 1, *, program=None, **changes):
    """`engine_program.py` in a process of its own, or in n under torchrun."""
    given = {"device": "cpu", "precision": "fp32", "progress": False}
    given |= {"micro_batch_size": 2} | changes
    out.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(config)))
    launcher = []
    if n > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={n}"]
    command = [sys.executable, *launcher, str(PROGRAM), str(out.with_suffix(".json"))]
    command += [str(out), json.dumps(given), json.dumps(program or {})]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said[-3000:]
    return said
