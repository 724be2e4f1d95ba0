"""The full run.

Tangled from book/chapters/14_pretraining.md; change it there, not here.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptlib.devices import (
    describe_machine,
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
    total_memory,
)
from gptlib.gpt import GPT
from gptlib.speed import fast_loss
from gptlib.training import (
    PRESETS,
    LoadedRun,
    RunError,
    RunOptions,
    TrainConfig,
    adamw_of,
    errors_in_one_line,
    run_training,
)

__all__ = ["pretrain", "Plan", "plan", "Command", "preset_of", "main"]

# The choice


def pretrain(config: TrainConfig, options: RunOptions) -> LoadedRun | None:
    """Start or resume a pretraining run, with the fast loss of chapter 11. Returns what `load_run` would."""
    return run_training(config, options, loss_fn=fast_loss(config.model.vocab_size))


# Predict, then measure


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
        have = "" if self.memory_bytes is None else f" of {self.memory_bytes / 1e9:.1f} GB"
        lines = [
            f"device       {self.device}, {self.precision} ({self.reason})",
            f"model        {self.parameters:,} parameters; weights, gradients and AdamW's averages {self.state_bytes / 1e9:.2f} GB",
            f"memory       {self.peak_bytes / 1e9:.2f} GB measured{have}",
            f"speed        {self.tokens_per_second:,.0f} tokens/s"
            + (f", {self.mfu:.1%} of peak" if self.mfu else ""),
            f"whole run    {self.tokens:,} tokens, about {self.hours:.1f} hours ({self.hours / 24:.2f} days)",
        ]
        return "\n".join(lines)


def plan(config: TrainConfig, options: RunOptions, *, steps: int = 20) -> Plan:
    """Measure `steps` micro-batches of random tokens and work out what the run will take. Writes nothing."""
    import torch

    device = pick_device(options.device)
    precision = pick_precision(device, options.precision)
    model = GPT(config.model).to(device)
    optimizer, loss_fn = adamw_of(model, config), fast_loss(config.model.vocab_size)
    shape = (options.micro_batch_size, config.model.block_size + 1)
    tokens = torch.randint(config.model.vocab_size, shape).to(device)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:  # the first two set up kernels and the optimiser's state
            began = time.perf_counter()
        with precision.autocast():
            loss = loss_fn(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        loss.item()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.perf_counter() - began) / steps
    rate = options.micro_batch_size * config.model.block_size / seconds
    peak = peak_flops(device, precision.name)
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


# From the shell


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
        options = RunOptions(out=Path("runs/plan") if "--plan" in sys.argv else tyro.MISSING)
        command = tyro.cli(Command, default=Command(options=options, config=config))
        if command.plan:
            print(plan(command.config, command.options))
        else:
            pretrain(command.config, command.options)


if __name__ == "__main__":
    main()
