"""LoRA: fine-tuning with few weights.

Tangled from book/chapters/22_lora.md; change it there, not here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.finetuning import Finetune, finetune
from gptlib.gpt import GPT
from gptlib.training import Precision, TrainConfig, TrainState, optimizer_of
from gptlib.workshop.checkpoints import Checkpoints, weights_hash
from gptlib.workshop.families import need
from gptlib.workshop.files import write_whole
from gptlib.workshop.run_folders import Run
from gptlib.workshop.runs import RunOptions, all_weights, trial
from gptlib.workshop.watching import errors_in_one_line, read_options


class LoraError(GptlibError):
    """An adapter that does not fit its model, or cannot be read."""


class LoRA(nn.Linear):
    """A linear layer whose weight stays, and (alpha / rank) B A, which is trained.

    Raises LoraError if the rank is above the matrix's. Source: Hu et al. 2022.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator
    ):
        m, n = linear.weight.shape
        super().__init__(n, m, bias=linear.bias is not None, device="meta")
        if not 1 <= rank <= min(m, n):
            raise LoraError(
                f"rank is {rank}; a matrix of {m} x {n} can have 1 to {min(m, n)}"
            )
        self.weight, self.bias = linear.weight, linear.bias
        where, bound = self.weight.device, 1 / math.sqrt(n)
        A = torch.empty(rank, n).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(where))
        self.lora_B = nn.Parameter(torch.zeros(m, rank, device=where))
        self.alpha, self.scale = alpha, alpha / rank
        self.kept: Tensor | None = None  # the weight before a merge

    def change(self) -> Tensor:
        """What the adapter adds to the weight, (m, n)."""
        return self.scale * self.lora_B @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        y = super().forward(x)
        if self.kept is not None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapters(model: GPT) -> dict[str, LoRA]:
    """The layers with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def add_adapters(model: GPT, rank: int, alpha: float = 16.0, seed: int = 0) -> None:
    """Give every linear layer of the blocks a new adapter; freeze all else.

    Adapters that were there are replaced. Raises LoraError for a merged model.
    """
    unmerged(model)
    draws = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in list(model.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child, rank, alpha, draws))


def unmerged(model: GPT) -> dict[str, LoRA]:
    """The layers with adapters. Raises LoraError if these are merged."""
    found = adapters(model)
    if any(layer.kept is not None for layer in found.values()):
        raise LoraError("the adapters are merged already; call unmerge first")
    return found


@torch.no_grad()
def plain_weights(model: GPT, *, merged: bool) -> dict[str, Tensor]:
    """The weights of a plain GPT: those of the base, or with the changes added."""
    names = model.state_dict().items()
    found = {name: value for name, value in names if "lora_" not in name}
    for name, layer in adapters(model).items():
        weight = layer.weight.detach() if layer.kept is None else layer.kept
        found[f"{name}.weight"] = weight + layer.change() if merged else weight
    return found


class LoraState(TrainState):
    """The state of a run that trains adapters."""

    def state_dict(self) -> dict:
        plain = plain_weights(self.model, merged=True)
        whole = self.model.state_dict()
        return super().state_dict() | {"model": plain, "adapted": whole}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state | {"model": state["adapted"]})


@dataclass(frozen=True)
class Lora:
    """What a run trains: adapters of this rank. For `run_training`'s make_state."""

    rank: int
    alpha: float = 16.0

    def __call__(
        self, model: GPT, config: TrainConfig, precision: Precision
    ) -> TrainState:
        add_adapters(model, self.rank, self.alpha, config.seed)
        return LoraState(model, optimizer_of(model, config), precision)


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add each adapter's change to its weight. Raises LoraError the second time."""
    for layer in unmerged(model).values():
        layer.kept = layer.weight.clone()
        layer.weight += layer.change()


@torch.no_grad()
def unmerge(model: GPT) -> None:
    """Undo `merge`, bit for bit."""
    for layer in adapters(model).values():
        if layer.kept is not None:
            layer.weight.copy_(layer.kept)
            layer.kept = None


FILES = "adapter_config.json", "adapter_model.safetensors"


def base_hash(model: GPT) -> str:
    """The hash of the weights without adapters."""
    with torch.device("meta"):
        plain = GPT(model.config)
    plain.load_state_dict(plain_weights(model, merged=False), assign=True)
    return weights_hash(plain)


def peft_name(layer: str, key: str) -> str:
    """Peft's name for a matrix of a layer of a GPT-2: lora_A or lora_B."""
    return f"base_model.model.transformer.{layer}.{key}.weight"


def save_adapter(model: GPT, folder: Path | str, base: Path | str = "") -> None:
    """Write the adapters as a folder that peft opens on the exported base.

    base: where the base is exported to, a hint for whoever opens the folder.
    """
    need("transformers")
    from safetensors.torch import save

    folder, layers, weights = Path(folder), unmerged(model), {}
    for name, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            weights[peft_name(name, key)] = getattr(layer, key).detach().cpu()
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": first.lora_A.shape[0],
        "lora_alpha": first.alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": True,
    }
    data = save(weights, {"base": base_hash(model)})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILES[0], json.dumps(config, indent=1) + "\n")
    write_whole(folder / FILES[1], lambda file: file.write(data))


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor], str | None]:
    """Configuration, weights and, if it is there, the base's hash. Raises LoraError."""
    need("transformers")
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / FILES[0]).read_text("utf-8"))
        config = {"r": int(config["r"]), "alpha": float(config["lora_alpha"])}
        with safe_open(folder / FILES[1], "pt") as file:
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
            return config, weights, (file.metadata() or {}).get("base")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LoraError(
            f"{folder}: no adapter, or a damaged one ({reason}); save it again"
        ) from None


@torch.no_grad()
def load_adapter(model: GPT, folder: Path | str) -> None:
    """Put a saved adapter on a model, in the place of any that is there.

    Raises LoraError, with the model as it was, if the files are damaged or the adapter
    is not for this model.
    """
    config, weights, base = read_adapter(Path(folder))
    if base not in (None, own := base_hash(model)):
        raise LoraError(
            f"{folder}: an adapter of another base ({base[:8]}, this model is "
            f"{own[:8]}); load the model that it was trained on"
        )
    rank, wanted = config["r"], {}
    for name, module in model.h.named_modules(prefix="h"):
        if isinstance(module, nn.Linear):
            m, n = module.weight.shape
            wanted[peft_name(name, "lora_A")] = (rank, n)
            wanted[peft_name(name, "lora_B")] = (m, rank)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != wanted:
        name, shape = min(found.items() ^ wanted.items())
        raise LoraError(
            f"{folder}: {name} {shape} is only in the file or only in this model; take "
            "an adapter of all linear layers of this shape"
        )
    add_adapters(model, rank, config["alpha"])
    for name, layer in adapters(model).items():
        layer.lora_A.copy_(weights[peft_name(name, "lora_A")])
        layer.lora_B.copy_(weights[peft_name(name, "lora_B")])


@dataclass(frozen=True, kw_only=True)
class FinetuneLora(Finetune):
    """All weights are trained, or adapters of a low rank."""

    lora: int | None = None  # rank of adapters; None: train all weights
    lora_alpha: float = 16.0  # an adapter counts alpha / rank


def finetune_lora(config: TrainConfig, options: RunOptions, lora: Lora) -> Run | None:
    """Fine-tune adapters, and write them to `adapter` in the run's folder.

    They come from the newest checkpoint, so the same command writes them again.
    """
    need("transformers")  # before the work
    run = finetune(config, options, make_state=lora)
    found = Checkpoints(run.path / "checkpoints").load_newest() if run else None
    if run and found:
        model = GPT(config.model)
        add_adapters(model, lora.rank, lora.alpha)
        model.load_state_dict(found[1]["adapted"])
        save_adapter(model, run.path / "adapter", config.init or "")
    return run


def main() -> None:
    """`gptlib finetune --run R --data FILE --out FOLDER`."""
    with errors_in_one_line():
        command = read_options(FinetuneLora)
        config, lora = command.config(), None
        if command.lora is not None:
            lora = Lora(command.lora, command.lora_alpha)
        if command.plan:
            train = partial(finetune, config, make_state=lora or all_weights)
            print(trial(train, command))
        elif lora:
            finetune_lora(config, command, lora)
        else:
            finetune(config, command)


if __name__ == "__main__":
    main()
