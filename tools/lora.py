"""Adapters of several ranks against full fine-tuning: the figures of chapter 22.

`python tools/lora.py [UNIT ...]` takes the demo and the fine-tuned run of chapter 21
from GPTLIB_RUNS (`tools/finetuning.py` makes both), and writes ledger/lora/UNIT.json.
Units: `change`, the singular values of what chapter 21 changed; `full`; and `rank-R`.
The last two train once for each rate and keep the one with the most right answers to
new wordings. Without a unit it makes all that the ledger lacks; several minutes each.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from gptlib.batches import Batches
from gptlib.corpus import load_corpus
from gptlib.finetuning import (
    SETTINGS,
    answers,
    finetune_config,
    open_chats,
    test_sets,
    weighted_loss,
)
from gptlib.gpt import GPT
from gptlib.lora import Lora, adapters
from gptlib.training import PRESETS, Precision, WithLoss, train
from gptlib.workshop.runs import Run, all_weights, load_run
from gptlib.workshop.token_files import load_tokens


LEDGER = Path(__file__).parents[1] / "ledger" / "lora"
RUNS = Path(os.environ.get("GPTLIB_RUNS", "runs"))
DATA = "tinywiki-questions-known"
RANKS = (1, 2, 4, 8, 16, 32, 64)
RATES = {"full": (5e-4, 1e-3, 2e-3), "rank": (3e-3, 1e-2, 3e-2)}


def key_of(config) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()[:8]


def write(name: str, record: dict) -> None:
    LEDGER.mkdir(parents=True, exist_ok=True)
    path = LEDGER / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def change(base: Run) -> dict:
    """Singular values of what chapter 21's fine-tuning changed, by matrix."""
    config = finetune_config(base.path, DATA)
    tuned = load_run(RUNS / f"{DATA}-{key_of(config)}", "last")
    weights, found = base.model.state_dict(), {}
    for name, weight in tuned.model.state_dict().items():
        if name.startswith("h.") and weight.dim() == 2:
            values = torch.linalg.svdvals((weight - weights[name]).double())
            shape, own = list(weight.shape), torch.linalg.norm(weights[name]).item()
            rounded = [float(f"{value:.4g}") for value in values.tolist()]
            found[name] = {"shape": shape, "norm": own, "values": rounded}
    return {"run": tuned.path.name, "step": tuned.step, "matrices": found}


def train_one(base: Run, make_state, rate: float) -> tuple[GPT, dict]:
    """A model after chapter 21's steps at a rate, and what a step cost."""
    config = finetune_config(base.path, DATA, learning_rate=rate)
    model = copy.deepcopy(base.model).train()
    state = make_state(model, config, Precision())
    data = open_chats(config, base.tokenizer, False)
    seconds: list[float] = []

    def note(row: dict) -> bool:
        seconds.append(time.perf_counter())
        return False

    module = WithLoss(model, weighted_loss)
    train(state, module, data.batches, config, micro_batch_size=16, on_step=note)
    gaps = sorted(b - a for a, b in zip(seconds, seconds[1:]))
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    cost = {"trained": numbers, "step_seconds": gaps[len(gaps) // 2]}
    held = 3 * 4 * numbers  # a gradient and AdamW's two averages, in fp32
    return model.eval(), cost | {"bytes": 4 * numbers, "training_bytes": held}


@torch.no_grad()
def measure(model: GPT, base: Run, keys: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for key in keys:
        some = test_sets()[key]
        texts = answers(model, base.tokenizer, some)
        found[key] = "".join(q.grade(t)[0] for q, t in zip(some, texts, strict=True))
    return found


@torch.no_grad()
def encyclopedia(model: GPT, base: Run) -> float:
    """Nats per token of 64 windows of the validation text, each an article's start."""
    ids = load_tokens(load_corpus("tinywiki"), base.tokenizer).split("validation").ids
    mark, block = base.tokenizer.end_of_text, model.config.block_size
    x, y = next(Batches(ids, 64, block, 0, mark).micro_batches(0, 64))
    return model(x, y)[1].item()


def unit(base: Run, name: str) -> dict:
    rank = int(name.partition("-")[2] or 0)
    make_state = Lora(rank) if rank else all_weights
    tried, best = {}, {}
    for rate in RATES["rank" if rank else "full"]:
        model, cost = train_one(base, make_state, rate)
        grades = measure(model, base, ("new wording",))
        tried[f"{rate:g}"] = right = grades["new wording"].count("r")
        print(name, f"rate {rate:g}: {right} right, {cost}", flush=True)
        if right > best.get("right", -1):
            best = {"rate": rate, "right": right, "cost": cost, "model": model}
    model = best.pop("model")
    grades = measure(model, base, ("trained", "new wording", "new entity"))
    loss = encyclopedia(model, base)
    print(name, {k: g.count("r") for k, g in grades.items()}, loss, flush=True)
    record = {"rank": rank, "settings": SETTINGS, "tried": tried, "rate": best["rate"]}
    record |= {"layers": len(adapters(model)), "cost": best["cost"]}
    return record | {"grades": grades, "encyclopedia": loss}


def main() -> None:
    demo = PRESETS["demo"]
    base = load_run(RUNS / f"demo-{key_of(demo)}", "last")
    names = ["change", "full", *(f"rank-{rank}" for rank in RANKS)]
    missing = [name for name in names if not (LEDGER / f"{name}.json").exists()]
    for name in sys.argv[1:] or missing:
        write(name, change(base) if name == "change" else unit(base, name))
    write("base", {"encyclopedia": encyclopedia(base.model, base)})


if __name__ == "__main__":
    main()
