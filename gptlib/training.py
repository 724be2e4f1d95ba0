"""The training loop.

Tangled from book/chapters/09_training.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptlib.batches import Batches, TokenFile, load_tokens, to_device
from gptlib.corpus import cache_dir
from gptlib.gpt import GPT, GPTConfig
from gptlib.objective import Together, learning_rate, make_adamw, make_muon, trapezoid
from gptlib.tokenizer import Tokenizer, load_tokenizer
from gptlib.workshop.checkpoints import (
    CheckpointError,
    Checkpoints,
    RunLock,
    one_at_a_time,
    remove_leftovers,
    write_text,
)
from gptlib.workshop.devices import (
    PRECISIONS,
    Precision,
    describe_machine,
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
)
from gptlib.workshop.distribution import World, join_world, leave_world
from gptlib.workshop.watching import LOGGERS, RowWriter, cut_rows, make_logger, watch


class RunError(ValueError):
    """A run that cannot be started, resumed or read; the message names the cure."""


class NonFiniteError(RuntimeError):
    """The loss or its gradient is no longer a number; the message names the step and the crops."""


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the numbers of a run. The defaults are the report's run, on WikiText-103."""

    model: GPTConfig = field(default_factory=GPTConfig)
    corpus: str = "wikitext-103"
    tokenizer: str = "gpt2"
    seed: int = 1337
    steps: int = 3400  # sets the schedule; stopping early is --max-steps
    batch_size: int = 480  # sequences per step
    learning_rate: float = 6e-4  # the peak
    final_learning_rate: float = 6e-5
    warmup_fraction: float = 800 / 3400  # of steps
    decay_fraction: float = (
        6000 / 3400
    )  # of steps; more than 1: stopped on the way down
    cooldown_fraction: float | None = (
        None  # of steps; if given, a trapezoid instead of the cosine
    )
    optimizer: str = "adamw"  # or muon
    zero_projections: bool = False  # begin with blocks that add nothing
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_interval: int = 100  # steps
    eval_sequences: int = 240  # crops of the validation split, the same each time

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        shape = {"peak": self.learning_rate, "final": self.final_learning_rate}
        shape["warmup_steps"] = round(self.warmup_fraction * self.steps)
        if self.cooldown_fraction is not None:
            cooldown = round(self.cooldown_fraction * self.steps)
            return trapezoid(step, steps=self.steps, cooldown_steps=cooldown, **shape)
        return learning_rate(
            step, decay_steps=max(1, round(self.decay_fraction * self.steps)), **shape
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.block_size

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """The inverse of `dataclasses.asdict`; what an older version did not know gets its default."""
        return cls(**{**values, "model": GPTConfig(**values["model"])})

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_interval", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}; there are adamw, muon"
            )
        if self.cooldown_fraction is not None and not 0 < self.cooldown_fraction <= 1:
            raise ValueError(
                f"cooldown_fraction is {self.cooldown_fraction}; it must be in (0, 1]"
            )


PRESETS = {
    "demo": TrainConfig(
        model=GPTConfig(
            n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=2048
        ),
        corpus="tinywiki",
        tokenizer="bpe-2048",
        steps=900,
        batch_size=8,
        learning_rate=3e-3,
        final_learning_rate=3e-4,
        warmup_fraction=0.1,
        decay_fraction=1.0,
        eval_interval=150,
        eval_sequences=64,
    ),
    "tinytiny": TrainConfig(),  # Table 1 of the report and its code's schedule
    "tinytiny-fast": TrainConfig(
        steps=1700,
        optimizer="muon",
        learning_rate=3e-3,
        final_learning_rate=0.0,
        warmup_fraction=0.05,
        cooldown_fraction=0.5,
        zero_projections=True,
    ),
    "gpt2": TrainConfig(
        model=GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024),
        steps=20_000,
        warmup_fraction=0.035,
        decay_fraction=1.0,
    ),
}


@dataclass(frozen=True)
class RunOptions:
    """How and where a run is carried out; none of this is meant to change its numbers."""

    out: Path  # folder of the run
    device: str = "auto"
    precision: str = "auto"
    micro_batch_size: int = 12  # most sequences per forward pass; bounds the memory
    max_steps: int | None = None  # stop this leg after so many steps
    max_minutes: float | None = None  # stop this leg after so many minutes
    save_minutes: float = (
        10.0  # between checkpoints; one is also saved at every evaluation
    )
    keep: int = 2  # checkpoints kept besides the best
    log: str = "none"  # or tensorboard, wandb
    deterministic: bool = False  # deterministic CUDA kernels; the CPU's are anyway
    progress: bool = True

    def __post_init__(self):
        for name in ("micro_batch_size", "max_steps", "keep"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, known in (("log", LOGGERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; there are {', '.join(known)}"
                )


def fit_micro_batch(batch_size: int, limit: int, world_size: int = 1) -> int:
    """The largest micro-batch up to `limit` that divides a process's share of the batch evenly.

    Raises RunError if the processes cannot share the batch evenly.
    """
    share = check_division(batch_size, 1, world_size)
    return max(size for size in range(1, min(limit, share) + 1) if share % size == 0)


def check_division(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per process and step. Raises RunError if the batch does not divide evenly."""
    n_micro, rest = divmod(batch_size, micro_batch_size * world_size)
    if rest or not n_micro:
        raise RunError(
            f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} times "
            f"{world_size} process(es); choose a batch_size or a micro_batch_size that divides evenly"
        )
    return n_micro


@dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    model: GPT
    optimizer: torch.optim.Optimizer | Together
    scaler: torch.amp.GradScaler
    step: int = 0  # steps done; also the position in the data
    best: float = math.inf  # lowest validation loss so far
    best_step: int = 0
    skipped: int = 0  # fp16 steps skipped because a gradient overflowed
    skipped_in_a_row: int = 0

    COUNTERS = ("step", "best", "best_step", "skipped", "skipped_in_a_row")

    def state_dict(self) -> dict:
        state = {
            name: getattr(self, name).state_dict()
            for name in ("model", "optimizer", "scaler")
        }
        return state | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty when the run was not fp16
            self.scaler.load_state_dict(state["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])


def seed_dropout(config: TrainConfig, step: int, micro_batch: int, rank: int) -> None:
    """Make dropout a function of where we are, so that a resumed run drops what the first one would have."""
    if config.model.dropout:
        key = f"{config.seed} {step} {micro_batch} {rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))


class WithLoss(nn.Module):
    """A model and its loss function as one module, so that whatever wraps it sees the whole computation."""

    def __init__(self, model: GPT, loss_fn: Callable[[GPT, Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.loss_fn(self.model, tokens, targets)


def plain_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, from all logits at once."""
    return model(tokens, targets)[1]


def fresh_model(config: TrainConfig) -> GPT:
    """The model of a run before its first step, a function of the configuration alone."""
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if (
        config.zero_projections
    ):  # then every block is the identity at first; Zhang et al. 2019
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(p)
    return model


def optimizer_of(model: GPT, config: TrainConfig) -> torch.optim.Optimizer | Together:
    """The optimiser that a configuration asks for; `train` gives it its rate before every step."""
    make = {"adamw": make_adamw, "muon": make_muon}[config.optimizer]
    return make(
        model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
    )


MAX_SKIPPED_IN_A_ROW = 20


def check_finite(state: TrainState, row: dict, batches: Batches) -> None:
    """Stop a run whose numbers went wrong, before the optimiser spreads them to the weights.

    In fp16 an infinite gradient is counted and passed on, since the scaler skips its step; the row then
    has None for its norm. Raises NonFiniteError for anything else, and for more than
    MAX_SKIPPED_IN_A_ROW such steps in a row.
    """
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        state.skipped_in_a_row = 0
        return
    where = (
        f"step {state.step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}"
    )
    if state.scaler.is_enabled() and math.isfinite(row["loss"]):
        state.skipped += 1
        state.skipped_in_a_row += 1
        row["grad_norm"] = None  # JSON has no infinity
        if state.skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return
        where += f"; {state.skipped_in_a_row} steps skipped in a row"
    offsets = ", ".join(str(o) for o in batches.offsets(state.step)[:8])
    raise NonFiniteError(
        f"{where}; the crops begin at tokens {offsets}, ...; the last checkpoint is whole: "
        "with another --out, lower the learning rate or use --precision fp32"
    )


def train(
    state: TrainState,
    module: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    precision: Precision,
    micro_batch_size: int,
    on_step: Callable[[dict], bool],
    world: World = World(),  # noqa: B008 (frozen)
) -> None:
    """Train until `config.steps`, or until `on_step(row)` returns True. `module` gives the loss of (tokens, targets)."""
    n_micro = check_division(config.batch_size, micro_batch_size, world.size)
    device, parameters = state.model.device, list(state.model.parameters())
    state.model.train()
    stop = False
    while state.step < config.steps and not stop:
        rate = config.rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=device)
        micro_batches = batches.micro_batches(
            state.step, micro_batch_size, world.rank, world.size
        )
        for i, (x, y) in enumerate(to_device(micro_batches, device)):
            seed_dropout(config, state.step, i, world.rank)
            with world.accumulate(module, last=i == n_micro - 1):
                with precision.autocast():
                    part = (
                        module(x, y) / n_micro
                    )  # mean over the step, not over the micro-batch
                state.scaler.scale(part).backward()
            loss += part.detach()
        state.scaler.unscale_(state.optimizer)  # the clip must see true gradients
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        row = {
            "loss": world.mean(loss).item(),
            "grad_norm": norm.item(),
            "learning_rate": rate,
        }
        row["scale"] = state.scaler.get_scale()
        if state.scaler.is_enabled():
            row["skipped"] = state.skipped
        check_finite(state, row, batches)
        state.scaler.step(
            state.optimizer
        )  # skipped by itself if a gradient is not finite
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        stop = on_step({"step": state.step} | row)


EVAL_STEP = 2**63  # a key that no training step has


@torch.no_grad()
def validation_loss(
    module: nn.Module, batches: Batches, precision: Precision, micro_batch_size: int
) -> float:
    """Mean loss over one fixed set of crops, `batches.batch_size` of them. Draws from no training stream."""
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    total = torch.zeros((), device=device)
    for x, y in to_device(batches.micro_batches(EVAL_STEP, micro_batch_size), device):
        with precision.autocast():
            total += module(x, y) * len(x)
    module.train(was_training)
    return (total / batches.batch_size).item()


class Terminal:
    """Standard error, which nobody may be left to read: Ctrl-C ends a `| tee log` too."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one ends the process as usual."""

    def __init__(self):
        self.signal: int | None = None
        self.before: dict = {}

    def __enter__(self) -> "StopRequest":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # other threads hear no signals
            self.before = {
                s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def note(self, number, frame) -> None:
        self.signal = number
        self.restore()
        with contextlib.suppress(
            OSError
        ):  # os.write, since a signal may come in the middle of a print
            os.write(2, b"\nstopping after this step; signal again to leave at once\n")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        self.restore()


def open_run(
    config: TrainConfig, out: Path, tokenizer: Tokenizer, tokens: TokenFile, found: dict
) -> dict:
    """Write `run.json` and `tokenizer.json` for a new run, or check those of an old one. Returns the record.

    Raises RunError if the folder holds a run of another configuration, tokenizer or data.
    """
    path = Path(out) / "run.json"
    new = {
        "config": dataclasses.asdict(config),
        "machine": found,
        "tokenizer_hash": tokenizer.hash,
        "data": {
            split: record["sha256"]
            for split, record in tokens.manifest["splits"].items()
        },
    }
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        compare_records(old, new, Path(out))
        return old
    first_moment = (
        "lock",
        "tokenizer.json",
        ".tokenizer.json",
        "run.json.tmp-",
    )  # all that a kill can leave
    if Path(out).exists() and not all(
        p.name.startswith(first_moment) for p in Path(out).iterdir()
    ):
        raise RunError(f"{out} is not empty and holds no run; choose another --out")
    tokenizer.save(Path(out) / "tokenizer.json")
    write_text(
        path, json.dumps(new, indent=1) + "\n"
    )  # last: where it is, the folder is a run
    return new


def compare_records(old: dict, new: dict, out: Path) -> None:
    """Raises RunError if two `run.json` are of different runs; says so if only the machine differs."""
    before = flat(dataclasses.asdict(TrainConfig.from_dict(old["config"])))
    now = flat(new["config"])
    for key in now:
        if before.get(key) != now[key]:
            raise RunError(
                f"{out} holds a run with {key} = {before.get(key)}, not {now[key]}; choose another --out or delete it"
            )
    for key, what in (("tokenizer_hash", "tokenizer"), ("data", "data")):
        if old[key] != new[key]:
            raise RunError(
                f"{out} was trained with another {what} under the same name; choose another --out"
            )
    was, found = old["machine"], new["machine"]
    changed = [
        f"{key} {was.get(key)} -> {value}"
        for key, value in found.items()
        if was.get(key) != value
    ]
    if changed:
        print(
            f"resuming on a changed machine ({'; '.join(changed)}): not bit for bit the same run",
            file=sys.stderr,
        )


def flat(values: dict, prefix: str = "") -> dict:
    """A nested dictionary with dotted keys."""
    items = {}
    for key, value in values.items():
        items |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {prefix + key: value}
        )
    return items


def settle_precision(out: Path, name: str, device: torch.device) -> Precision:
    """The run's own precision if it has begun, so that a second measurement cannot change its numbers."""
    path = out / "run.json"
    if name == "auto" and path.exists():
        name = json.loads(path.read_text(encoding="utf-8"))["machine"].get(
            "precision", name
        )
    return pick_precision(device, name)


def open_data(
    config: TrainConfig, *, progress: bool
) -> tuple[Tokenizer, TokenFile, Batches, Batches]:
    """Tokenizer, tokens, training batches and evaluation batches of a configuration."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.n_vocab > config.model.vocab_size:
        raise RunError(
            f"the tokenizer has {tokenizer.n_vocab} ids, the model room for {config.model.vocab_size}; raise vocab_size"
        )
    tokens = load_tokens(config.corpus, tokenizer, progress=progress)
    held_out = "validation" if "validation" in tokens.manifest["splits"] else "train"
    block, seed = config.model.block_size, config.seed
    train = Batches(tokens.split("train").ids, config.batch_size, block, seed)
    return (
        tokenizer,
        tokens,
        train,
        Batches(tokens.split(held_out).ids, config.eval_sequences, block, seed),
    )


def name_of(loss_fn: Callable) -> str:
    """What `run.json` says of a loss: a function's name, or what an object that is called says of itself."""
    return getattr(loss_fn, "__name__", None) or str(loss_fn)


class Opened:
    """A run that is opened and brought to where it stands: what a leg works with."""

    def __init__(
        self,
        config: TrainConfig,
        options: RunOptions,
        world: World,
        device: torch.device,
    ):
        self.config, self.options, self.world, self.device = (
            config,
            options,
            world,
            device,
        )
        self.out = Path(options.out)
        self.micro_batch_size = fit_micro_batch(
            config.batch_size, options.micro_batch_size, world.size
        )
        self.tokenizer, self.tokens, self.batches, self.eval_batches = open_data(
            config, progress=options.progress and world.is_main
        )
        self.precision = settle_precision(self.out, options.precision, device)
        self.checkpoints = Checkpoints(
            self.out / "checkpoints", options.keep, say=self.say
        )

    def take_up(self, loss_fn: Callable) -> None:
        """Build the state, and load the newest whole checkpoint into it if there is one."""
        if self.world.is_main:
            machine = describe_machine(self.device) | {
                "precision": self.precision.name,
                "processes": self.world.size,
            }
            machine |= {
                "micro_batch_size": self.micro_batch_size,
                "loss": name_of(loss_fn),
            }
            open_run(self.config, self.out, self.tokenizer, self.tokens, machine)
            remove_leftovers(self.out)
            self.world.wait()
        model = fresh_model(self.config).to(self.device)
        self.state = TrainState(
            model, optimizer_of(model, self.config), self.precision.scaler()
        )
        self.module = WithLoss(model, loss_fn)
        newest = self.checkpoints.load_newest()
        if newest:
            self.state.load_state_dict(newest[1])
        if self.world.is_main:
            for name in (
                "metrics.jsonl",
                "timings.jsonl",
            ):  # what was written after the checkpoint is done again
                cut_rows(self.out / name, self.state.step if newest else -1)

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=Terminal(), flush=True)


class Leg(Opened):
    """One stretch of a run, from where it stands to its end, a limit or a signal."""

    def run(self) -> None:
        config, options = self.config, self.options
        if self.state.step >= config.steps:
            return self.say(
                f"{self.out} is finished: {self.state.step} steps; nothing to do"
            )
        self.say(
            f"{self.device.type}, {self.precision.name} ({self.precision.reason}), from step {self.state.step}"
        )
        module, self.clock = self.world.wrap(self.module), Clock(options)
        with Journal(self) as self.journal, StopRequest() as self.request:
            if self.state.step == 0:
                self.evaluate()
            train(
                self.state, module, self.batches, config, precision=self.precision,
                micro_batch_size=self.micro_batch_size, on_step=self.after_step, world=self.world,
            )  # fmt: skip
        if self.state.step < config.steps:
            self.say(
                f"stopped at step {self.state.step} of {config.steps}, all of it saved; the same command goes on from here"
            )

    def after_step(self, row: dict) -> bool:
        """Write the row, evaluate and save when it is time; returns whether this leg ends here."""
        self.journal.step(row, self.clock.step())
        ends = self.state.step == self.config.steps
        if ends or self.state.step % self.config.eval_interval == 0:
            self.evaluate()
        stop = self.world.any(
            self.clock.leg_is_over() or self.request.signal is not None, self.device
        )
        if (
            ends
            or stop
            or self.state.step % self.config.eval_interval == 0
            or self.clock.save_is_due()
        ):
            self.save()
        return stop

    def evaluate(self) -> None:
        if self.world.is_main:
            loss = validation_loss(
                self.module, self.eval_batches, self.precision, self.micro_batch_size
            )
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"step {self.state.step}: validation loss {loss}; the last checkpoint is whole"
                )
            if loss < self.state.best:
                self.state.best, self.state.best_step = loss, self.state.step
            self.journal.evaluation({"step": self.state.step, "validation_loss": loss})
        self.clock.restart_step()

    def save(self) -> None:
        began = time.perf_counter()
        if self.world.is_main:
            self.journal.sync()  # rows reach the disk before the checkpoint that vouches for them
            self.checkpoints.save(
                self.state.step, self.state.state_dict(), best=self.state.best_step
            )
            self.journal.timings.write(
                {"step": self.state.step, "save_seconds": time.perf_counter() - began}
            )
        self.clock.saved()


class Clock:
    """Tells a leg how long a step took, when to save and when to end."""

    def __init__(self, options: RunOptions):
        self.options, self.steps = options, 0
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
        return time.perf_counter() - self.last_save >= 60 * self.options.save_minutes

    def leg_is_over(self) -> bool:
        steps, minutes = self.options.max_steps, self.options.max_minutes
        late = minutes is not None and time.perf_counter() - self.began >= 60 * minutes
        return late or (steps is not None and self.steps >= steps)


class Journal:
    """What a leg writes besides checkpoints: `metrics.jsonl` (exact), `timings.jsonl` (measured), the progress bar."""

    def __init__(self, leg: Leg):
        self.leg, self.active, self.progress = (
            leg,
            leg.world.is_main,
            leg.options.progress,
        )
        peak = peak_flops(
            leg.device, leg.precision.name
        )  # of one device, or None where it is not known
        flops = leg.state.model.flops_per_token() * leg.config.tokens_per_step
        self.ideal_seconds = flops / peak / leg.world.size if peak else None

    def __enter__(self) -> "Journal":
        if self.active:
            out, config = self.leg.out, self.leg.config
            self.metrics, self.timings = (
                RowWriter(out / "metrics.jsonl"),
                RowWriter(out / "timings.jsonl"),
            )
            self.logger = make_logger(
                self.leg.options.log,
                out,
                dataclasses.asdict(config),
                self.leg.state.step,
            )
            first, hidden = self.leg.state.step, not self.progress
            self.bar = tqdm(
                total=config.steps,
                initial=first,
                unit="step",
                disable=hidden,
                file=Terminal(),
            )
        return self

    def step(self, row: dict, seconds: float) -> None:
        if not self.active:
            return
        rate = self.leg.config.tokens_per_step / seconds
        timing = {
            "step": row["step"],
            "seconds_per_step": seconds,
            "tokens_per_second": rate,
        }
        if self.ideal_seconds:
            timing["mfu"] = self.ideal_seconds / seconds
        timing["peak_bytes"] = peak_memory(self.leg.device)
        self.metrics.write(row)
        self.timings.write(timing)
        self.logger.log(row | timing, row["step"])
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False
        )

    def evaluation(self, row: dict) -> None:
        self.metrics.write(row)
        self.logger.log(row, row["step"])
        if self.progress:
            self.bar.write(
                f"step {row['step']}: validation loss {row['validation_loss']:.4f}",
                file=Terminal(),
            )

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        self.metrics.sync()
        self.timings.sync()

    def __exit__(self, *error) -> None:
        if self.active:
            for thing in (self.metrics, self.timings, self.logger, self.bar):
                thing.close()


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with all that is needed to use it."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    config: TrainConfig
    step: int


def load_run(
    path: Path | str, *, which: str = "best", device: str = "cpu"
) -> LoadedRun:
    """The model of a run: its `best` checkpoint (by validation loss) or its `last`.

    A damaged checkpoint is reported and the newest whole one taken instead. Raises RunError for a
    folder that holds no run or no checkpoint yet, CheckpointError if no checkpoint is whole.
    """
    path = Path(path)
    if which not in ("best", "last"):
        raise RunError(f"which is {which!r}; it must be best or last")
    if not (path / "run.json").exists():
        raise RunError(
            f"{path}: no run there (no run.json); give the --out folder of a training run"
        )
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(record["config"])
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    if tokenizer.hash != record["tokenizer_hash"]:
        raise RunError(
            f"{path}: tokenizer.json is not the tokenizer that the run was trained with; restore it"
        )
    checkpoints = Checkpoints(
        path / "checkpoints", say=lambda text: print(text, file=sys.stderr)
    )
    found = (
        checkpoints.load_best() if which == "best" else None
    ) or checkpoints.load_newest()
    if found is None:
        raise RunError(f"{path}: no checkpoint yet; let the run reach its first one")
    model = GPT(config.model)
    model.load_state_dict(found[1]["model"])
    return LoadedRun(
        path, model.to(pick_device(device)).eval(), tokenizer, config, found[0]
    )


def run_training(
    config: TrainConfig,
    options: RunOptions,
    *,
    loss_fn: Callable[[GPT, Tensor, Tensor], Tensor] = plain_loss,
) -> LoadedRun | None:
    """Start or resume the run in `options.out` and carry it on to its end, or to the end of this leg.

    Returns the run as it stands (None in processes other than the first). Raises RunError,
    CorpusError, TokenizerError, TokenFileError, CheckpointError, DeviceError, NonFiniteError.
    """
    world, device = join_world(pick_device(options.device))
    if options.deterministic:
        make_deterministic()
    try:
        with RunLock(options.out) if world.is_main else contextlib.nullcontext():
            if not world.is_main:
                world.wait()  # the main process fills the caches first
            leg = Leg(config, options, world, device)
            leg.take_up(loss_fn)
            leg.run()
        return load_run(options.out, which="last") if world.is_main else None
    finally:
        leave_world()


def make_deterministic() -> None:
    """Deterministic kernels on CUDA, at some cost in speed; call it before the first computation there."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)


def small_run() -> LoadedRun:
    """A model trained on TinyWiki for under a minute, once; afterwards it comes from the cache.

    The cache is keyed by its configuration and by gptlib's sources, so it can never be out of date.
    """
    config = dataclasses.replace(PRESETS["demo"], steps=450, eval_interval=225)
    digest = hashlib.sha256(repr(config).encode())
    for source in sorted(
        Path(sys.modules[GPT.__module__].__file__).parent.glob("*.py")
    ):
        digest.update(source.read_bytes())
    out = cache_dir() / "small_runs" / digest.hexdigest()[:16]
    options = RunOptions(out=out, precision="fp32", micro_batch_size=16, progress=False)
    with (
        one_at_a_time(out.with_suffix(".lock")),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return run_training(config, options)


OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
)


@contextlib.contextmanager
def errors_in_one_line():
    """For command lines: what a user can mend ends the program with one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"gptlib: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        sys.exit(
            "gptlib: out of memory; halve --micro-batch-size (the tokens per step stay the same); "
            "if it is 1 already, the model or its block_size is too large for this device"
        )


def main() -> None:
    """`python -m gptlib.training watch RUN`: follow a run that another process trains."""
    if len(sys.argv) != 3 or sys.argv[1] != "watch":
        sys.exit("usage: python -m gptlib.training watch RUN")
    with errors_in_one_line(), contextlib.suppress(KeyboardInterrupt):
        watch(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
