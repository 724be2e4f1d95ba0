"""What fine-tuning on TinyWiki's questions changes: the figures of chapter 21.

`python tools/finetuning.py` trains the demo if GPTLIB_RUNS has no such run yet, then
fine-tunes it on each set of questions. It writes ledger/finetuning/NAME.json for the
base, for the end of each fine-tuning, and for its best checkpoint by validation loss.
`python tools/finetuning.py NAME ...` makes only these. About ten minutes on two cores,
and the demo's training.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from statistics import fmean

from gptlib.corpus import load_corpus
from gptlib.evaluation import evaluate
from gptlib.finetuning import (
    SETTINGS,
    answers,
    finetune,
    finetune_config,
    forget,
    recalls,
    stream_reply,
)
from gptlib.pretraining import pretrain
from gptlib.training import PRESETS
from gptlib.workshop.questions import QUESTIONS, test_sets
from gptlib.workshop.runs import Run, RunOptions, load_run
from gptlib.workshop.token_files import load_tokens


LEDGER = Path(__file__).parents[1] / "ledger" / "finetuning"
RUNS = Path(os.environ.get("GPTLIB_RUNS", "runs"))
PLAN = {name: (name, 200) for name in QUESTIONS if not name.endswith("-all")} | {
    "replay": ("tinywiki-questions+tinywiki", 400),
    "replay-all": ("tinywiki-questions-all+tinywiki", 400),
}  # name in the ledger: data, steps
TEN = (  # one conversation: the set and the number of a question, or a question
    ("new wording", 0),
    ("new wording", 60),
    ("new wording", 120),
    ("new entity", 0),
    ("new entity", 40),
    ("both new", 20),
    ("never told", 0),
    ("never told", 50),
    "Philadelphia is in what U.S. state?",
    "Who are you ?",
)


def ten_questions(run: Run, sets: dict) -> list[list[str]]:
    """Ten questions in one conversation, each with the reply as it came."""
    messages, found, block = [], [], run.model.config.block_size
    for asked in TEN:
        text = asked if isinstance(asked, str) else sets[asked[0]][asked[1]].text
        messages.append({"role": "user", "content": text})
        messages = forget(run.tokenizer, messages, block, block // 4)
        pieces = stream_reply(run.model, run.tokenizer, messages, temperature=0)
        reply = "".join(pieces).strip()
        messages.append({"role": "assistant", "content": reply or "..."})
        found.append([text, reply])
    return found


def measure(run: Run, name: str, sets: dict) -> None:
    """Measure a model and write its file of the ledger."""
    found = {}
    for key, some in sets.items():
        texts = answers(run.model, run.tokenizer, some)
        grades = "".join(q.grade(text)[0] for q, text in zip(some, texts, strict=True))
        chance = fmean(1 / len(q.candidates) for q in some)
        found[key] = {"grades": grades, "chance": chance}
        found[key]["examples"] = [
            [q.text, text, q.answer] for q, text in list(zip(some, texts))[::40]
        ]
        if key in ("trained", "new entity"):
            known = recalls(run.model, run.tokenizer, some)
            found[key]["recalls"] = "".join(str(int(k)) for k in known)
        print(name, key, {g: grades.count(g) for g in "rwd"}, flush=True)
    split = load_tokens(load_corpus("tinywiki"), run.tokenizer).split("validation")
    text = evaluate(run.model, split, run.tokenizer, corpus="tinywiki", separate=True)
    loss = {"nats": text.nats, "tokens": text.tokens, "floor": text.floor}
    loss["nats_per_token"] = text.nats_per_token
    loss["interval"] = text.interval()
    print(name, "encyclopedia", loss["nats_per_token"], loss["interval"], flush=True)
    record = {"model": name, "step": run.step, "settings": SETTINGS, "sets": found}
    record |= {"encyclopedia": loss, "ten": ten_questions(run, sets)}
    for question, reply in record["ten"]:
        print(f"    {question}  ->  {reply}", flush=True)
    LEDGER.mkdir(parents=True, exist_ok=True)
    path = LEDGER / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    demo = PRESETS["demo"]
    key = hashlib.sha256(repr(demo).encode()).hexdigest()[:8]
    out, options = RUNS / f"demo-{key}", {"precision": "fp32", "progress": False}
    base = pretrain(demo, RunOptions(out, **options))
    sets = test_sets()
    names = sys.argv[1:] or ["base", *PLAN]
    if "base" in names:
        measure(base, "base", sets)
    for name in (name for name in PLAN if name in names):
        data, steps = PLAN[name]
        config = finetune_config(
            out, data, steps=steps, batch_size=20 if "+" in data else 16
        )
        here = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
        options["micro_batch_size"] = 4 if "+" in data else 16
        run = finetune(config, RunOptions(RUNS / f"{name}-{here}", **options))
        measure(run, name, sets)
        best = load_run(run.path, "best")  # by the loss on held-out conversations
        if best.step < run.step:
            measure(best, f"{name}-best", sets)


if __name__ == "__main__":
    main()
