"""A whole run: plan, train, judge.

Tangled from book/chapters/14_pretraining.md; change it there, not here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import pstdev

import torch

from gptlib import GptlibError
from gptlib.batches import Batches
from gptlib.corpus import load_corpus
from gptlib.decoder import DecoderConfig, all_fields, model_config
from gptlib.evaluation import evaluate
from gptlib.exchange import import_model
from gptlib.speed import fast_loss
from gptlib.training import (
    PRESETS,
    Precision,
    Settings,
    TrainConfig,
    TrainState,
    WithLoss,
    fit_micro_batch,
    fresh_model,
    optimizer_of,
    plain_loss,
    training_step,
    validation_loss,
)
from gptlib.workshop.devices import (
    describe_machine,
    memory_advice,
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
    total_memory,
)
from gptlib.workshop.distribution import process_device
from gptlib.workshop.run_folders import Run, load_run
from gptlib.workshop.runs import RunOptions, branch_run, run_training
from gptlib.workshop.token_files import load_tokens
from gptlib.workshop.watching import errors_in_one_line, read_options


@dataclass(frozen=True)
class Plan:
    """What a run will take on this machine, as far as one can know before it."""

    device: str
    precision: str
    reason: str
    parameters: int
    tokens: int  # that the whole run trains on
    flops: float  # of the whole run
    state_bytes: int  # weights, gradients and the optimiser's averages
    peak_bytes: int  # measured
    memory_bytes: int | None  # that the device has
    tokens_per_second: float  # measured
    mfu: float | None

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        memory = f"{self.peak_bytes / 1e9:.2f} GB measured"
        if self.memory_bytes:
            memory += f" of {self.memory_bytes / 1e9:.1f} GB"
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        if self.mfu:
            speed += f", {self.mfu:.1%} of peak"
        duration = f"{60 * self.hours:.1f} minutes"
        if self.hours > 1:
            duration = f"{self.hours:.1f} hours ({self.hours / 24:.2f} days)"
        return "\n".join(
            [
                f"device       {self.device}, {self.precision} ({self.reason})",
                f"model        {self.parameters:,} parameters; weights, gradients and "
                f"optimiser {self.state_bytes / 1e9:.2f} GB",
                f"memory       {memory}",
                f"speed        {speed}",
                f"whole run    {self.tokens:,} tokens, {self.flops:.1e} FLOPs, "
                f"about {duration}",
            ]
        )


def plan(config: TrainConfig, options: RunOptions, *, seconds: float = 20.0) -> Plan:
    """Train on random tokens for `seconds`, and work out what the run will take.

    A step of the run is many micro-batches and one step of the optimiser. Two short
    kinds of step, of one micro-batch and of three, tell what each of them costs. Writes
    nothing.
    """
    device = pick_device(options.device)
    precision = pick_precision(device, options.precision)
    model = fresh_model(config).to(device).train()
    optimizer = optimizer_of(model, config)
    module = WithLoss(model, fast_loss(config.model.vocab_size, device.type))
    state = TrainState(model, optimizer, precision)
    size = fit_micro_batch(config.batch_size, options.micro_batch_size)
    x, y = torch.randint(config.model.vocab_size, (2, size, config.model.block_size))
    endless = replace(config, steps=10**8 - 1)

    def time_of(micro_batches: int) -> float:
        began = time.perf_counter()
        training_step(state, module, [(x, y)] * micro_batches, endless)
        return time.perf_counter() - began

    with memory_advice():
        time_of(1)  # the first step sets up kernels and the optimiser's averages
        pairs = [(time_of(1), time_of(3))]
        while sum(map(sum, pairs)) < seconds:
            pairs.append((time_of(1), time_of(3)))
    one, three = (sorted(times)[len(times) // 2] for times in zip(*pairs))
    micro_batch = max((three - one) / 2, one / 4)
    step = one + (config.batch_size // size - 1) * micro_batch
    rate = config.tokens_per_step / step
    peak = peak_flops(device, precision.name)
    tokens = config.steps * config.tokens_per_step
    held = sum(
        value.numel() * value.element_size()
        for part in getattr(optimizer, "parts", [optimizer])
        for of_one in part.state.values()
        for value in of_one.values()
        if torch.is_tensor(value)
    )
    parameters = model.n_parameters(include_positions=True)
    return Plan(
        device=describe_machine(device)["device_name"] or device.type,
        precision=precision.name,
        reason=precision.reason,
        parameters=parameters,
        tokens=tokens,
        flops=float(tokens * model.flops_per_token()),
        state_bytes=8 * parameters + held,
        peak_bytes=peak_memory(device),
        memory_bytes=total_memory(device),
        tokens_per_second=rate,
        mfu=rate * model.flops_per_token() / peak if peak else None,
    )


def open_init(source: str) -> Run:
    """What `init` of a configuration names: a run, or a transformers model."""
    if (Path(source) / "run.json").exists():
        return load_run(source)
    model, tokenizer = import_model(source)
    return Run(Path(source), model, tokenizer, TrainConfig(model.config), step=0)


def pretrain(config: TrainConfig, options: RunOptions) -> Run | None:
    """Start or resume a pretraining run, with the fast loss of chapter 11.

    Returns the run as it stands; None in processes other than the first.
    """
    kind = process_device(options.device).type
    loss_fn = fast_loss(config.model.vocab_size, kind)
    return run_training(config, options, loss_fn=loss_fn, open_init=open_init)


REPORT = {"train": 3.648, "validation": 3.674}  # Zhou, Ling and Wu 2023, section 4
CROPS = 1200  # of an evaluation there: 100 batches of 12


def compare_with_report(run: Run) -> str:
    """A run's losses beside the report's, by the report's protocol and by ours.

    Its protocol: the mean over 1,200 random crops of a split. (Its training loss may be
    that of 12 crops.) Ours: every token of the validation split once.
    """
    config, module = run.config, WithLoss(run.model, plain_loss)
    block, corpus = config.model.block_size, config.corpus
    tokens = load_tokens(load_corpus(corpus), run.tokenizer)
    split = tokens.split("validation")
    ours = evaluate(run.model, split, run.tokenizer, corpus=corpus, step=run.step)
    error = 1.96 * pstdev(ours.blocks) / math.sqrt(CROPS)
    head = f"nats per token, {Path(corpus).name}, step {run.step}"
    lines = [f"{head:46} {'here':>7} {'report':>7}"]
    for name, reported in REPORT.items():
        batches = Batches(tokens.split(name).ids, CROPS, block, config.seed)
        loss = validation_loss(module, batches, Precision(), 4)
        what = f"{name}, {CROPS:,} random crops (± {error:.3f})"
        lines.append(f"{what:46} {loss:7.3f} {reported:7.3f}")
    low, high = ours.interval()
    what = f"validation, every token ({low:.3f} to {high:.3f})"
    return "\n".join([*lines, f"{what:46} {ours.nats_per_token:7.3f}       -"])


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What gives the other options their defaults, and whether to plan only."""

    preset: str = "tinytiny"  # gives the settings below their defaults
    plan: bool = False  # measure, print what the run will take, and stop


@dataclass(frozen=True, kw_only=True)
class Pretrain(Settings, RunOptions, Preset):
    """Pretrain a GPT. On an unfinished --out the same command goes on."""

    branch: Path | None = None  # begin with this trapezoid run, and cool it down


def main() -> None:
    """`gptlib pretrain --preset NAME --corpus NAME --out FOLDER`."""
    with errors_in_one_line():
        first, _ = read_options(Preset, return_unknown_args=True, add_help=False)
        if first.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise GptlibError(f"unknown preset {first.preset!r}; there are {known}")
        settings = dict(vars(PRESETS[first.preset]))
        settings["model"] = DecoderConfig(**all_fields(settings["model"]))
        default = Pretrain(out=Path("runs/plan"), preset=first.preset, **settings)
        required = () if first.plan else ("out",)
        command = read_options(Pretrain, default=default, required=required)
        names = [field.name for field in fields(TrainConfig)]
        config = TrainConfig(**{name: getattr(command, name) for name in names})
        config = replace(config, model=model_config(all_fields(config.model)))
        if command.plan:
            return print(plan(config, command))
        if command.branch:
            config = branch_run(command.branch, command.out)
        run = pretrain(config, command)
        report = command.preset.startswith("tinytiny")
        if run and report and run.step == config.steps:
            print(compare_with_report(run))


if __name__ == "__main__":
    main()
