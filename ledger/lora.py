"""Adapters of several ranks against full fine-tuning: the figures of chapter 22.

`python ledger/lora.py` trains the demo if GPTLIB_RUNS has no such run yet, and
fine-tunes it at each rank and rate, and all its weights at each rate. It writes
ledger/lora/RANK.json, which lists what came of each rate, and ledger/lora/change.json,
the singular values of what full fine-tuning changed. What the ledger has is not made
again. Less than a minute for each rank and rate on two cores.
"""

from __future__ import annotations

import copy
import time

import torch
from entries import Entries, demo

from gptlib.batches import Batches
from gptlib.corpus import load_corpus
from gptlib.finetuning import (
    SETTINGS,
    answers,
    finetune_config,
    open_chats,
    weighted_loss,
)
from gptlib.gpt import GPT
from gptlib.lora import Lora
from gptlib.training import Precision, WithLoss, train
from gptlib.workshop.questions import test_sets
from gptlib.workshop.run_folders import Run
from gptlib.workshop.runs import all_weights
from gptlib.workshop.token_files import load_tokens


LEDGER = Entries(__file__)
DATA = "tinywiki-questions-known"
STEPS = SETTINGS["steps"] // 2  # of each fine-tuning; there are many
PLAN = [  # rank, 0 for all weights; learning rate
    (0, SETTINGS["learning_rate"]),
    *[(rank, 1e-2) for rank in (4, 16, 1, 64)],
    *[(rank, 3e-3) for rank in (16, 4, 64, 1)],
    *[(0, 3e-3), (0, 3e-4)],
    *[(rank, rate) for rank in (2, 8, 32) for rate in (1e-2, 3e-3)],
    *[(rank, 3e-2) for rank in (1, 2, 4, 8, 16, 32, 64)],
]


def change(base: GPT, tuned: GPT) -> dict:
    """Singular values of what a fine-tuning changed, by matrix."""
    weights, found = base.state_dict(), {}
    for name, weight in tuned.state_dict().items():
        if name.startswith("h.") and weight.dim() == 2:
            values = torch.linalg.svdvals((weight - weights[name]).double())
            rounded = [float(f"{value:.4g}") for value in values.tolist()]
            found[name] = {"shape": list(weight.shape), "values": rounded}
    return {"matrices": found}


def train_one(base: Run, rank: int, rate: float) -> tuple[GPT, dict]:
    """The model after STEPS at a rate, and what it cost."""
    config = finetune_config(base.path, DATA, learning_rate=rate, steps=STEPS)
    model, times = copy.deepcopy(base.model), [time.perf_counter()]
    make_state = Lora(rank) if rank else all_weights
    state = make_state(model, config, Precision())
    batches = open_chats(config, base.tokenizer, False).batches
    module = WithLoss(model, weighted_loss)
    note = lambda row: times.append(time.perf_counter())
    train(state, module, batches, config, micro_batch_size=16, on_step=note)
    gaps = sorted(b - a for a, b in zip(times[5:], times[6:]))
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = {"weights": n, "file_bytes": 4 * n, "step_seconds": gaps[len(gaps) // 2]}
    cost["gradient_and_averages_bytes"] = 3 * 4 * n  # AdamW has two averages
    return model.eval(), cost


@torch.no_grad()
def measure(model: GPT, base: Run) -> dict:
    """Grades of three sets, and nats per token on the validation text's articles."""
    found: dict = {"grades": {}}
    for key, some in test_sets().items():
        if key in ("trained", "new wording", "new entity"):
            texts = answers(model, base.tokenizer, some)
            grades = (q.grade(t)[0] for q, t in zip(some, texts, strict=True))
            found["grades"][key] = "".join(grades)
    ids = load_tokens(load_corpus("tinywiki"), base.tokenizer).split("validation").ids
    mark, block = base.tokenizer.end_of_text, model.config.block_size
    x, y = next(Batches(ids, 64, block, 0, mark).micro_batches(0, 64))
    return found | {"encyclopedia": model(x, y)[1].item()}


def main() -> None:
    base = demo()
    if not LEDGER.read("base"):
        LEDGER.write("base", measure(base.model, base))
    for rank, rate in PLAN:
        name = f"rank-{rank}" if rank else "full"
        record = LEDGER.read(name) or {
            "rank": rank,
            "settings": SETTINGS | {"steps": STEPS},
            "rates": {},
        }
        if f"{rate:g}" in record["rates"]:
            continue
        model, cost = train_one(base, rank, rate)
        found = measure(model, base) | cost
        rights = {k: f"{g.count('r') / len(g):.0%}" for k, g in found["grades"].items()}
        print(name, rate, rights, found["encyclopedia"], cost, flush=True)
        record["rates"][f"{rate:g}"] = found
        LEDGER.write(name, record)
        if rate == SETTINGS["learning_rate"] and not rank:
            LEDGER.write("change", change(base.model, model))


if __name__ == "__main__":
    main()
