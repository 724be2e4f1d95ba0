"""Measuring this machine.

Tangled from book/workshop/W8_benchmark.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import generate
from gptlib.speed import chunked_loss, fast_loss, sampling_copy
from gptlib.training import PRESETS, TrainConfig, plain_loss
from gptlib.workshop.devices import (
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
)
from gptlib.workshop.int8 import int8_copy
from gptlib.workshop.roofline import limit_rows, limit_table, random_step
from gptlib.workshop.watching import errors_in_one_line, read_options


def library_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same loss by PyTorch's own chunked function. Needs PyTorch 2.13."""
    hidden = model.hidden(tokens).flatten(0, 1).float()
    options = torch.nn.LinearCrossEntropyOptions()
    args = hidden, model.head_weight, targets.flatten()
    return F.linear_cross_entropy(*args, options=options)


@dataclass(frozen=True)
class Variant:
    """One way of computing the same thing, and one line of the table."""

    precision: str  # auto: what `gptlib pretrain` takes on this device
    loss_fn: Callable | None = None  # of a training step; None: a variant of sampling
    use_cache: bool = False
    copy: Callable[[GPT], GPT] | None = None  # that samples in place of the model


def shipped_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that `gptlib pretrain` trains with on this device."""
    loss_fn = fast_loss(model.config.vocab_size, tokens.device.type)
    return loss_fn(model, tokens, targets)


bf16_copy = functools.partial(sampling_copy, dtype=torch.bfloat16)
VARIANTS = {
    "plain-fp32": Variant("fp32", plain_loss),
    "plain-bf16": Variant("bf16", plain_loss),
    "chunked": Variant("bf16", functools.partial(chunked_loss, softmax="plain")),
    "fused": Variant("bf16", functools.partial(chunked_loss, softmax="compiled")),
    "final": Variant("auto", shipped_loss),
    "library": Variant("fp32", library_loss),
    "no-cache": Variant("fp32"),
    "cache": Variant("fp32", use_cache=True),
    "cache-one-row": Variant("fp32", use_cache=True, copy=sampling_copy),
    "cache-one-row-bf16": Variant("fp32", use_cache=True, copy=bf16_copy),
    "cache-int8": Variant("fp32", use_cache=True, copy=int8_copy),
}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    del VARIANTS["library"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure this machine: from the naive way, by steps, to the one that ships."""

    preset: str = "tinytiny"
    n_layer: int | None = None  # another shape than the preset's
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None
    vocab_size: int | None = None
    only: str | None = None  # measure one variant of the table
    limit: bool = False  # the least time of each part, beside the real one
    json: bool = False  # print JSON instead of a table
    device: str = "auto"
    rounds: int = 3
    steps: int = 3  # counted training steps of a variant
    micro_batch_size: int = 12
    micro_batches: int = 2  # to a step
    new_tokens: int = 200
    here: bool = False  # measure --only once, in this very process

    def __post_init__(self):
        if self.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise GptlibError(f"unknown preset {self.preset!r}; there are {known}")
        if self.only not in (None, *VARIANTS) or (self.here and not self.only):
            known = ", ".join(VARIANTS)
            raise GptlibError(f"unknown variant {self.only!r}; there are {known}")
        counts = "rounds", "steps", "micro_batch_size", "micro_batches", "new_tokens"
        for name in counts:
            if getattr(self, name) < 1:
                raise GptlibError(f"{name} is {getattr(self, name)}; choose at least 1")

    @property
    def config(self) -> TrainConfig:
        """The preset, with the shape that was asked for."""
        config, names = PRESETS[self.preset], dataclasses.fields(GPTConfig)
        asked = {field.name: getattr(self, field.name, None) for field in names}
        shape = {name: size for name, size in asked.items() if size is not None}
        model = dataclasses.replace(config.model, **shape)
        return dataclasses.replace(config, model=model)


def training_rate(
    config: TrainConfig,
    loss_fn: Callable,
    precision,
    device: torch.device,
    *,
    micro_batch_size: int,
    micro_batches: int,
    steps: int,
) -> float:
    """Tokens per second of whole training steps on random tokens.

    The median of `steps` after two that warm up.
    """
    sizes = micro_batch_size, micro_batches
    step = random_step(config, loss_fn, precision, device, *sizes)
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)  # the step has waited for the device
    tokens = micro_batches * micro_batch_size * config.model.block_size
    return tokens / statistics.median(times[2:])


def sampling_rate(variant: Variant, model: GPT, new_tokens: int) -> float:
    """New tokens per second of one text, after a short one that warms up."""
    if variant.copy:
        model = variant.copy(model)
    prompt = torch.randint(model.config.vocab_size, (1, 16), device=model.device)
    seconds = 0.0
    for n in (8, new_tokens):
        began = time.perf_counter()
        generate(model, prompt, n, use_cache=variant.use_cache)[0, -1].item()
        seconds = time.perf_counter() - began
    return new_tokens / seconds


def own_peak(device: torch.device) -> int:
    """`peak_memory`, but on Linux without what the parent process held at the start."""
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory(device)


def measure_here(name: str, options: BenchmarkOptions) -> dict:
    """Measure a variant in this process: tokens per second, peak bytes, MFU or None."""
    variant, config = VARIANTS[name], options.config
    device = pick_device(options.device)
    precision = pick_precision(device, variant.precision)
    torch.manual_seed(0)
    if variant.loss_fn:
        names = ("micro_batch_size", "micro_batches", "steps")
        sizes = {name: getattr(options, name) for name in names}
        rate = training_rate(config, variant.loss_fn, precision, device, **sizes)
        peak = peak_flops(device, precision.name)
    else:
        model = GPT(config.model).eval().to(device)
        rate, peak = sampling_rate(variant, model, options.new_tokens), None
    with torch.device("meta"):
        flops = GPT(config.model).flops_per_token()
    return {
        "variant": name,
        "tokens_per_second": rate,
        "peak_bytes": own_peak(device),
        "mfu": rate * flops / peak if peak else None,
        "precision": precision.name,
    }


def measure(name: str, options: BenchmarkOptions) -> dict:
    """`measure_here` in a process of its own, since a process's peak only grows."""
    options = dataclasses.replace(options, only=name, here=True)
    command = [sys.executable, "-m", "gptlib.workshop.benchmark"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        flag = "--" + field.name.replace("_", "-")
        if value is not False and value is not None:
            command += [flag] if value is True else [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GptlibError(f"variant {name} failed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def medians(names: list[str], options: BenchmarkOptions) -> list[dict]:
    """Measure variants in alternating rounds; the medians of each."""
    rounds = [
        {name: measure(name, options) for name in names} for _ in range(options.rounds)
    ]
    results = []
    for name in names:
        found = [results_of_round[name] for results_of_round in rounds]
        results.append(dict(found[0]))
        for key in ("tokens_per_second", "peak_bytes", "mfu"):
            if found[0][key] is not None:
                results[-1][key] = statistics.median(result[key] for result in found)
    return results


def table(results: list[dict]) -> str:
    """Results as lines of text; ratios are to the first variant of each part."""
    lines = []
    for title in ("training", "sampling"):
        trains = title == "training"
        part = [r for r in results if bool(VARIANTS[r["variant"]].loss_fn) == trains]
        if part:
            head = f"{'precision':>10}{'tokens/s':>12}{'ratio':>8}{'peak GB':>9}"
            lines.append(f"{title:20}{head}{'MFU':>8}")
        for r in part:
            rate, gb = r["tokens_per_second"], r["peak_bytes"] / 1e9
            ratio = rate / part[0]["tokens_per_second"]
            mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
            numbers = f"{rate:>12,.1f}{ratio:>8.2f}{gb:>9.2f}{mfu:>8}"
            lines.append(f"  {r['variant']:18}{r['precision']:>10}{numbers}")
    return "\n".join(lines)


def main() -> None:
    """`gptlib benchmark --preset NAME [--only VARIANT | --limit] [--json]`."""
    with errors_in_one_line():
        options = read_options(BenchmarkOptions)
        if options.here and options.only:
            return print(json.dumps(measure_here(options.only, options)))
        if options.limit:
            if pick_device(options.device).type != "cpu":
                raise GptlibError("--limit measures a CPU; give --device cpu")
            sizes = options.micro_batch_size, options.micro_batches
            precision = pick_precision(torch.device("cpu"))
            rows = limit_rows(options.config, *sizes, precision, rounds=options.rounds)
            return print(json.dumps(rows) if options.json else limit_table(rows))
        names = [options.only] if options.only else list(VARIANTS)
        results = medians(names, options)
        if not options.json:
            return print(table(results))
        keys = ("tokens_per_second", "peak_bytes")
        one = {key: results[0][key] for key in keys}
        print(json.dumps(one if options.only else results))


if __name__ == "__main__":
    main()
