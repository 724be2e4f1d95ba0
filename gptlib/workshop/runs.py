"""A run that goes on for days.

Tangled from book/workshop/W7_runs.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlib.batches import Batches
from gptlib.corpus import load_corpus
from gptlib.gpt import GPT
from gptlib.tokenizer import Tokenizer, load_tokenizer
from gptlib.training import (
    PRESETS,
    Precision,
    TrainConfig,
    TrainState,
    WithLoss,
    fit_micro_batch,
    fresh_model,
    optimizer_of,
    plain_loss,
    train,
    validation_loss,
)
from gptlib.workshop import devices
from gptlib.workshop.checkpoints import Checkpoints, weights_hash
from gptlib.workshop.distribution import Processes, process_device, processes
from gptlib.workshop.files import cache_dir, lock, remove_leftovers, write_whole
from gptlib.workshop.run_folders import (
    Run,
    RunError,
    check_folder,
    check_init,
    check_record,
    load_init,
    load_run,
    own_tokenizer,
    read_record,
)
from gptlib.workshop.token_files import load_tokens
from gptlib.workshop.tokenizer_json import open_tokenizer
from gptlib.workshop.watching import (
    LOGGERS,
    Clock,
    Journal,
    StopRequest,
    cut_rows,
    read_rows,
    say,
)


@dataclass(frozen=True)
class RunOptions:
    """How and where a run is carried out; not meant to change what it learns."""

    out: Path  # folder of the run
    device: str = "auto"  # or cpu, cuda, cuda:N, mps
    precision: str = "auto"  # or fp32, bf16, fp16
    micro_batch_size: int = 12  # most sequences per forward pass; bounds memory
    max_steps: int | None = None  # stop this leg after so many steps
    max_minutes: float | None = None  # stop this leg after so many minutes
    save_minutes: float = 10.0  # between checkpoints; an evaluation saves one too
    keep: int = 2  # checkpoints kept besides the best
    log: str = "none"  # none, tensorboard or wandb
    deterministic: bool = False  # deterministic CUDA kernels; the CPU's are anyway
    progress: bool = True  # a bar

    def __post_init__(self):
        limits = {"micro_batch_size": 1, "max_steps": 1, "keep": 1}
        for name, low in (limits | {"max_minutes": 0, "save_minutes": 0}).items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise RunError(f"{name} is {value}; it must be at least {low}")
        for name, known in (("log", LOGGERS), ("precision", devices.PRECISIONS)):
            if (value := getattr(self, name)) not in known:
                there = ", ".join(known)
                raise RunError(f"unknown {name} {value!r}; there are {there}")


@dataclass(frozen=True)
class Data:
    """What a run reads, with the hash of each split."""

    tokenizer: Tokenizer
    batches: Any  # Batches, or a class with its methods
    eval_batches: Any
    hashes: dict[str, str]
    held_out: object = None  # how the validation split was chosen


def open_corpus(config: TrainConfig, own: Tokenizer | None, progress: bool) -> Data:
    """The windows of a corpus. own: the tokenizer of a run that has begun.

    Raises RunError if the model has too few ids or a step's windows cannot differ, and
    what reading a corpus raises.
    """
    corpus = load_corpus(config.corpus)
    if own is not None:
        tokenizer = own
    elif Path(config.tokenizer).is_file():
        tokenizer = open_tokenizer(Path(config.tokenizer))
    else:
        tokenizer = load_tokenizer(config.tokenizer, corpus)
    if tokenizer.n_vocab > config.model.vocab_size:
        raise RunError(
            f"the tokenizer has {tokenizer.n_vocab} ids, the model room for "
            f"{config.model.vocab_size}; raise --model.vocab-size"
        )
    tokens = load_tokens(corpus, tokenizer, progress=progress)
    mark = tokenizer.end_of_text if config.crops == "documents" else None
    sizes = {"train": config.batch_size, "validation": config.eval_sequences}
    block, seed = config.model.block_size, config.seed
    train_batches, eval_batches = (
        Batches(tokens.split(name).ids, n, block, seed, mark)
        for name, n in sizes.items()
    )
    if mark is not None and len(train_batches.starts) < config.batch_size:
        raise RunError(
            f"{config.corpus}: windows that begin with a document would begin at "
            f"{len(train_batches.starts)} places, fewer than the {config.batch_size} "
            "of a step; give --crops random"
        )
    manifest = tokens.manifest
    hashes = {split: entry["sha256"] for split, entry in manifest["splits"].items()}
    held_out = manifest.get("held_out")
    return Data(tokenizer, train_batches, eval_batches, hashes, held_out)


def all_weights(model: GPT, config: TrainConfig, precision: Precision) -> TrainState:
    """What a run trains if nothing else is said: every weight of its model."""
    return TrainState(model, optimizer_of(model, config), precision)


def name_of(function: Callable) -> str:
    """What a record calls a function, or an object in the place of one."""
    return getattr(function, "__name__", None) or str(function)


class Leg:
    """One stretch of a run, from where it stands to its end, a limit or a signal.

    Arguments as in `run_training`; world: the processes that train together. Raises
    RunError and what reading, saving and picking a device raise.
    """

    def __init__(
        self,
        config: TrainConfig,
        options: RunOptions,
        world: Processes,
        loss_fn: Callable[..., Tensor],
        open_init: Callable[[str], Run],
        open_data: Callable[..., Data],
        make_state: Callable[..., TrainState] = all_weights,
    ):
        self.config, self.options, self.world = config, options, world
        self.out = Path(options.out)
        trains = name_of(make_state)
        record = check_folder(self.out, config, trains)
        size = options.micro_batch_size
        self.micro_batch_size = fit_micro_batch(config.batch_size, size, world.size)
        self.checkpoints = Checkpoints(self.out / "checkpoints", options.keep, self.say)
        own = own_tokenizer(self.out, record) if record else None
        begun = bool(self.checkpoints.steps())
        source = open_init(config.init) if config.init and not begun else None
        if source:
            check_init(source, config.model)  # before the corpus is read
        data = open_data(config, own, options.progress and world.is_main)
        self.tokenizer = data.tokenizer
        self.batches, self.eval_batches = data.batches, data.eval_batches
        settled = record["machine"].get("precision") if record else None
        if settled and options.precision == "auto":
            found = devices.pick_precision(world.device, settled)
            precision = dataclasses.replace(found, reason="as the run began")
        else:
            precision = devices.pick_precision(world.device, options.precision)
        model = fresh_model(config)
        if source:
            load_init(model, source, self.tokenizer)
        if world.is_main:
            machine = devices.describe_machine(world.device)
            machine |= {"precision": precision.name, "processes": world.size}
            machine |= {"micro_batch_size": self.micro_batch_size}
            machine |= {"loss": name_of(loss_fn)}
            new = {
                "config": dataclasses.asdict(config),
                "machine": machine,
                "code": devices.describe_code(),
                "tokenizer_hash": self.tokenizer.hash,
                "data": data.hashes,
                "held_out": data.held_out,
            }
            if make_state is not all_weights:
                new["trains"] = trains
            if source:
                new["init_hash"] = weights_hash(model)
            self.write_record(record, new)
            remove_leftovers(self.out)
            remove_leftovers(self.checkpoints.folder)
            world.wait()  # from here on the others read what is cached
        model = model.to(world.device)
        self.state = make_state(model, config, precision)
        self.restore(record)
        self.module = WithLoss(model, loss_fn)
        limits = options.max_steps, options.max_minutes, options.save_minutes
        self.clock, self.request = Clock(*limits), StopRequest()
        self.journal = self.open_journal() if world.is_main else None

    def write_record(self, old: dict | None, new: dict) -> None:
        """Make the folder a run, or check that it is the run that it was."""
        if old:
            check_record(old, new, self.out)
            if old.get("init_hash") != new.get("init_hash", old.get("init_hash")):
                raise RunError(
                    f"--init {self.config.init}: its weights have changed since this "
                    "run began; choose another --out"
                )
            if old["config"] == self.config:
                return
            new = old | {"config": new["config"]}  # another interval of evaluation
        try:
            if not old:
                self.tokenizer.save(self.out / "tokenizer.json")
            write_whole(self.out / "run.json", json.dumps(new, indent=1) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.out} cannot be written ({error.strerror}); make room"
            ) from error

    def restore(self, record: dict | None) -> None:
        """Take up the newest whole checkpoint, the same one in all processes."""
        found = self.checkpoints.load_newest() if self.world.is_main else None
        step = self.world.from_main(found[0] if found else -1)
        if step >= 0:
            self.state.load_state_dict(
                found[1] if found else self.checkpoints.load(step)
            )
        if record and record["config"].eval_sequences != self.config.eval_sequences:
            self.state.best = math.inf  # measured on other crops
        if self.world.is_main:  # what came after the checkpoint is done again
            for name in ("metrics.jsonl", "timings.jsonl"):
                cut_rows(self.out / name, step)

    def open_journal(self) -> Journal:
        """The journal of this leg, with the seconds of a step at the device's peak."""
        state, options, config = self.state, self.options, self.config
        peak = devices.peak_flops(self.world.device, state.precision.name)
        flops = state.model.flops_per_token() * config.tokens_per_step
        ideal = flops / peak / self.world.size if peak else None
        return Journal(
            self.out,
            config,
            state.step,
            log=options.log,
            progress=options.progress,
            ideal_seconds=ideal,
        )

    def say(self, text: str) -> None:
        """A line to the terminal, from the first process alone."""
        if self.world.is_main:
            say(text)

    def run(self) -> None:
        """Train to the end of this leg."""
        state, precision = self.state, self.state.precision
        self.say(
            f"{self.world.device.type}, {precision.name} ({precision.reason}), "
            f"from step {state.step}"
        )
        with contextlib.closing(self.journal or io.StringIO()), self.request:
            if state.step == 0:
                self.evaluate()
            train(
                state,
                self.world.wrap(self.module),
                self.batches,
                self.config,
                micro_batch_size=self.micro_batch_size,
                on_step=self.after_step,
                world=self.world,
            )
        if state.step < self.config.steps:
            self.say(
                f"stopped at step {state.step} of {self.config.steps}, all of it "
                "saved; the same command goes on from here"
            )

    def after_step(self, row: dict) -> bool:
        """Write, evaluate and save when it is time; whether the leg ends here."""
        seconds = self.clock.step()
        if self.journal:
            self.journal.step(row, seconds, devices.peak_memory(self.world.device))
        step, last = self.state.step, self.config.steps
        evaluates = step == last or step % self.config.eval_interval == 0
        if evaluates:
            self.evaluate()
        asked = self.clock.leg_is_over() or self.request.signal is not None
        stop = self.world.any(asked)
        if evaluates or stop or self.clock.save_is_due():
            self.save()
        return stop

    def evaluate(self) -> None:
        """Write the validation loss. Raises RunError if it is not finite."""
        if self.journal:
            state = self.state
            how = (self.eval_batches, state.precision, self.micro_batch_size)
            loss = validation_loss(self.module, *how)
            if not math.isfinite(loss):
                raise RunError(
                    f"step {state.step}: validation loss {loss}; the last checkpoint "
                    "is whole: begin another run with a lower learning rate"
                )
            if loss < state.best:
                state.best, state.best_step = loss, state.step
            self.journal.evaluation(state.step, loss)
        self.clock.restart_step()

    def save(self) -> None:
        """Write a checkpoint, once the rows up to it are on the disk."""
        if self.journal:
            began, step = time.perf_counter(), self.state.step
            self.journal.sync()  # rows reach the disk before the checkpoint does
            state = self.state.state_dict()
            self.checkpoints.save(step, state, best=self.state.best_step)
            self.journal.saved(step, time.perf_counter() - began)
        self.clock.saved()


def run_training(
    config: TrainConfig,
    options: RunOptions,
    *,
    loss_fn: Callable[..., Tensor] = plain_loss,
    open_init: Callable[[str], Run] = load_run,
    open_data: Callable[..., Data] = open_corpus,
    make_state: Callable[..., TrainState] = all_weights,
) -> Run | None:
    """Start or resume the run in `options.out`, and train to the end of this leg.

    open_init: opens what `config.init` names. open_data: what `config.corpus` names.
    make_state: makes what is trained; its name or `str` goes into the record.
    Returns the run as it stands; None in processes other than the first. Raises
    GptlibError's subclasses.
    """
    out = Path(options.out)
    if options.deterministic:
        devices.make_deterministic()
    with processes(process_device(options.device)) as world, devices.memory_advice():
        if check_folder(out, config, name_of(make_state)):  # a cheap refusal first
            steps = Checkpoints(out / "checkpoints").steps()
            if steps and steps[-1] >= config.steps:
                run = load_run(out, "last", device=str(world.device))
                if run.step >= config.steps:
                    if world.is_main:
                        say(f"{out} is finished: {run.step} steps; nothing to do")
                    return run if world.is_main else None
        held = lock(out / "lock", wait=False)
        with held if world.is_main else contextlib.nullcontext():
            if not world.is_main:
                world.wait()  # the main process fills the caches first
            hooks = loss_fn, open_init, open_data, make_state
            leg = Leg(config, options, world, *hooks)
            leg.run()
        model = leg.state.model.eval()
        run = Run(out, model, leg.tokenizer, config, leg.state.step)
        return run if world.is_main else None


def branch_run(parent: Path | str, out: Path | str) -> TrainConfig:
    """Make `out` a run that cools down from where a trapezoid's run stands.

    It begins with the newest checkpoint of `parent`, optimiser and all; the plateau
    ends there and the cool-down's share of the steps stays. Returns its configuration,
    to go on with; also if `out` is such a branch already. Raises RunError.
    """
    parent, out = Path(parent).resolve(), Path(out)
    source, own = read_record(parent), read_record(out)
    if source is None:
        raise RunError(f"{parent}: no run.json there; give the --out folder of a run")
    if own and own.get("parent", {}).get("path") == str(parent):
        return own["config"]
    if own or (out.exists() and any(out.iterdir())):
        raise RunError(f"{out} is not empty and no branch of {parent}; choose another")
    config, found = source["config"], Checkpoints(parent / "checkpoints", say=say)
    step, state = found.load_newest() or (0, {})
    spans = {"warmup_steps": 0, "cooldown_steps": config.steps} | config.spans()
    plateau = spans["warmup_steps"], config.steps - spans["cooldown_steps"]
    if config.schedule != "trapezoid" or not plateau[0] < step <= plateau[1]:
        raise RunError(
            f"{parent} stands at step {step} of a {config.schedule}; only a trapezoid "
            "can branch, from its plateau"
        )
    steps = round(step / (1 - config.cooldown_fraction))
    warmup = spans["warmup_steps"] / steps
    config = dataclasses.replace(config, steps=steps, warmup_fraction=warmup)
    record = source | {"config": dataclasses.asdict(config)}
    record["parent"] = {"path": str(parent), "step": step}
    scratch = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        Checkpoints(scratch / "checkpoints").save(step, state)
        for name in ("tokenizer.json", "metrics.jsonl", "timings.jsonl"):
            shutil.copyfile(parent / name, scratch / name)
        for name in ("metrics.jsonl", "timings.jsonl"):
            cut_rows(scratch / name, step)
        write_whole(scratch / "run.json", json.dumps(record, indent=1) + "\n")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return config


def trial(
    train: Callable[[RunOptions], Run | None],
    options: RunOptions,
    *,
    cycle: int = 1,
    seconds: float = 20.0,
) -> str:
    """What a whole run will take, from the steps of some seconds that are not kept.

    train: starts or resumes the run. cycle: steps after which all costs come again. The
    first cycle warms up, and counts only if there is no other. Raises what train does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("a plan is made in one process; start it without torchrun")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        some = dataclasses.replace(
            options, out=out, progress=False, log="none", max_minutes=None
        )
        with contextlib.redirect_stderr(io.StringIO()):
            run = train(dataclasses.replace(some, max_steps=cycle))
            train(dataclasses.replace(some, max_steps=None, max_minutes=seconds / 60))
        record = read_record(out)
        rows = [r for r in read_rows(out / "timings.jsonl") if "seconds_per_step" in r]
    assert run and record  # of the only process
    later = rows[cycle:]
    counted = later[: len(later) // cycle * cycle] or rows
    step = sum(row["seconds_per_step"] for row in counted) / len(counted)
    sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    machine, peak = record["machine"], max(row["peak_bytes"] or 0 for row in rows)
    memory = f"{peak / 1e9:.2f} GB at most in {len(rows)} steps"
    if has := devices.total_memory(run.model.device):
        memory += f", of {has / 1e9:.1f} GB"
    return "\n".join(
        [
            f"device       {machine['device_name']}, {machine['precision']}",
            f"model        {sum(n for n, _ in sizes):,} weights, "
            f"{sum(n for n, trained in sizes if trained):,} of them trained",
            f"memory       {memory}",
            f"speed        {step:.2f} seconds a step",
            f"whole run    {run.config.steps:,} steps, about "
            f"{run.config.steps * step / 60:.1f} minutes",
        ]
    )


def small_run() -> Run:
    """A model trained on TinyWiki for under a minute, once; then it is cached.

    The cache is keyed by its configuration and by gptlib's files, so it is never stale.
    """
    demo = PRESETS["demo"]
    steps = demo.steps // 2
    config = dataclasses.replace(demo, steps=steps, eval_interval=steps // 2)
    key = hashlib.sha256(
        f"{config} {devices.describe_code()['files']}".encode()
    ).hexdigest()
    out = cache_dir() / "small_runs" / key[:16]
    options = RunOptions(out, precision="fp32", micro_batch_size=16, progress=False)
    with lock(out.with_suffix(".lock")), contextlib.redirect_stderr(io.StringIO()):
        return run_training(config, options) or load_run(out)
