"""What fine-tuning on TinyWiki's questions changes: the figures of chapter 21.

`python ledger/finetuning.py` trains the demo if GPTLIB_RUNS has no such run yet, then
fine-tunes it on each set of questions. It writes ledger/finetuning/NAME.json for the
base, for the end of each fine-tuning, and for its best checkpoint by validation loss.
`python ledger/finetuning.py NAME ...` makes only these. About ten minutes on two cores,
and the demo's training.

`python ledger/finetuning.py instructions FILE` pretrains a small model on the corpus
`books`, and fine-tunes it on a file of instructions: a JSON list of objects with
`instruction`, `input` and `output`. About twenty minutes on one core.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import torch
from entries import HOW, RUNS, Entries, demo

from gptlib.corpus import load_corpus
from gptlib.evaluation import evaluate
from gptlib.finetuning import (
    SETTINGS,
    answers,
    chat_batch,
    finetune,
    finetune_config,
    fit_chats,
    forget,
    load_chats,
    replies,
    stream_reply,
    weighted_loss,
)
from gptlib.workshop.questions import QUESTIONS, recalls, test_sets
from gptlib.workshop.run_folders import Run, load_run, run_folder
from gptlib.workshop.runs import RunOptions
from gptlib.workshop.token_files import load_tokens
from gptlib.workshop.watching import read_rows


LEDGER = Entries(__file__)
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
    LEDGER.write(name, record)


SMALL = """pretrain --preset demo --corpus books --tokenizer bpe-4096 --crops random
--model.n-layer 4 --model.n-embd 192 --model.block-size 256 --model.vocab-size 4096
--steps 800 --max-steps 240 --precision fp32 --no-progress --device cpu
--out RUNS/books-small"""
TUNE = """finetune --run RUNS/books-small --data RUNS/instructions.jsonl
--precision fp32 --no-progress --device cpu --out RUNS/instructed"""


def instruction_chat(one: dict[str, str]) -> list[dict[str, str]]:
    asked = "\n".join(text for text in (one["instruction"], one["input"]) if text)
    turns = {"user": asked, "assistant": one["output"]}
    return [{"role": role, "content": text} for role, text in turns.items()]


@torch.no_grad()
def answer_loss(run: Run, chats: list) -> float:
    """Mean nats per token of the answers that fit the block."""
    rows, _, _ = fit_chats(run.tokenizer, chats, run.model.config.block_size)
    total = sum(sum(learned) for _, learned in rows)
    parts = (weighted_loss(run.model, *chat_batch([row], 1.0)) for row in rows)
    return sum(part.item() for part in parts) / total


def leg(run: Run) -> dict:
    """What a run was, its seconds in steps, and its last validation loss."""
    record = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    kept = {key: record[key] for key in ("config", "machine", "code")}
    rows = read_rows(run.path / "timings.jsonl")
    kept["seconds"] = round(sum(row.get("seconds_per_step", 0) for row in rows))
    rows = read_rows(run.path / "metrics.jsonl")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    parameters = run.model.n_parameters(include_positions=True)
    return kept | {
        "step": run.step,
        "parameters": parameters,
        "validation_loss": losses[-1],
    }


def instructions(path: Path) -> None:
    """Pretrain on books, fine-tune on instructions, and write both to the ledger."""
    triples = json.loads(path.read_text(encoding="utf-8"))
    data = RUNS / "instructions.jsonl"
    lines = [json.dumps({"messages": instruction_chat(one)}) for one in triples]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for words in (SMALL, TUNE):
        if Path(words.split()[-1].replace("RUNS", str(RUNS)), "run.json").exists():
            continue  # taken as it stands
        command = words.replace("RUNS", str(RUNS)).split()
        shell = [sys.executable, "-m", "gptlib.workshop.command", *command]
        subprocess.run(shell, check=True)
    base = load_run(RUNS / "books-small")  # the best, which the fine-tuning began with
    tuned = load_run(RUNS / "instructed", "last")
    splits = load_chats(str(data))
    asked = [chat[:1] for chat in splits["validation"][::9][:6]]
    texts = [chat[0]["content"] for chat in asked]
    before = [base.sample(text, 40, temperature=0)[len(text) :] for text in texts]
    after = replies(tuned.model, tuned.tokenizer, asked)
    wanted = [chat[1]["content"] for chat in splits["validation"][::9][:6]]
    record = {
        "commands": [" ".join(words.split()) for words in (SMALL, TUNE)],
        "conversations": {name: len(chats) for name, chats in splits.items()},
        "base": leg(base),
        "tuned": leg(tuned),
        "answer_loss": {
            name: [answer_loss(run, chats) for run in (base, tuned)]
            for name, chats in splits.items()
        },
        "samples": [list(four) for four in zip(texts, before, after, wanted)],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False).replace(str(RUNS), "runs")
    (LEDGER.folder / "instructions.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    if sys.argv[1:2] == ["instructions"]:
        return instructions(Path(sys.argv[2]))
    base, sets = demo(), test_sets()
    names = sys.argv[1:] or ["base", *PLAN]
    if "base" in names:
        measure(base, "base", sets)
    for name in (name for name in PLAN if name in names):
        data, steps = PLAN[name]
        config = finetune_config(
            base.path, data, steps=steps, batch_size=20 if "+" in data else 16
        )
        how = HOW | {"micro_batch_size": 4 if "+" in data else 16}
        run = finetune(config, RunOptions(run_folder(name, config), **how))
        measure(run, name, sets)
        best = load_run(run.path, "best")  # by the loss on held-out conversations
        if best.step < run.step:
            measure(best, f"{name}-best", sets)


if __name__ == "__main__":
    main()
