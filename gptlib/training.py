"""The training loop.

Tangled from book/chapters/09_training.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptlib import GptlibError
from gptlib.batches import Batches, to_device
from gptlib.decoder import DecoderConfig, model_config
from gptlib.gpt import GPT, GPTConfig
from gptlib.objective import OPTIMIZERS, SCHEDULES, CombinedOptimizer


class TrainingError(GptlibError):
    """A training that cannot start or go on; the message names value and cure."""


@dataclass(frozen=True)
class Precision:
    """The type that the matrix products run in; weights and optimiser stay fp32."""

    name: str = "fp32"  # or bf16, fp16
    device_type: str = "cpu"
    reason: str = "asked for"

    def autocast(self):
        """Context in which matrix products run in 16 bits; does nothing for fp32."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        return torch.autocast(self.device_type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16; passes everything through for the other types."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


class WithLoss(nn.Module):
    """A model and its loss function as one module: (tokens, targets) -> loss."""

    def __init__(self, model: GPT, loss_fn: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_fn(self.model, *batch)


def plain_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, from all logits at once."""
    return model(tokens, targets)[1]


EVAL_STEP = 2**63  # a key that no training step has


@torch.no_grad()
def validation_loss(
    module: nn.Module, batches: Batches, precision: Precision, micro_batch_size: int
) -> float:
    """Mean loss of `batches.batch_size` crops, the same ones at every call."""
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    total = torch.zeros((), device=device)
    for batch in to_device(batches.micro_batches(EVAL_STEP, micro_batch_size), device):
        with precision.autocast():
            total += module(*batch) * len(batch[0])  # the last one may be smaller
    module.train(was_training)
    return (total / batches.batch_size).item()


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run. The defaults are the report's run."""

    model: GPTConfig = field(default_factory=GPTConfig)
    corpus: str = "wikitext-103"
    tokenizer: str = "gpt2"
    init: str | None = None  # a run whose weights to start from
    seed: int = 1337
    crops: str = "random"  # or documents: a crop begins with a document
    steps: int = 3400  # sets the schedule; stopping early is --max-steps
    batch_size: int = 480  # sequences per step
    optimizer: str = "adamw"  # adamw or muon
    schedule: str = "cosine"  # cosine or trapezoid
    learning_rate: float = 6e-4  # the peak
    final_learning_rate: float = 6e-5
    warmup_fraction: float = 0.2353  # of steps
    decay_fraction: float = 1.7647  # of steps, cosine; above 1: never comes to its end
    cooldown_fraction: float = 0.5  # of steps, trapezoid
    zero_projections: bool = False  # begin with blocks that add nothing
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # longest gradient; 0: no clipping
    eval_interval: int = 100  # steps
    eval_sequences: int = 240  # crops of the validation split, the same each time


CROPS = ("random", "documents")
COUNT, SHARE, RATE = (1, 10**8), (0.0, 1.0), (0.0, 10.0)


LIMITS = {  # lowest and highest value of each number in a configuration
    **dict.fromkeys(("steps", "batch_size", "eval_interval", "eval_sequences"), COUNT),
    **dict.fromkeys(("warmup_fraction", "cooldown_fraction"), SHARE),
    **dict.fromkeys(("learning_rate", "final_learning_rate", "weight_decay"), RATE),
    **dict.fromkeys(("beta1", "beta2"), (0.0, 0.99999)),
    "seed": (0, 2**63 - 1),
    "decay_fraction": (0.0, 100.0),
    "grad_clip": (0.0, 1e6),
}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The settings, checked, and the learning rate that follows from them."""

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            fits = isinstance(value, int | float) and low <= value <= high
            if not fits or type(low)(value) != value:
                kind = "a whole number" if isinstance(low, int) else "a number"
                raise TrainingError(
                    f"{name} is {value}; it must be {kind} from {low} to {high:g}"
                )
        choices = ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("crops", CROPS)
        for name, known in choices:
            if (value := getattr(self, name)) not in known:
                there = ", ".join(known)
                raise TrainingError(f"unknown {name} {value!r}; there are {there}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.block_size

    def spans(self) -> dict[str, int]:
        """The lengths, in steps, that this configuration's schedule asks for."""
        spans = {"steps": self.steps}
        for name in ("warmup", "decay", "cooldown"):
            fraction = getattr(self, f"{name}_fraction")
            spans[f"{name}_steps"] = round(fraction * self.steps)
        wanted = inspect.signature(SCHEDULES[self.schedule]).parameters
        return {name: n for name, n in spans.items() if name in wanted}

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        peak, final = self.learning_rate, self.final_learning_rate
        return SCHEDULES[self.schedule](step, peak=peak, final=final, **self.spans())

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """The inverse of `dataclasses.asdict`; reads what older versions wrote."""
        values = {**values, "model": model_config(values["model"])}
        if "schedule" not in values:  # once a cool-down of None meant the cosine
            cooldown = values.pop("cooldown_fraction", None)
            values["schedule"] = "cosine" if cooldown is None else "trapezoid"
            if cooldown is not None:
                values["cooldown_fraction"] = cooldown
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise TrainingError(
                f"unknown setting {', '.join(sorted(unknown))}; "
                "the run is of a newer gptlib, read it with that one"
            )
        return cls(**values)


PRESETS = {
    "demo": TrainConfig(
        model=GPTConfig(
            n_layer=2, n_head=4, n_embd=160, block_size=208, vocab_size=1536
        ),
        corpus="tinywiki",
        tokenizer="bpe-1536",
        crops="documents",
        steps=560,
        batch_size=12,
        optimizer="muon",
        schedule="trapezoid",
        learning_rate=0.01,
        final_learning_rate=0.0,
        warmup_fraction=0.05,
        cooldown_fraction=0.8,
        zero_projections=True,
        eval_interval=80,
        eval_sequences=64,
    ),
    "tinytiny": TrainConfig(),  # Table 1 of the report and its code's schedule
    "tinytiny-fast": TrainConfig(
        steps=1700,
        optimizer="muon",
        schedule="trapezoid",
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
    "llama": TrainConfig(  # Table 1's size, chapter 24
        model=DecoderConfig(norm="rms", positions="rotary", mlp="swiglu", n_kv_head=2)
    ),
    "bloom": TrainConfig(
        model=DecoderConfig(
            bias=True,
            activation="gelu_tanh",
            positions="alibi",
            norm_embedding=True,
        )
    ),
    "tinytiny-modern": TrainConfig(  # a third of the tokens: chapter 24
        model=DecoderConfig(positions="alibi"),
        steps=2267,
        batch_size=240,
        optimizer="muon",
        schedule="trapezoid",
        learning_rate=3e-3,
        final_learning_rate=0.0,
        warmup_fraction=0.05,
        cooldown_fraction=0.5,
        zero_projections=True,
    ),
}


def fresh_model(config: TrainConfig) -> GPT:
    """The model before its first step, a function of the configuration alone."""
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if config.zero_projections:  # every block begins as the identity; Zhang et al. 2019
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(p)
    return model


def optimizer_of(
    model: GPT, config: TrainConfig
) -> torch.optim.Optimizer | CombinedOptimizer:
    """The optimiser of a configuration; each step sets its rate."""
    return OPTIMIZERS[config.optimizer](
        model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2)
    )


@dataclass
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds."""

    model: GPT
    optimizer: torch.optim.Optimizer | CombinedOptimizer
    precision: Precision = Precision()
    step: int = 0  # steps done; also the position in the data
    best: float = math.inf  # lowest validation loss so far
    best_step: int = 0
    skipped: int = 0  # fp16 steps skipped because a gradient overflowed
    skipped_in_a_row: int = 0

    COUNTERS = ("step", "best", "best_step", "skipped", "skipped_in_a_row")
    PARTS = ("model", "optimizer", "scaler")

    def __post_init__(self):
        self.scaler: Any = self.precision.scaler()  # of whatever has param_groups

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            if state[name]:  # the scaler's is empty unless the run is fp16
                getattr(self, name).load_state_dict(state[name])
        for name in self.COUNTERS:
            setattr(self, name, state[name])


MAX_SKIPPED_IN_A_ROW = 20


def check_finite(state: TrainState, row: dict) -> None:
    """Raises TrainingError if the loss or the gradient's norm is not a number.

    In fp16 the scaler skips a step with an infinite gradient, so it is counted, and the
    row's norm becomes None; more than MAX_SKIPPED_IN_A_ROW are an error too.
    """
    loss, norm = row["loss"], row["grad_norm"]
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_a_row = 0
        return
    state.skipped_in_a_row += 1
    if state.scaler.is_enabled() and math.isfinite(loss):
        state.skipped += 1
        row["grad_norm"] = None  # JSON has no infinity
        if state.skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return
    raise TrainingError(
        f"step {state.step + 1}: loss {loss}, gradient's norm {norm}, "
        f"{state.skipped_in_a_row} in a row; no weight was changed; begin another run "
        "with a lower learning rate, or with --precision fp32"
    )


@dataclass(frozen=True)
class World:
    """The processes that train one model together: by default this one alone."""

    rank: int = 0
    size: int = 1

    def accumulate(self, module: nn.Module, last: bool):
        """Context of one micro-batch; `last` says whether it ends the step."""
        return contextlib.nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return value


ALONE = World()


def seed_dropout(config: TrainConfig, step: int, micro_batch: int, rank: int) -> None:
    """Make the dropout masks a function of the place in the run."""
    if config.model.dropout:
        key = f"{config.seed} {step} {micro_batch} {rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))


def training_step(
    state: TrainState,
    module: nn.Module,
    micro_batches: Sequence[tuple[Tensor, ...]],
    config: TrainConfig,
    *,
    world: World = ALONE,
) -> dict:
    """One step of the optimiser on the mean loss of the micro-batches.

    module: gives the loss of (tokens, targets), both (B, T) int64. Returns the numbers
    of the step. Raises TrainingError, with the weights as they were, if the loss is not
    finite.
    """
    rate, n, device = config.rate(state.step), len(micro_batches), state.model.device
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    loss = torch.zeros((), device=device)
    for i, batch in enumerate(to_device(micro_batches, device)):  # new: one ahead
        seed_dropout(config, state.step, i, world.rank)  # new
        with world.accumulate(module, last=i == n - 1):  # new
            with state.precision.autocast():  # new
                part = module(*batch) / n  # mean over the step, not the micro-batch
            state.scaler.scale(part).backward()  # new: scale
        loss += part.detach()
    state.scaler.unscale_(state.optimizer)  # new: the clip must see true gradients
    limit = config.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(list(state.model.parameters()), limit)
    row = {"step": state.step + 1, "loss": world.mean(loss).item()}
    row["grad_norm"], row["learning_rate"] = norm.item(), rate
    check_finite(state, row)  # new
    if state.scaler.is_enabled():  # new
        row["scale"], row["skipped"] = state.scaler.get_scale(), state.skipped
    state.scaler.step(state.optimizer)  # skips itself if a gradient is not finite
    state.scaler.update()  # new
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return row


def fit_micro_batch(batch_size: int, limit: int, processes: int = 1) -> int:
    """The largest micro-batch up to `limit` that divides each process's share."""
    share, rest = divmod(batch_size, processes)
    if rest or not share:
        raise TrainingError(
            f"batch_size {batch_size} is not a multiple of {processes}, the number of "
            "processes; choose one that is"
        )
    return max(size for size in range(1, min(limit, share) + 1) if share % size == 0)


def train(
    state: TrainState,
    module: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    micro_batch_size: int,
    on_step: Callable[[dict], bool] = lambda row: False,
    world: World = ALONE,
) -> None:
    """Train until `config.steps`, or until `on_step(row)` returns True.

    micro_batch_size: most sequences per forward pass; equal ones are made.
    """
    size = fit_micro_batch(config.batch_size, micro_batch_size, world.size)
    state.model.train()
    stop = False
    while state.step < config.steps and not stop:
        share = batches.micro_batches(state.step, size, world.rank, world.size)
        try:
            row = training_step(state, module, list(share), config, world=world)
        except TrainingError as error:
            crops = ", ".join(str(o) for o in batches.offsets(state.step)[:8])
            raise TrainingError(f"{error}; its crops begin at {crops}") from None
        stop = on_step(row)
