"""Speed: where time and memory go.

Tangled from book/chapters/11_speed.md; change it there, not here.
"""

from __future__ import annotations

import copy
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
import tyro
from torch import Tensor

from gptlib.gpt import GPT
from gptlib.objective import make_adamw
from gptlib.sampling import generate
from gptlib.training import PRESETS, errors_in_one_line, plain_loss
from gptlib.workshop.devices import peak_flops, peak_memory, pick_device, pick_precision


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, and its gradient by the logits, in the logits' type.

    logits: (N, V); targets: (N,) int64. Computed in fp32 (fp64 for fp64 logits).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True)
    exp = (wide - top).exp()
    total = exp.sum(-1, keepdim=True)  # (N, 1)
    loss = (total.log() + top - wide.gather(-1, targets[:, None])).sum()
    hit = (
        torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    )  # (N, V), fused away
    return loss, (exp / total - hit.to(exp.dtype)).to(logits.dtype)


def to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """`softmax_gradient` in place: the logits become the gradient; returns the sum of the losses."""
    loss, grad = softmax_gradient(logits, targets)
    logits.copy_(grad)
    return loss


@functools.cache
def fused_to_gradient(device_type: str) -> Callable:
    """`to_gradient` through torch.compile where a compiler works, tried once; else without.

    On a CPU the compiled function gets 128 rows at a time, which its last cache can hold.
    """
    compiled = torch.compile(to_gradient, dynamic=True)

    def in_pieces(logits: Tensor, targets: Tensor) -> Tensor:
        pairs = zip(logits.split(128), targets.split(128))
        return torch.stack([compiled(part, target) for part, target in pairs]).sum()

    try:
        example = torch.zeros(2, 3, device=device_type)
        compiled(example, torch.zeros(2, dtype=torch.int64, device=device_type))
        return in_pieces if device_type == "cpu" else compiled
    except (
        Exception
    ) as error:  # no compiler, no Triton, an unsupported Python: all slow, none wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        print(
            f"torch.compile does not work here ({reason}); the loss runs unfused",
            file=sys.stderr,
        )
        return tiled_to_gradient if device_type == "cpu" else to_gradient


def tiled_to_gradient(logits: Tensor, targets: Tensor, *, rows: int = 8) -> Tensor:
    """`to_gradient` for a CPU, a few rows at a time, so that what it makes stays in the cache."""
    losses = []
    for part, target in zip(
        logits.split(rows), targets[:, None].split(rows)
    ):  # (rows, V), (rows, 1)
        wide = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
        top = wide.amax(-1, keepdim=True)
        hit = wide.gather(-1, target)
        total = wide.sub_(top).exp_().sum(-1, keepdim=True)
        losses.append((total.log() + top - hit).sum())
        wide.div_(total).scatter_add_(-1, target, torch.full_like(top, -1.0))
        part.copy_(wide)
    return torch.stack(losses).sum()


def pick_to_gradient(device_type: str, fuse: bool | None) -> Callable:
    """fuse: True compiled, False as written, None what suits the device: tiled on a CPU, else compiled."""
    if fuse is None and device_type == "cpu":
        return tiled_to_gradient
    return to_gradient if fuse is False else fused_to_gradient(device_type)


def add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad.T @ hidden, summed in the type of total. Shapes (V, C), (N, V), (N, C)."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    else:
        for part, columns in zip(total.split(4096), grad.split(4096, dim=1)):
            part += columns.T @ hidden


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T` without ever holding more than `rows` rows of logits.

    The gradient is formed in the forward pass, while a chunk's logits are at hand, and scaled in the
    backward pass; so logits are computed once. Source of the idea: Hsu et al. 2024 (Liger kernels).
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        fuse: bool | None,
    ) -> Tensor:
        kind, N = hidden.device.type, len(targets)
        in_place = pick_to_gradient(kind, fuse)
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else hidden.dtype
        )
        with torch.autocast(kind, enabled=False):
            narrow, w = hidden.to(dtype), weight.to(dtype)  # (N, C), (V, C)
            loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
            grad_hidden, grad_weight = (
                torch.empty_like(hidden),
                torch.zeros_like(weight),
            )
            buffer = narrow.new_empty(min(rows, N), len(weight))  # one for all chunks
            for start in range(0, N, rows):
                part = slice(start, start + rows)
                logits = buffer[: min(rows, N - start)]  # (rows, V)
                torch.mm(narrow[part], w.T, out=logits)
                loss += in_place(logits, targets[part])  # from here on, N times G
                grad_hidden[part] = logits @ w
                add_product(grad_weight, logits, narrow[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.positions = N
        return loss / N

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.positions  # not earlier: 1 / (N V) is less than fp16 can hold
        return grad_hidden * grad, grad_weight * grad, None, None, None


def chunked_loss(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    *,
    rows: int = 1536,
    fuse: bool | None = None,
) -> Tensor:
    """The loss of `plain_loss`, with at most `rows` x V logits in memory; plugs into `run_training(loss_fn=...)`.

    fuse: as in `pick_to_gradient`. Raises ValueError for rows < 1.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a chunk needs at least 1")
    if not torch.is_grad_enabled():
        return no_grad_loss(model, tokens, targets, rows)
    hidden = model.hidden(tokens).flatten(0, 1)
    return ChunkedCrossEntropy.apply(
        hidden, model.wte.weight, targets.flatten(), rows, fuse
    )


def no_grad_loss(model: GPT, tokens: Tensor, targets: Tensor, rows: int) -> Tensor:
    """The same without gradients, for evaluation."""
    hidden, targets = model.hidden(tokens).flatten(0, 1), targets.flatten()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), rows):
        logits = model.head(hidden[start : start + rows]).float()
        total += torch.nn.functional.cross_entropy(
            logits, targets[start : start + rows], reduction="sum"
        )
    return total / len(targets)


@dataclass(frozen=True)
class FastLoss:
    """The loss function to train with, as a record of how it computes."""

    chunked: bool  # never all logits at once
    compiled: bool  # blocks and softmax through torch.compile

    def __call__(self, model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) tokens and targets -> mean cross-entropy in nats per token."""
        if self.compiled:
            compile_blocks(model)
        if not self.chunked:
            return plain_loss(model, tokens, targets)
        suits = None if tokens.device.type == "cpu" else False
        return chunked_loss(
            model, tokens, targets, fuse=True if self.compiled else suits
        )


def compile_blocks(model: GPT) -> None:
    """Let `torch.compile` join the small operations of each block, at its first call from here on."""
    for block in model.h:
        if block._compiled_call_impl is None:
            block.compile()


def compiler_works(device_type: str) -> bool:
    """Whether torch.compile works here for this kind of device; tried once, and one line says if not."""
    return fused_to_gradient(device_type) not in (to_gradient, tiled_to_gradient)


def fast_loss(vocab_size: int, device_type: str = "cpu") -> FastLoss:
    """Chunked where all logits at once would be most of the memory; compiled on CUDA where that works."""
    return FastLoss(
        vocab_size > 8192, device_type == "cuda" and compiler_works(device_type)
    )


def library_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same loss by PyTorch's own chunked function, for comparison. Needs PyTorch 2.13."""
    hidden, weight = model.hidden(tokens).flatten(0, 1).float(), model.wte.weight
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets.flatten(), options=options
    )


def inner_products(row: Tensor, weight: Tensor) -> Tensor:
    """(C,) and (V, C) -> (V,): the row times each row of the weight, in the wider of their types."""
    return (weight * row).sum(-1)


@functools.cache
def fused_inner_products() -> Callable | None:
    """`inner_products` compiled for the CPU, or None where no compiler works."""
    compiled = torch.compile(inner_products, dynamic=False)
    try:
        limits = torch._dynamo.config  # a loop for each shape and type: a model has five shapes, the default limit is 8
        limits.recompile_limit = max(limits.recompile_limit, 64)
        with torch.no_grad():
            compiled(torch.zeros(16), torch.zeros(32, 16, dtype=torch.bfloat16))
        return compiled
    except Exception:  # then the plain product is used
        return None


class OneRowLinear(torch.nn.Module):
    """A Linear without gradients that is quick for a single row. weight: (V, C); bias: (V,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = weight.detach().to(dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), in the type of x."""
        if x.numel() != x.shape[-1]:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        y = (
            fused_inner_products()(x.flatten(), self.weight)
            .to(x.dtype)
            .view(*x.shape[:-1], -1)
        )
        return y if self.bias is None else y + self.bias


def sampling_copy(model: GPT, *, dtype: torch.dtype | None = None) -> GPT:
    """A copy that draws one text faster on a CPU, for `generate`; the model itself where nothing is to be won.

    dtype: of the weights of its matrices, the model's own if None. Equal to the model within 1e-5 in fp32
    and within what rounding the weights leaves in bf16. In the model's own type the tensors are shared and
    follow its training; in another one they are what the weights were.
    """
    weight = model.wte.weight
    if weight.device.type != "cpu" or fused_inner_products() is None:
        return model
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in shared.h:
        for parent in list(block.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, torch.nn.Linear):
                    setattr(
                        parent,
                        name,
                        OneRowLinear(
                            layer.weight, layer.bias, dtype or layer.weight.dtype
                        ),
                    )
    shared.head = OneRowLinear(weight, None, dtype or weight.dtype).forward
    return shared


@dataclass(frozen=True)
class Row:
    """One line of the table: a way of computing the same thing."""

    name: str
    precision: (
        str  # of `pick_precision`; auto takes what this machine multiplies fastest
    )
    loss_fn: Callable | None = None  # training, if there is one; else sampling
    use_cache: bool = False
    copy_dtype: torch.dtype | None = None  # of `sampling_copy`


ROWS = [
    Row("plain-fp32", "fp32", plain_loss),
    Row("plain-bf16", "bf16", plain_loss),
    Row("chunked", "bf16", functools.partial(chunked_loss, fuse=False)),
    Row("fused", "bf16", functools.partial(chunked_loss, fuse=True)),
    Row("final", "auto", chunked_loss),
    Row("library", "fp32", library_loss),
    Row("no-cache", "fp32"),
    Row("cache", "fp32", use_cache=True),
    Row("cache-one-row", "fp32", use_cache=True, copy_dtype=torch.float32),
    Row("cache-one-row-bf16", "fp32", use_cache=True, copy_dtype=torch.bfloat16),
]


@dataclass(frozen=True)
class SpeedOptions:
    """Measure this machine: from the naive way, by steps, to the final one."""

    preset: str = "tinytiny"
    only: str | None = None  # measure one row of the table
    row: str | None = (
        None  # measure one row, once, in this very process (used by the command itself)
    )
    json: bool = False  # print JSON instead of a table
    device: str = "auto"
    rounds: int = 3
    steps: int = 3  # counted steps of a training row
    micro_batch_size: int = 12
    micro_batches: int = 2  # to a step
    new_tokens: int = 200

    def __post_init__(self):
        names = [row.name for row in ROWS]
        if self.preset not in PRESETS:
            raise ValueError(
                f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}"
            )
        for name in (self.only, self.row):
            if name is not None and name not in names:
                raise ValueError(f"unknown row {name!r}; there are {', '.join(names)}")
        for name in (
            "rounds",
            "steps",
            "micro_batch_size",
            "micro_batches",
            "new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1"
                )


def training_rate(
    row: Row, options: SpeedOptions, model: GPT, device: torch.device
) -> float:
    """Tokens per second of whole training steps on random tokens: the median after two that warm up."""
    config, precision = PRESETS[options.preset], pick_precision(device, row.precision)
    loss_fn = (
        plain_loss
        if row.name == "final" and model.config.vocab_size <= 8192
        else row.loss_fn
    )
    optimizer = make_adamw(
        model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
    )
    scaler = precision.scaler()
    shape = (options.micro_batch_size, model.config.block_size)
    x, y = (torch.randint(model.config.vocab_size, shape).to(device) for _ in range(2))
    times = []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        for _ in range(options.micro_batches):
            with precision.autocast():
                loss = loss_fn(model, x, y) / options.micro_batches
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.grad_clip
        ).item()  # waits for the device
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return options.micro_batches * x.numel() / statistics.median(times[2:])


def sampling_rate(
    row: Row, options: SpeedOptions, model: GPT, device: torch.device
) -> float:
    """New tokens per second of one text, after a short one that warms up."""
    model = model.eval().to(pick_precision(device, row.precision).dtype)
    model = sampling_copy(model, dtype=row.copy_dtype) if row.copy_dtype else model
    prompt = torch.randint(model.config.vocab_size, (1, 16)).to(device)
    for n in (8, options.new_tokens):
        began = time.perf_counter()
        generate(model, prompt, n, use_cache=row.use_cache)[0, -1].item()
    return options.new_tokens / (time.perf_counter() - began)


def own_peak(device: torch.device) -> int:
    """`peak_memory`, but on Linux without what the parent process held when it started this one."""
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory(device)


def measure_here(name: str, options: SpeedOptions) -> dict:
    """Measure one row in this process: tokens per second, peak bytes, MFU (or None), precision."""
    row = next(row for row in ROWS if row.name == name)
    device = pick_device(options.device)
    precision = pick_precision(device, row.precision).name
    torch.manual_seed(0)
    model = GPT(PRESETS[options.preset].model).to(device)
    rate = (training_rate if row.loss_fn else sampling_rate)(
        row, options, model, device
    )
    peak = peak_flops(device, precision) if row.loss_fn else None
    mfu = rate * model.flops_per_token() / peak if peak else None
    return {
        "row": name,
        "tokens_per_second": rate,
        "peak_bytes": own_peak(device),
        "mfu": mfu,
        "precision": precision,
    }


def measure(name: str, options: SpeedOptions) -> dict:
    """`measure_here` in a process of its own, since a process's peak memory only grows."""
    command = [sys.executable, "-m", "gptlib.speed", "--row", name, "--json"]
    for field in (
        "preset",
        "device",
        "steps",
        "micro_batch_size",
        "micro_batches",
        "new_tokens",
    ):
        command += ["--" + field.replace("_", "-"), str(getattr(options, field))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"row {name} failed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def medians(names: list[str], options: SpeedOptions) -> list[dict]:
    """Measure rows in alternating rounds; each row's medians."""
    rounds = [
        {name: measure(name, options) for name in names} for _ in range(options.rounds)
    ]
    rows = []
    for name in names:
        found = [results[name] for results in rounds]
        rows.append(dict(found[0]))
        for key in ("tokens_per_second", "peak_bytes", "mfu"):
            if found[0][key] is not None:
                rows[-1][key] = statistics.median(result[key] for result in found)
    return rows


def table(rows: list[dict]) -> str:
    """Results as lines of text; ratios are to the first row of training and of sampling."""
    training = {row.name for row in ROWS if row.loss_fn}
    lines = []
    for title in ("training", "sampling"):
        part = [r for r in rows if (r["row"] in training) == (title == "training")]
        if part:
            lines.append(
                f"{title:20}{'precision':>10}{'tokens/s':>12}{'ratio':>8}{'peak GB':>9}{'MFU':>8}"
            )
        for r in part:
            ratio = r["tokens_per_second"] / part[0]["tokens_per_second"]
            mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
            lines.append(
                f"  {r['row']:18}{r['precision']:>10}{r['tokens_per_second']:>12,.1f}{ratio:>8.2f}{r['peak_bytes'] / 1e9:>9.2f}{mfu:>8}"
            )
    return "\n".join(lines)


def main() -> None:
    """`python -m gptlib.speed --preset NAME [--only ROW] [--json]`."""
    with errors_in_one_line():
        options = tyro.cli(SpeedOptions)
        if options.row:
            return print(json.dumps(measure_here(options.row, options)))
        known = [
            row.name
            for row in ROWS
            if row.name != "library" or hasattr(torch.nn, "LinearCrossEntropyOptions")
        ]
        names = [options.only] if options.only else known
        rows = medians(names, options)
        if not options.json:
            return print(table(rows))
        keys = ("tokens_per_second", "peak_bytes")
        print(json.dumps({key: rows[0][key] for key in keys} if options.only else rows))


if __name__ == "__main__":
    main()
