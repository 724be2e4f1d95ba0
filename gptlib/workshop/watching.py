"""Watching a run that lasts for days.

Tangled from book/workshop/W6_watching.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptlib import GptlibError
from gptlib.training import TrainConfig
from gptlib.workshop.files import FileError, write_whole


class WatchError(GptlibError):
    """A run that cannot be watched, or a logger that is not there."""


def whole_lines(path: Path) -> list[tuple[dict, str]]:
    """(row, its line) of a JSONL file, up to the first line that is not whole JSON."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            lines.append((json.loads(line), line))
        except json.JSONDecodeError:  # a power cut can leave blocks of zeros
            break
    return lines


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file, up to the first that is not whole."""
    path = Path(path)
    return [row for row, _ in whole_lines(path)] if path.exists() else []


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, as a resumed run will write them again."""
    path = Path(path)
    if path.exists():
        kept = [line for row, line in whole_lines(path) if row["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in kept))


class RowWriter:
    """Appends rows to a JSONL file, each with one write."""

    def __init__(self, path: Path):
        self.file = Path(path).open("a", encoding="utf-8", newline="\n")

    def write(self, row: dict) -> None:
        """Raises FileError when the disk is full, for example."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise FileError(
                f"{self.file.name} cannot be written ({error.strerror}); the last "
                "checkpoint is whole: make room and run the same command again"
            ) from error

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has been reported
            self.file.close()


def plot_run(run: Path, ax=None, *, floor: float | None = None):
    """Training and validation loss of a run so far. Returns the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    rows = read_rows(Path(run) / "metrics.jsonl")
    for key, name, style in (
        ("loss", "training", {"color": "C0", "alpha": 0.6, "linewidth": 1}),
        ("validation_loss", "validation", {"color": "C1", "marker": "o"}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            ax.plot(*zip(*points, strict=True), markersize=4, label=name, **style)
    if floor is not None:
        ax.axhline(floor, color="C2", linestyle="--", label="entropy floor")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def status_line(run: Path) -> str:
    """One line on how far a run is."""
    plan = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["config"]
    rows = read_rows(Path(run) / "metrics.jsonl")
    times = read_rows(Path(run) / "timings.jsonl")
    last = {key: value for row in rows + times for key, value in row.items()}
    step = max((row["step"] for row in rows if "loss" in row), default=0)
    parts = [f"step {step:,} of {plan['steps']:,}"]
    if "loss" in last:
        parts.append(f"loss {last['loss']:.3f}")
    if "validation_loss" in last:
        parts.append(f"validation {last['validation_loss']:.3f}")
    if "tokens_per_second" in last:
        left = (plan["steps"] - step) * last["seconds_per_step"]
        parts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{left / 3600:.1f} h left")
    return ", ".join(parts)


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None and "IPKernelApp" in get_ipython().config


def watch(run: Path, *, every: float = 10.0, rounds: int | None = None) -> None:
    """Follow a run that another process trains; it only reads.

    A terminal gets a line each time, a notebook the curves as well. Arguments as in
    `WatchOptions`.
    """
    if not (Path(run) / "run.json").exists():
        raise WatchError(f"{run}: no run.json there; give the --out folder of a run")
    if not 0 <= every < 1e6 or (rounds is not None and rounds < 1):
        raise WatchError(
            f"every is {every}, rounds is {rounds}; give seconds from 0 to a million, "
            "and at least 1 round"
        )
    look = 0
    while rounds is None or look < rounds:
        if look:
            time.sleep(every)
        look += 1
        if in_notebook():
            import matplotlib.pyplot as plt
            from IPython import display

            plot_run(run)
            display.clear_output(wait=True)  # before the line, which would go as well
            print(status_line(run), flush=True)
            plt.show()
        else:
            print(status_line(run), flush=True)


class NoLogger:
    """The logger that logs nowhere else."""

    def log(self, row: dict, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardLogger:
    """Rows as TensorBoard scalars in RUN/tensorboard."""

    def __init__(self, run: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", json.dumps(config, indent=1))

    def log(self, row: dict, step: int) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Rows to Weights & Biases; WANDB_MODE=offline keeps them in RUN/wandb."""

    def __init__(self, run: Path, config: dict, step: int):
        import wandb

        own = Path(run) / "wandb-id"  # the legs of a run are one run there too
        if not own.exists():
            write_whole(own, os.urandom(8).hex())
        options = {"id": own.read_text(), "name": Path(run).name, "resume": "allow"}
        self.run = wandb.init(project="gptlib", dir=str(run), config=config, **options)

    def log(self, row: dict, step: int) -> None:
        numbers = {key: value for key, value in row.items() if key != "step"}
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {
    "none": lambda run, config, step: NoLogger(),
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def make_logger(name: str, run: Path, config: dict, step: int = 0):
    """A logger by name, for a leg that begins after `step`. Raises WatchError."""
    if name not in LOGGERS:
        raise WatchError(f"unknown logger {name!r}; there are {', '.join(LOGGERS)}")
    try:
        return LOGGERS[name](run, config, step)
    except ImportError:
        raise WatchError(
            f"--log {name} needs its package; install it with: pip install {name}"
        ) from None


class Terminal:
    """Standard error, which nobody may be left to read: Ctrl-C ends `| tee log` too."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


def say(text: str) -> None:
    """A line to the terminal, if somebody reads it."""
    print(text, file=Terminal(), flush=True)


class StopRequest:
    """Makes the first SIGINT or SIGTERM a flag; a second one ends the process."""

    def __init__(self):
        self.signal: int | None = None
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        self.signal = number
        self.restore()
        with contextlib.suppress(OSError):  # a print may be interrupted by the signal
            os.write(2, b"\nstopping after this step; signal again to leave at once\n")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        self.restore()


class Journal:
    """What a leg writes besides checkpoints, and its progress bar.

    `metrics.jsonl` has what is exact, `timings.jsonl` what is measured. ideal_seconds:
    of a step at the device's peak, or None.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        step: int,
        *,
        log: str = "none",
        progress: bool = True,
        ideal_seconds: float | None = None,
    ):
        self.tokens, self.ideal_seconds = config.tokens_per_step, ideal_seconds
        self.metrics = RowWriter(run / "metrics.jsonl")
        self.timings = RowWriter(run / "timings.jsonl")
        self.logger = make_logger(log, run, dataclasses.asdict(config), step)
        self.bar = tqdm(
            total=config.steps,
            initial=step,
            disable=not progress,
            file=Terminal(),
            unit="step",
        )

    def step(self, row: dict, seconds: float, peak_bytes: int) -> None:
        rate = self.tokens / seconds
        timing = {"step": row["step"], "seconds_per_step": seconds}
        timing |= {"tokens_per_second": rate, "peak_bytes": peak_bytes}
        if self.ideal_seconds:
            timing["mfu"] = self.ideal_seconds / seconds
        self.metrics.write(row)
        self.timings.write(timing)
        self.logger.log(row | timing, row["step"])
        self.bar.update()
        text = f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)

    def evaluation(self, step: int, loss: float) -> None:
        row = {"step": step, "validation_loss": loss}
        self.metrics.write(row)
        self.logger.log(row, step)
        if not self.bar.disable:
            self.bar.write(f"step {step}: validation loss {loss:.4f}", file=Terminal())

    def saved(self, step: int, seconds: float) -> None:
        self.timings.write({"step": step, "save_seconds": seconds})

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        self.metrics.sync()
        self.timings.sync()

    def close(self) -> None:
        for thing in (self.metrics, self.timings, self.logger, self.bar):
            thing.close()


class Clock:
    """Tells a leg how long a step took, when to save and when to end."""

    def __init__(
        self, max_steps: int | None, max_minutes: float | None, save_minutes: float
    ):
        self.max_steps, self.save_minutes, self.steps = max_steps, save_minutes, 0
        self.max_minutes = math.inf if max_minutes is None else max_minutes
        self.began = self.last_step = self.last_save = time.perf_counter()

    def step(self) -> float:
        """Seconds since the last step ended."""
        seconds = time.perf_counter() - self.last_step
        self.steps += 1
        self.restart_step()
        return seconds

    def restart_step(self) -> None:
        """The next step is timed from here."""
        self.last_step = time.perf_counter()

    def saved(self) -> None:
        self.last_save = self.last_step = time.perf_counter()

    def save_is_due(self) -> bool:
        return time.perf_counter() - self.last_save >= 60 * self.save_minutes

    def leg_is_over(self) -> bool:
        late = time.perf_counter() - self.began >= 60 * self.max_minutes
        return late or self.steps == self.max_steps


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For command lines: what a user can mend ends the program with one line."""
    try:
        yield
    except GptlibError as error:
        sys.exit(f"gptlib: {error}")


def read_options(
    kind: Any,
    *,
    default: Any = None,
    required: Sequence[str] = (),
    **how,
) -> Any:
    """The command line as one of a dataclass, each field an option.

    default: one of the class, for what is not given; required: its fields that must be.
    how: as in `tyro.cli`. A wrong option ends the program, with a message.
    """
    import tyro  # here alone: a program that only imports gptlib does without it

    if default is not None:
        how["default"] = replace(default, **dict.fromkeys(required, tyro.MISSING))
    return tyro.cli(kind, **how)


@dataclass(frozen=True)
class WatchOptions:
    """Follow a run that another process trains; it only reads."""

    run: Path  # the --out folder of the run
    every: float = 10.0  # seconds between two looks
    rounds: int | None = None  # number of looks; None: until interrupted


def main() -> None:
    """`gptlib watch --run RUN`."""
    with errors_in_one_line(), contextlib.suppress(KeyboardInterrupt):
        watch(**vars(read_options(WatchOptions)))


if __name__ == "__main__":
    main()
