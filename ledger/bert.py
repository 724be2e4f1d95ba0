"""Encoders against the demo's decoder: the figures of chapter 25.

`python ledger/bert.py` trains the demo if GPTLIB_RUNS has no such run yet, and the
encoders of ENCODERS, and writes what they can do to ledger/bert. What the ledger has
is not made again; `python ledger/bert.py PART ...` makes some of PARTS or of ENCODERS.
Less than an hour on two cores, most of it for the encoder of the most steps.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time

import torch
from entries import RUNS, Entries, demo

from gptlib.batches import crops
from gptlib.bert import (
    Classifier,
    EncoderConfig,
    LabelledBatches,
    MaskedBatches,
    blank_log_probs,
    class_loss,
    hide,
    kind_examples,
    mask_token,
    pseudo_log_probs,
)
from gptlib.finetuning import weighted_loss
from gptlib.gpt import GPT
from gptlib.sampling import draw, generate, next_token_probs
from gptlib.training import (
    PRESETS,
    TrainConfig,
    TrainState,
    WithLoss,
    fresh_model,
    optimizer_of,
    train,
)
from gptlib.workshop.probes import continuation_log_probs, fact_probes
from gptlib.workshop.questions import read_asks
from gptlib.workshop.runs import open_corpus
from gptlib.workshop.tinywiki import TinyWiki, pool, spell, world
from gptlib.workshop.watching import read_rows


LEDGER = Entries(__file__)
WEIGHTS = RUNS / "bert"
DEMO = PRESETS["demo"]
ENCODERS = {  # name: steps, share of chosen tokens, (hidden, any token)
    "encoder": (DEMO.steps, 0.15, (0.8, 0.1)),
    "equal": (5 * DEMO.steps // 2, 0.4, (0.8, 0.1)),  # as many predictions as the demo
}


def encoder_config(steps: int) -> TrainConfig:
    """The demo's settings, with the mask taken away."""
    model = EncoderConfig(**dataclasses.asdict(DEMO.model), mask_token=251)
    return dataclasses.replace(DEMO, model=model, steps=steps)


@torch.no_grad()
def sorts(model: GPT, tokens: torch.Tensor, n_vocab: int) -> dict[str, float]:
    """Nats at chosen tokens if all are hidden, all replaced, or all left."""
    found = {}
    for name, parts in {"hidden": (1, 0), "replaced": (0, 1), "left": (0, 0)}.items():
        mask = model.config.mask_token
        read, chosen = hide(tokens, mask, n_vocab, seed=0, step=0, parts=parts)
        weights = chosen / chosen.sum()
        found[name] = weighted_loss(model, read, tokens, weights).item()
    return found


def train_one(name: str) -> GPT:
    """An encoder, trained or read from where it was saved; writes its losses."""
    steps, share, parts = ENCODERS[name]
    config, path = encoder_config(steps), WEIGHTS / f"{name.replace(' ', '-')}.pt"
    model = fresh_model(config)
    data = open_corpus(config, None, False)
    assert mask_token(data.tokenizer) == config.model.mask_token
    record = LEDGER.read("training")
    if not (name in record and path.exists()):
        n_vocab = data.tokenizer.n_vocab
        batches = MaskedBatches(data.batches, 251, n_vocab, share, parts)
        ids = data.eval_batches.ids
        tokens = crops(ids, data.eval_batches.offsets(2**63), DEMO.model.block_size)[0]
        state = TrainState(model, optimizer_of(model, config))
        rows, began = [], time.perf_counter()

        def look() -> None:
            model.eval()
            losses = {k: round(v, 4) for k, v in sorts(model, tokens, n_vocab).items()}
            rows.append({"step": state.step, **losses})
            print(name, rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
            model.train()

        def on_step(row: dict) -> bool:
            if row["step"] % 80 == 0 or row["step"] in (40, steps):
                look()
            return False

        look()
        module = WithLoss(model, weighted_loss)
        train(state, module, batches, config, micro_batch_size=12, on_step=on_step)
        seconds = round(time.perf_counter() - began)
        settings = {"steps": steps, "share": share, "parts": parts}
        record = LEDGER.read("training")
        record[name] = settings | {"seconds": seconds, "rows": rows}
        LEDGER.write("training", record)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model.eval()


def bare_blanks(tokenizer) -> list[dict]:
    """The probes of recall: a title, and the first sentence up to the fact."""
    found = []
    for probe in fact_probes(TinyWiki(0)):
        if probe.family == "recall":
            left = [tokenizer.end_of_text, *tokenizer.encode(probe.prompt)]
            right = tokenizer.encode(" .")
            words = probe.candidates
            ids = [tokenizer.encode(" " + word) for word in words]
            entry = {"left": left, "right": right, "candidates": ids}
            found.append(entry | {"true": words.index(probe.answer)})
    return found


def blanks_in_place(tokenizer, famous: bool, n: int) -> list[dict]:
    """The first mention of a fact in articles that nobody was trained on."""
    found, number, block = [], 0, DEMO.model.block_size
    while len(found) < n:
        article = TinyWiki(0).article("test", number)
        number += 1
        kind, subject = article.subject.kind, article.subject
        asks = [ask.fact for ask in read_asks() if ask.kind == kind]
        if subject.famous != famous or not asks:
            continue
        fact = asks[number % len(asks)]  # each in turn
        values = pool(world()[kind].facts[fact].values, subject)
        words = [spell(0, value) for value in values]
        true = spell(0, TinyWiki(0).facts(*subject)[fact])
        start = article.text.index(" = \n", 3)  # after the title
        place = article.text.find(f" {true} ", start)
        if place < 0 or true not in words:
            continue
        left = [tokenizer.end_of_text, *tokenizer.encode(article.text[:place])]
        right = tokenizer.encode(article.text[place + 1 + len(true) :])
        ids = [tokenizer.encode(" " + word) for word in words]
        if len(left) + 8 < block:
            again = f" {true} " in article.text[place + len(true) :]
            entry = {"left": left, "right": right, "candidates": ids}
            found.append(entry | {"true": words.index(true), "again": again})
    return found


def choose(scores: list[float], blanks: list[dict]) -> str:
    """For each blank, r if the most probable candidate is the true one, else w."""
    found, scores = "", iter(scores)
    for blank in blanks:
        own = [next(scores) for _ in blank["candidates"]]
        found += "r" if own.index(max(own)) == blank["true"] else "w"
    return found


def fill_in(blanks: list[dict], name: str, model: GPT) -> str:
    """The grades of an encoder, or of the decoder on what comes before, or on all."""
    pairs, rows = [], []
    for b in blanks:
        for ids in b["candidates"]:
            room = DEMO.model.block_size - len(b["left"]) - len(ids)
            after = b["right"][:room] if name == "decoder, whole" else []
            pairs.append((b["left"], [*ids, *after]))
            rows.append((b["left"], ids, b["right"]))
    if name.startswith("decoder"):
        return choose(continuation_log_probs(model, pairs), blanks)
    return choose(blank_log_probs(model, rows).tolist(), blanks)


def make_blanks() -> None:
    run, record = demo(), LEDGER.read("blanks")
    models = {f"decoder, {how}": run.model for how in ("before", "whole")}
    models |= {name: train_one(name) for name in LEDGER.read("training")}
    tests = {
        "bare": bare_blanks(run.tokenizer),
        "famous": blanks_in_place(run.tokenizer, True, 100),
        "obscure": blanks_in_place(run.tokenizer, False, 100),
    }
    for test, blanks in tests.items():
        found = record.setdefault(test, {})
        n = sum(1 / len(b["candidates"]) for b in blanks) / len(blanks)
        found["chance"] = round(n, 4)
        found["again"] = "".join("ny"[b.get("again", False)] for b in blanks)
        for name, model in models.items():
            if name not in found:
                grades = found[name] = fill_in(blanks, name, model)
                rate = grades.count("r") / len(grades)
                print(test, f"{n:.1%}", name, f"{rate:.1%}", flush=True)
                LEDGER.write("blanks", record)


@torch.no_grad()
def write_with_masks(model: GPT, start: list[int], n: int, ahead: int, seed: int):
    """Tokens that an encoder writes from left to right, each at a hidden place."""
    ids, draws = list(start), torch.Generator().manual_seed(seed)
    mask = model.config.mask_token
    for _ in range(n):
        read = torch.tensor([[*ids, *[mask] * ahead]])
        logits = model.head(model.hidden(read)[:, len(ids)])
        ids.append(draw(next_token_probs(logits), draws).item())
    return ids


@torch.no_grad()
def nats(decoder: GPT, ids: list[int]) -> float:
    """The decoder's mean nats per token of a text after its first token."""
    tokens = torch.tensor([ids])
    return decoder(tokens[:, :-1], tokens[:, 1:])[1].item()


def make_texts() -> None:
    """Pseudo-perplexity of test articles, and texts from left to right."""
    run, record = demo(), LEDGER.read("texts")
    for name in LEDGER.read("training"):
        model, entry = train_one(name), record.get(name, {})
        if entry:
            continue
        total, pseudo, plain = 0, 0.0, 0.0
        for number in range(10):
            text = TinyWiki(0).article("test", number).text
            ids = [run.tokenizer.end_of_text, *run.tokenizer.encode(text)]
            ids = ids[: DEMO.model.block_size]
            pseudo -= pseudo_log_probs(model, ids)[1:].sum().item()
            plain += nats(run.model, ids) * (len(ids) - 1)
            total += len(ids) - 1
        entry = {"tokens": total, "pseudo": round(pseudo / total, 4)}
        entry["decoder"] = round(plain / total, 4)
        start = [
            run.tokenizer.end_of_text,
            *run.tokenizer.encode(" \n = Blywell = \n \n"),
        ]
        for ahead in (1, 8):
            rows = [write_with_masks(model, start, 60, ahead, s) for s in range(16)]
            mean = sum(nats(run.model, row) for row in rows) / len(rows)
            entry[f"written, {ahead} hidden"] = round(mean, 4)
            texts = [run.tokenizer.decode(row[1:]) for row in rows[:2]]
            entry[f"texts, {ahead} hidden"] = texts
        tokens = torch.tensor([start] * 16)
        draws = torch.Generator().manual_seed(0)
        rows = generate(run.model, tokens, 60, generator=draws, n_vocab=1536).tolist()
        entry["written, decoder"] = round(sum(nats(run.model, r) for r in rows) / 16, 4)
        entry["texts, decoder"] = [run.tokenizer.decode(row[1:]) for row in rows[:2]]
        record = LEDGER.read("texts") | {name: entry}
        print(name, {k: v for k, v in entry.items() if "texts" not in k}, flush=True)
        LEDGER.write("texts", record)


SIZES, RATES, SEEDS = (10, 30, 100, 1000), (1e-3, 3e-3), (0, 1, 2)


@torch.no_grad()
def accuracy(model: Classifier, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return round((model(tokens).argmax(-1) == labels).float().mean().item(), 4)


def classify(base: GPT, place: int, data, n: int, rate: float, seed: int) -> list:
    """Accuracy on validation and test of a model fine-tuned on n labelled texts."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(base), len(world()), place)
    config = dataclasses.replace(
        DEMO,
        optimizer="adamw",
        learning_rate=rate,
        steps=120,
        batch_size=16,
        warmup_fraction=0.1,
        seed=seed,
    )
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:n]
    tokens, labels = data["train"]
    batches = LabelledBatches(tokens[order], labels[order], config.batch_size, seed)
    state = TrainState(model, optimizer_of(model, config))
    module = WithLoss(model, class_loss)
    train(state, module, batches, config, micro_batch_size=16)
    return [accuracy(model, *data[split]) for split in ("validation", "test")]


def make_kinds(show: bool) -> None:
    """Which kind is an article of? From 10 to 1,000 labelled beginnings."""
    run = demo()
    encoder = train_one("encoder")
    fresh = fresh_model(dataclasses.replace(encoder_config(1), zero_projections=False))
    models = {
        "decoder": (run.model, -1),
        "encoder": (encoder, 0),
        "untrained": (fresh, 0),
    }
    if "equal" in LEDGER.read("training"):
        models["equal"] = (train_one("equal"), 0)
    name = "kinds" if show else "kinds-left-out"
    data = {
        split: kind_examples(run.tokenizer, split, 1000, show=show)
        for split in ("train", "validation", "test")
    }
    record = LEDGER.read(name)
    counts = torch.bincount(data["test"][1], minlength=len(world()))
    record["most frequent"] = round(counts.max().item() / 1000, 4)
    for n in SIZES if show else SIZES[1:2]:
        for key, (base, place) in models.items():
            entry = record.setdefault(key, {}).setdefault(str(n), {})
            for rate in RATES if show else RATES[:1]:
                if f"{rate:g}" not in entry:
                    found = [classify(base, place, data, n, rate, s) for s in SEEDS]
                    entry[f"{rate:g}"] = found
                    mean = [round(sum(f) / len(f), 3) for f in zip(*found)]
                    print(name, n, key, rate, mean, flush=True)
                    LEDGER.write(name, record)


def make_trainings() -> None:
    rows = read_rows(demo().path / "metrics.jsonl")
    rows = [row for row in rows if "validation_loss" in row]
    losses = {row["step"]: round(row["validation_loss"], 4) for row in rows}
    LEDGER.write("decoder", {"validation_loss": losses})
    for name in ENCODERS:
        train_one(name)


PARTS = {
    "training": make_trainings,
    "blanks": make_blanks,
    "texts": make_texts,
    "left out": lambda: make_kinds(False),
    "kinds": lambda: make_kinds(True),
}


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        if part in ENCODERS:
            train_one(part)
        else:
            PARTS[part]()


if __name__ == "__main__":
    main()
