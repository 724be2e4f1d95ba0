"""The full run.

Tangled from book/chapters/14_pretraining.md; change it there, not here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gptlib.speed import fast_loss
from gptlib.training import (
    PRESETS,
    LoadedRun,
    RunError,
    RunOptions,
    TrainConfig,
    WithLoss,
    errors_in_one_line,
    fit_micro_batch,
    fresh_model,
    optimizer_of,
    run_training,
)
from gptlib.workshop.devices import (
    describe_machine,
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
    total_memory,
)


def pretrain(config: TrainConfig, options: RunOptions) -> LoadedRun | None:
    """Start or resume a pretraining run, with the fast loss of chapter 11. Returns what `load_run` would."""
    kind = pick_device(options.device).type
    return run_training(
        config, options, loss_fn=fast_loss(config.model.vocab_size, kind)
    )


@dataclass(frozen=True)
class Plan:
    """What a run will take on this machine, as far as one can know before it."""

    device: str
    precision: str
    reason: str
    parameters: int
    tokens: int  # that the whole run trains on
    state_bytes: int  # weights, gradients and AdamW's two averages
    peak_bytes: int  # measured
    memory_bytes: int | None  # that the device has
    tokens_per_second: float  # measured
    mfu: float | None

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        have = (
            "" if self.memory_bytes is None else f" of {self.memory_bytes / 1e9:.1f} GB"
        )
        lines = [
            f"device       {self.device}, {self.precision} ({self.reason})",
            f"model        {self.parameters:,} parameters; weights, gradients and AdamW's averages {self.state_bytes / 1e9:.2f} GB",
            f"memory       {self.peak_bytes / 1e9:.2f} GB measured{have}",
            f"speed        {self.tokens_per_second:,.0f} tokens/s"
            + (f", {self.mfu:.1%} of peak" if self.mfu else ""),
            f"whole run    {self.tokens:,} tokens, about "
            + (
                f"{self.hours:.1f} hours ({self.hours / 24:.2f} days)"
                if self.hours > 1
                else f"{60 * self.hours:.1f} minutes"
            ),
        ]
        return "\n".join(lines)


def plan(config: TrainConfig, options: RunOptions, *, steps: int = 20) -> Plan:
    """Measure `steps` micro-batches of random tokens and work out what the run will take. Writes nothing.

    A step of the run is as many micro-batches as it needs, one clipping and one step of the optimiser.
    """
    device = pick_device(options.device)
    precision = pick_precision(device, options.precision)
    model = fresh_model(config).to(device)
    optimizer = optimizer_of(model, config)
    module = WithLoss(model, fast_loss(config.model.vocab_size, device.type))
    size = fit_micro_batch(config.batch_size, options.micro_batch_size)
    tokens = torch.randint(
        config.model.vocab_size, (size, config.model.block_size + 1)
    ).to(device)

    def micro_batch() -> None:
        with precision.autocast():
            loss = module(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        loss.item()  # waits for the device

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        optimizer.step()

    micro_batch()  # the first calls set up kernels and the optimiser's averages
    update()
    seconds = seconds_of(micro_batch, steps) * config.batch_size / size + seconds_of(
        update, 2
    )
    rate, peak = config.tokens_per_step / seconds, peak_flops(device, precision.name)
    parameters = model.n_parameters(positions=True)
    return Plan(
        device=describe_machine(device)["device_name"] or device.type,
        precision=precision.name,
        reason=precision.reason,
        parameters=parameters,
        tokens=config.steps * config.tokens_per_step,
        state_bytes=16 * parameters,
        peak_bytes=peak_memory(device),
        memory_bytes=total_memory(device),
        tokens_per_second=rate,
        mfu=rate * model.flops_per_token() / peak if peak else None,
    )


def seconds_of(call: Callable[[], None], repeats: int) -> float:
    """Mean duration of a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


@dataclass(frozen=True)
class Command:
    """Pretrain a GPT. The same command on an unfinished --out goes on; on a finished one it says so."""

    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "tinytiny"  # gives the settings their defaults
    plan: bool = False  # measure, print what the run will take, and stop


def preset_of(arguments: list[str]) -> TrainConfig:
    """The preset that a command line names. Raises RunError for an unknown one."""
    name = "tinytiny"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    if name not in PRESETS:
        raise RunError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def main() -> None:
    """`python -m gptlib.pretraining --preset NAME --corpus NAME --out FOLDER`."""
    with errors_in_one_line():
        config = preset_of(sys.argv[1:])
        options = RunOptions(
            out=Path("runs/plan") if "--plan" in sys.argv else tyro.MISSING
        )
        command = tyro.cli(Command, default=Command(options=options, config=config))
        if command.plan:
            print(plan(command.config, command.options))
        else:
            pretrain(command.config, command.options)


if __name__ == "__main__":
    main()
