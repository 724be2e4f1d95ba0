"""Speed: where time and memory go.

Tangled from book/chapters/11_speed.md; change it there, not here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.gpt import GPT, GPTConfig
from gptlib.workshop.files import cache_dir


def softmax_in_place(logits: Tensor) -> Tensor:
    """The logits (N, V) become probabilities; returns ln of each row's sum, (N, 1).

    Computed in fp32 (fp64 for fp64 logits), which is also the type of the result. The
    loss of a row is this logarithm minus the logit of its target.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_total = wide.logsumexp(-1, keepdim=True)
    logits.copy_((wide - log_total).exp())
    return log_total


def tiled_softmax_in_place(logits: Tensor, *, rows: int = 8) -> Tensor:
    """`softmax_in_place` a few rows at a time, which stay in the cache meanwhile."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_total = logits.new_empty(len(logits), 1, dtype=dtype)
    room = logits.new_empty(rows, logits.shape[-1], dtype=dtype)
    for part, result in zip(logits.split(rows), log_total.split(rows)):
        wide = part if part.dtype == dtype else room[: len(part)].copy_(part)
        top = wide.amax(-1, keepdim=True)
        total = wide.sub_(top).exp_().sum(-1, keepdim=True)
        wide.div_(total)
        if wide is not part:
            part.copy_(wide)
        result.copy_(total.log() + top)
    return log_total


def compile_apart(function: Callable, **options) -> Callable:
    """`torch.compile` with a cache of its own for this PyTorch and this processor.

    The compiler's cache does not know which instructions its code was made for.
    """
    facts = [
        torch.backends.cpu.get_cpu_capability(),
        *torch.cpu.get_capabilities().items(),
    ]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    key = f"torch-{torch.__version__}-{facts[0]}-{digest}".replace(" ", "-")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_dir() / "compiler")
    if folder.name != key:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / key)
    return torch.compile(function, **options)


def is_trusted(
    what: str,
    fast: Callable[[], Sequence[Tensor]],
    plain: Callable[[], Sequence[Tensor]],
    *,
    tolerance: float,
    method: str = "torch.compile",
) -> bool:
    """Whether fast code gives the plain code's values and gradients on an example.

    tolerance: largest deviation, as a part of each tensor's largest entry. One line on
    standard error says why `method` is not used for `what`.
    """
    try:
        gaps = [
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(fast(), plain(), strict=True)
        ]
        if all(gap <= tolerance for gap in gaps):
            return True
        reason = f"wrong by up to {max(gaps):.1e}"
    except Exception as error:  # no compiler, no Triton: all slow, none wrong
        reason = (" ".join(str(error).split()) or type(error).__name__)[:80]
    print(
        f"{method} is not used for {what}: {reason}; the plain code runs",
        file=sys.stderr,
    )
    return False


@functools.cache
def compiled_softmax(device: torch.device, dtype: torch.dtype) -> Callable:
    """`softmax_in_place` compiled, where it can be trusted; else without.

    On a CPU the compiled function gets 128 rows at a time, as its last cache can hold.
    """
    compiled = compile_apart(softmax_in_place, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 203, generator=generator).to(device, dtype)

    def results(function: Callable) -> list[Tensor]:
        buffer = logits.clone()
        return [function(buffer), buffer]

    def in_pieces(logits: Tensor) -> Tensor:
        return torch.cat([compiled(part) for part in logits.split(128)])

    both = [functools.partial(results, f) for f in (compiled, softmax_in_place)]
    if not is_trusted("the softmax", *both, tolerance=0.01):
        return tiled_softmax_in_place if device.type == "cpu" else softmax_in_place
    return in_pieces if device.type == "cpu" else compiled


SOFTMAXES = ("plain", "tiled", "compiled")


def pick_softmax(name: str | None, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """The `softmax_in_place` of one of SOFTMAXES; None: tiled on a CPU."""
    on_cpu = logits.device.type == "cpu"
    name = name or ("tiled" if on_cpu else "plain")
    if name == "compiled":
        return compiled_softmax(logits.device, logits.dtype)
    return {"plain": softmax_in_place, "tiled": tiled_softmax_in_place}[name]


def add_product(total: Tensor, probs: Tensor, hidden: Tensor) -> None:
    """total += probs.T @ hidden in total's type. Shapes (V, C), (N, V), (N, C)."""
    if total.dtype == probs.dtype:
        total.addmm_(probs.T, hidden)
    else:
        for part, columns in zip(total.split(4096), probs.split(4096, dim=1)):
            part += columns.T @ hidden


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, at most `rows` rows of logits at once.

    The gradient is formed in the forward pass, while a chunk's logits are at hand, and
    scaled in the backward pass; so logits are computed once. Source of the idea: Hsu et
    al. 2024 (Liger kernels).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows: int, softmax: str | None) -> Tensor:
        kind, N, dtype = hidden.device.type, len(targets), hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            narrow, w = hidden.to(dtype), weight.to(dtype)  # (N, C), (V, C)
            loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight)
            buffer = narrow.new_empty(min(rows, N), len(weight))  # one for all chunks
            softmax_of = pick_softmax(softmax, buffer)
            for start in range(0, N, rows):
                part, y = slice(start, start + rows), targets[start : start + rows]
                logits = buffer[: len(y)]  # (rows, V)
                torch.mm(narrow[part], w.T, out=logits)
                hit = logits.gather(-1, y[:, None]).to(loss.dtype)
                loss += (softmax_of(logits) - hit).sum()  # now they are probabilities
                grad_hidden[part] = logits @ w  # N times the gradients from here on
                add_product(grad_weight, logits, narrow[part])
            grad_hidden -= weight[targets]  # what the one-hot targets add, in full
            ones = -hidden.to(grad_weight.dtype)
            grad_weight.index_put_((targets,), ones, accumulate=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.positions = N
        return loss / N

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.positions  # not before: 1 / (N V) is less than fp16 can hold
        return grad_hidden * grad, grad_weight * grad, None, None, None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: int = 1536,
    softmax: str | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of hidden (N, C) read by a head of weight (V, C).

    At most `rows` x V logits are in memory. softmax: one of SOFTMAXES, or None for what
    suits the device. Raises GptlibError for rows < 1 and an unknown softmax.
    """
    if rows < 1:
        raise GptlibError(f"rows is {rows}; a chunk needs at least 1")
    if softmax not in (None, *SOFTMAXES):
        known = ", ".join(SOFTMAXES)
        raise GptlibError(f"unknown softmax {softmax!r}; there are {known}")
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, weight, targets, rows, softmax)
    total = torch.zeros((), device=hidden.device)
    for x, y in zip(hidden.split(rows), targets.split(rows)):
        logits = F.linear(x, weight).float()
        total += F.cross_entropy(logits, y, reduction="sum")
    return total / len(targets)


def chunked_loss(model: GPT, tokens: Tensor, targets: Tensor, **options) -> Tensor:
    """The loss of `plain_loss` without all logits at once; options of `head_loss`."""
    hidden = model.hidden(tokens).flatten(0, 1)
    return head_loss(hidden, model.head_weight, targets.flatten(), **options)


@functools.cache
def compiled_hidden(
    device: torch.device, config: GPTConfig
) -> Callable[[GPT, Tensor], Tensor]:
    """`GPT.hidden` compiled, where values and gradients are right; else as it is.

    config: a small one with the parts of the model.
    """
    compiled = compile_apart(GPT.hidden)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT(config).to(device)
    tokens = torch.arange(64, device=device).view(2, 32)

    def results(hidden: Callable) -> list[Tensor]:
        x = hidden(model, tokens)
        loss = x.flatten(0, 1).float().logsumexp(-1).square().mean()
        return [x.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    both = [functools.partial(results, f) for f in (compiled, GPT.hidden)]
    return compiled if is_trusted("the blocks", *both, tolerance=0.01) else GPT.hidden


def small_like(config: GPTConfig) -> GPTConfig:
    """A small configuration whose model has the same parts."""
    width = 32 * config.n_head
    one = replace(config, n_layer=1, n_embd=width, dropout=0.0)
    return replace(one, block_size=32, vocab_size=203)


@dataclass(frozen=True)
class FastLoss:
    """The loss function to train with, as a record of how it computes."""

    chunked: bool  # never all logits at once
    compiled: bool  # blocks and softmax through torch.compile, where it is trusted

    def __call__(self, model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) tokens and targets -> mean cross-entropy in nats per token."""
        compiled = self.compiled and torch.is_grad_enabled()
        hidden: Callable[[GPT, Tensor], Tensor] = GPT.hidden
        if compiled:
            hidden = compiled_hidden(tokens.device, small_like(model.config))
        x, targets = hidden(model, tokens).flatten(0, 1), targets.flatten()
        if not self.chunked:
            return F.cross_entropy(model.head(x).float(), targets)
        softmax = "compiled" if compiled else None
        return head_loss(x, model.head_weight, targets, softmax=softmax)


def fast_loss(vocab_size: int, device_type: str = "cpu") -> FastLoss:
    """Chunked where all logits would be most of the memory; compiled on CUDA."""
    return FastLoss(chunked=vocab_size > 8192, compiled=device_type == "cuda")


def inner_products(row: Tensor, weight: Tensor) -> Tensor:
    """(C,) and (V, C) -> (V,): the row times each row of the weight, in fp32."""
    return (weight * row).sum(-1)


@functools.cache
def compiled_products(shape: torch.Size, dtype: torch.dtype) -> Callable | None:
    """`inner_products` compiled for weights of one shape and type, where trusted."""
    compiled = compile_apart(inner_products, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    row = torch.randn(shape[1], generator=generator)
    # one loop for each shape and type: more than the 8 that PyTorch allows a function
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        trusted = is_trusted(
            "sampling on a CPU",
            lambda: [compiled(row, weight)],
            lambda: [inner_products(row, weight)],
            tolerance=1e-4,
        )
    return compiled if trusted else None


class OneRowLinear(nn.Module):
    """A Linear without gradients that is quick for a single row on a CPU."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype))
        bias = linear.bias if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V), in the type of x."""
        alone = x.numel() == x.shape[-1] and x.device.type == "cpu"
        product = alone and compiled_products(self.weight.shape, self.weight.dtype)
        if not product:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        y = product(x.flatten(), self.weight).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class SamplingCopy(GPT):
    """A GPT without gradients, whose Linears are replaced by what `layer` makes."""

    def __init__(self, model: GPT, layer: Callable[[nn.Linear], nn.Module]):
        with torch.device("meta"):
            super().__init__(model.config)
            self.table = nn.Linear(model.config.n_embd, model.config.vocab_size, False)
        self.load_state_dict(
            model.state_dict() | {"table.weight": model.head_weight.detach()},
            assign=True,
        )
        self.requires_grad_(False)
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, layer(child))

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)


def sampling_copy(model: GPT, *, dtype: torch.dtype | None = None) -> GPT:
    """A copy that draws one text faster on a CPU; elsewhere the model itself.

    dtype: of its matrices, the model's own if None. Equal to the model within 1e-5 in
    fp32 and within what rounding the weights leaves in bf16. In the model's own type
    the tensors are shared and follow its training; in another they do not.
    """
    weight = model.head_weight
    dtype = dtype or weight.dtype
    if weight.device.type != "cpu" or not compiled_products(weight.shape, dtype):
        return model
    layer = functools.partial(OneRowLinear, dtype=dtype)
    return SamplingCopy(model, layer).train(model.training)
