"""Watching a run that lasts for days.

Tangled from book/workshop/W6_watching.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from gptlib.workshop.checkpoints import write_text


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file up to the first that cannot be read: a last line cut off by a kill is left out."""
    path = Path(path)
    return [row for row, _ in whole_lines(path)] if path.exists() else []


def whole_lines(path: Path) -> list[tuple[dict, str]]:
    """(row, its line) of a file's lines, up to the first that is not whole JSON."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            lines.append((json.loads(line), line))
        except json.JSONDecodeError:  # a power cut can leave blocks of zeros
            break
    return lines


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, as a resumed run will write them again."""
    path = Path(path)
    if path.exists():
        kept = [line for row, line in whole_lines(path) if row["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))


class RowWriter:
    """Appends rows to a JSONL file, one write a row, so that a reader never sees half of one for long."""

    def __init__(self, path: Path):
        self.file = Path(path).open("a", encoding="utf-8", newline="\n")

    def write(self, row: dict) -> None:
        """Raises OSError, with the cure, when the disk is full, for example."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(
                f"{self.file.name} cannot be written ({error.strerror}); the last checkpoint is whole: "
                "make room and run the same command again"
            ) from error

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # a row that could not be written has been reported
            self.file.close()


def plot_run(run: Path, ax=None, *, floor: float | None = None):
    """Training and validation loss of a run so far, drawn from its files. Returns the axes."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots()[1]
    rows = read_rows(Path(run) / "metrics.jsonl")
    steps = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    evals = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    if steps:
        ax.plot(
            *zip(*steps, strict=True),
            color="C0",
            alpha=0.6,
            linewidth=1,
            label="training",
        )
    if evals:
        ax.plot(
            *zip(*evals, strict=True),
            color="C1",
            marker="o",
            markersize=4,
            label="validation",
        )
    if floor is not None:
        ax.axhline(floor, color="C2", linestyle="--", label="entropy floor")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return ax


def status_line(run: Path) -> str:
    """One line on how far a run is."""
    plan = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["config"]
    rows, times = (
        read_rows(Path(run) / "metrics.jsonl"),
        read_rows(Path(run) / "timings.jsonl"),
    )
    times = [r for r in times if "tokens_per_second" in r]
    losses = [r for r in rows if "loss" in r]
    evals = [r for r in rows if "validation_loss" in r]
    parts = [f"step {losses[-1]['step'] if losses else 0:,} of {plan['steps']:,}"]
    if losses:
        parts.append(f"loss {losses[-1]['loss']:.3f}")
    if evals:
        parts.append(f"validation {evals[-1]['validation_loss']:.3f}")
    if times and losses:
        parts.append(f"{times[-1]['tokens_per_second']:,.0f} tokens/s")
        left = (plan["steps"] - losses[-1]["step"]) * times[-1]["seconds_per_step"]
        parts.append(f"{left / 3600:.1f} h left")
    return ", ".join(parts)


def watch(run: Path, *, every: float = 10.0, rounds: int | None = None) -> None:
    """Redraw the curves in a notebook, or print the status line in a terminal, while another process trains.

    every: seconds between looks; rounds: how many looks (None: until interrupted). It only reads.
    """
    if not (Path(run) / "run.json").exists():
        raise FileNotFoundError(
            f"{run}: no run.json there; give the --out folder of a run"
        )
    try:
        from IPython import display, get_ipython

        in_notebook = (
            get_ipython() is not None and "IPKernelApp" in get_ipython().config
        )
    except ImportError:
        in_notebook = False
    look = 0
    while rounds is None or look < rounds:
        if look:
            time.sleep(every)
        look += 1
        print(status_line(run), flush=True)
        if in_notebook:
            import matplotlib.pyplot as plt

            plot_run(run)
            display.clear_output(wait=True)
            plt.show()


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
            write_text(own, os.urandom(8).hex())
        options = {"id": own.read_text(), "name": Path(run).name, "resume": "allow"}
        self.run = wandb.init(project="gptlib", dir=str(run), config=config, **options)

    def log(self, row: dict, step: int) -> None:
        self.run.log(
            {key: value for key, value in row.items() if key != "step"}, step=step
        )

    def close(self) -> None:
        self.run.finish()


LOGGERS = {
    "none": lambda run, config, step: NoLogger(),
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def make_logger(name: str, run: Path, config: dict, step: int = 0):
    """A logger by name, for a leg that begins after `step`. Raises ValueError for an unknown name, ImportError naming what to install."""
    if name not in LOGGERS:
        raise ValueError(f"unknown logger {name!r}; there are {', '.join(LOGGERS)}")
    try:
        return LOGGERS[name](run, config, step)
    except ImportError:
        raise ImportError(
            f"--log {name} needs its package; install it with: pip install {name}"
        ) from None
