"""How fast could a step be.

Tangled from book/workshop/W24_roofline.md; change it there, not here.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from gptlib import GptlibError
from gptlib.gpt import GPTConfig
from gptlib.speed import fast_loss
from gptlib.training import (
    Precision,
    TrainConfig,
    TrainState,
    WithLoss,
    fresh_model,
    optimizer_of,
    training_step,
)


Product = tuple[float, int, int, int, int]  # how often; b products (m, k) @ (k, n)


@dataclass(frozen=True)
class Part:
    """What one part of a training step must do at least."""

    name: str
    products: tuple[Product, ...] = ()
    moved: float = 0  # bytes, besides what the products read and write

    @property
    def operations(self) -> float:
        """Floating-point operations of its products."""
        return sum(2 * times * b * m * k * n for times, b, m, k, n in self.products)


def parts_of(
    config: GPTConfig, sequences: int, micro_batches: int, width: int = 4
) -> list[Part]:
    """The parts of a training step with AdamW.

    sequences: of a micro-batch. width: bytes of a number between two layers. Raises
    GptlibError for a model with parts of chapter 24.
    """
    if type(config) is not GPTConfig:
        raise GptlibError("the limit is counted for GPT-2's parts only")
    L, C, V, T = config.n_layer, config.n_embd, config.vocab_size, config.block_size
    N, n, heads = sequences * T, micro_batches, sequences * config.n_head
    hs = C // config.n_head
    matrices = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))
    forward = tuple((n * L, 1, N, k, m) for k, m in matrices)
    backward = tuple((n * L, 1, N, m, k) for k, m in matrices)  # for the input
    backward += tuple((n * L, 1, k, N, m) for k, m in matrices)  # for the weight
    scores, means = (heads, T, hs, T), (heads, T, T, hs)
    half = n * L / 2  # the causal mask leaves half of the pairs
    rows = min(1536, N) if fast_loss(V).chunked else N
    chunk = n * N / rows
    head = ((chunk, 1, rows, C, V), (chunk, 1, rows, V, C), (chunk, 1, V, rows, C))
    weights = V * C + T * C + 12 * L * C**2
    return [
        Part("embedding", moved=n * width * 5 * N * C),
        Part("matrices, forward", forward),
        Part("matrices, backward", backward),
        Part("attention, forward", ((half, *scores), (half, *means))),
        # the scores are computed again, since no (T, T) matrix is kept
        Part("attention, backward", ((2 * half, *scores), (3 * half, *means))),
        Part("norms, GELU, additions", moved=n * width * (42 * L + 5) * N * C),
        Part("head and loss", head, moved=n * width * 2 * N * V),
        # clipping: 3 passes; AdamW: 7; adding the gradient of a micro-batch: 3
        Part("optimiser", moved=4 * weights * (10 + 3 * (n - 1))),
    ]


def fastest(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Least seconds of a call; after a first one it repeats for `seconds`."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@functools.cache
def product_seconds(b: int, m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """Least seconds of b products (m, k) @ (k, n) on the CPU."""
    x, y = torch.randn(b, m, k).to(dtype), torch.randn(b, k, n).to(dtype)
    out = torch.empty(b, m, n, dtype=dtype)
    if b == 1:
        return fastest(lambda: torch.mm(x[0], y[0], out=out[0]))
    return fastest(lambda: torch.bmm(x, y, out=out))


@functools.cache
def bytes_per_second() -> float:
    """Speed of a copy of 134 MB; a byte read and a byte written count as two."""
    x = torch.ones(2**25)
    y = torch.empty_like(x)
    return 8 * len(x) / fastest(lambda: y.copy_(x))


def least_seconds(part: Part, dtype: torch.dtype) -> float:
    """Seconds of a part at the speeds that this machine shows for its products."""
    products = (times * product_seconds(*s, dtype) for times, *s in part.products)
    return sum(products) + part.moved / bytes_per_second()


WHOLE = "the whole step"
OWNERS = {  # marks in the names of an operation and of its callers
    "optimiser": ("Optimizer.step", "AccumulateGrad", "vector_norm", "_foreach_"),
    "embedding": ("embedding",),
    "attention": ("scaled_dot_product",),
    "head and loss": ("ChunkedCrossEntropy", "log_softmax", "nll_loss"),
}


def owner(event, vocab_size: int) -> str:
    """The part of a step that a profiler's event belongs to."""
    names, caller = [], event
    while caller is not None:
        names.append(caller.name)
        caller = caller.cpu_parent
    chain = " ".join(names)
    half = "backward" if "autograd::engine" in chain else "forward"
    for name, marks in OWNERS.items():
        if any(mark in chain for mark in marks):
            return f"{name}, {half}" if name == "attention" else name
    if names[0] not in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "norms, GELU, additions"
    if any(vocab_size in shape for shape in event.input_shapes):
        return "head and loss"
    return f"matrices, {half}"


def random_step(
    config: TrainConfig,
    loss_fn: Callable[..., torch.Tensor],
    precision: Precision,
    device: torch.device,
    sequences: int,
    micro_batches: int,
) -> Callable[[], dict]:
    """A training step on random tokens, to be called and timed."""
    model = fresh_model(config).to(device).train()
    state = TrainState(model, optimizer_of(model, config), precision)
    shape = (2, micro_batches, sequences, config.model.block_size)
    batches = list(zip(*torch.randint(config.model.vocab_size, shape), strict=True))
    module = WithLoss(model, loss_fn)
    return functools.partial(training_step, state, module, batches, config)


def step_seconds(
    config: TrainConfig, sequences: int, micro_batches: int, precision: Precision
) -> tuple[float, dict[str, float]]:
    """Least seconds of a whole training step, and seconds of its parts in a profile."""
    config = replace(config, optimizer="adamw")
    loss_fn, cpu = fast_loss(config.model.vocab_size), torch.device("cpu")
    step = random_step(config, loss_fn, precision, cpu, sequences, micro_batches)
    step()  # the first one makes the optimiser's averages
    whole = fastest(step)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says its stages
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    seconds: dict[str, float] = {}
    for event in profile.events():
        name = owner(event, config.model.vocab_size)
        seconds[name] = seconds.get(name, 0.0) + event.self_cpu_time_total / 1e6
    return whole, seconds


def limit_rows(
    config: TrainConfig,
    sequences: int,
    micro_batches: int,
    precision: Precision,
    *,
    rounds: int = 1,
) -> list[dict]:
    """A row for each part of a step, and one for the whole: least and real seconds.

    Limit and step are timed in turns, and of each time the least counts.
    """
    fp32 = precision.name == "fp32"
    width, dtype = (4, torch.float32) if fp32 else (2, torch.bfloat16)
    parts = parts_of(config.model, sequences, micro_batches, width)
    least, real = dict[str, float](), dict[str, float]()
    for _ in range(rounds):
        product_seconds.cache_clear()
        bytes_per_second.cache_clear()
        whole, seconds = step_seconds(config, sequences, micro_batches, precision)
        limits = {part.name: least_seconds(part, dtype) for part in parts}
        for kept, new in ((real, {**seconds, WHOLE: whole}), (least, limits)):
            kept |= {name: min(t, kept.get(name, t)) for name, t in new.items()}
    rows: list[dict] = [
        {
            "part": part.name,
            "operations": part.operations,
            "bytes": part.moved,
            "least_seconds": least[part.name],
            "seconds": real.get(part.name, 0.0),
        }
        for part in parts
    ]
    total = {key: sum(row[key] for row in rows) for key in list(rows[0])[1:4]}
    return [*rows, {"part": WHOLE, **total, "seconds": real[WHOLE]}]


def limit_table(rows: Sequence[dict]) -> str:
    """Rows of `limit_rows` as lines of text."""
    lines = [f"{'':24}{'GFLOP':>8}{'MB':>8}{'least ms':>10}{'ms':>9}{'share':>7}"]
    for row in rows:
        least, seconds = row["least_seconds"], row["seconds"]
        counts = f"{row['operations'] / 1e9:8.1f}{row['bytes'] / 1e6:8.0f}"
        share = f"{least / seconds:7.0%}" if seconds else f"{'-':>7}"
        times = f"{1e3 * least:10.1f}{1e3 * seconds:9.1f}{share}"
        lines.append(f"{row['part']:24}{counts}{times}")
    return "\n".join(lines)
