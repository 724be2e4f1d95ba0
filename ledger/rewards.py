"""What rewards change: the figures of chapter 23.

`python ledger/rewards.py` trains the demo if GPTLIB_RUNS has no such run yet,
fine-tunes starts from it, and trains these on rewards. It writes
ledger/rewards/NAME.json. About half an hour on two cores, and the demo's training.
With names of parts (starts, backwards, tinywiki, length, first_word) it makes these
alone. What the ledger has is not made again; delete a file to make it anew.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from entries import HOW, RUNS, Entries, demo

from gptlib.finetuning import (
    chat_batch,
    draw_answers,
    finetune,
    finetune_config,
    prompt_ids,
)
from gptlib.rewards import (
    RewardSettings,
    answer_row,
    equal_share,
    reply_text,
    reward,
    reward_config,
    score_groups,
    token_log_probs,
)
from gptlib.workshop.checkpoints import Checkpoints
from gptlib.workshop.questions import TASKS, UNKNOWN, Prompt, fact_score, test_sets
from gptlib.workshop.run_folders import Run, run_folder
from gptlib.workshop.runs import RunOptions
from gptlib.workshop.watching import read_rows


LEDGER = Entries(__file__)
SIXTEEN = HOW | {"micro_batch_size": 16}


def some_of(prompts: list[Prompt], n: int) -> list[Prompt]:
    """Some of the prompts, chosen by a seed, so that no pattern of theirs counts."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1))
    return [prompts[i] for i in order[:n].tolist()]


def with_answers(prompts: list[Prompt], path: Path) -> str:
    """A file of conversations with right answers."""
    turns = [[*p.chat, {"role": "assistant", "content": p.answer}] for p in prompts]
    lines = "".join(json.dumps({"messages": turn}) + "\n" for turn in turns)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def start_of(task: str, steps: int) -> Run:
    """The demo, fine-tuned for some steps."""
    data, changes = "tinywiki-questions", {}
    if task == "backwards":  # a quarter of the words
        words = TASKS["backwards"]()["train"][::4]
        data, changes = (
            with_answers(words, RUNS / "words.jsonl"),
            {"learning_rate": 2e-3},
        )
    config = finetune_config(demo().path, data, steps=steps, **changes)
    out = run_folder(f"start-{task}", config)
    return whole(finetune(config, RunOptions(out, **SIXTEEN)))


def starts() -> None:
    if LEDGER.read("starts"):
        return
    found = []
    for task, steps in (
        *(("tinywiki", n) for n in (15, 30, 60, 120)),
        *(("backwards", n) for n in (25, 50, 100, 200)),
    ):
        run = start_of(task, steps)
        for name in (task, "backwards-exact") if task == "backwards" else (task,):
            prompts = TASKS[name]()["train"]
            some = some_of(prompts, 100)
            _, rewards = score_groups(run.model, run.tokenizer, some)
            row = {"task": name, "steps": steps, "mean": rewards.mean().item()}
            row |= {"right": (rewards == 1).float().mean().item()}
            found.append(row | {"equal": equal_share(rewards)})
            print(found[-1], flush=True)
    LEDGER.write("starts", {"starts": found})


def stated(run: Run, prompts: list[Prompt]) -> list[tuple[float, str]]:
    """The most probable answers: their stated probabilities, and their texts."""
    model, tokenizer, found = run.model, run.tokenizer, []
    ids = [prompt_ids(tokenizer, p.chat) for p in prompts]
    drawn = draw_answers(model, tokenizer, ids, range(len(ids)), temperature=0.0)
    for i in range(0, len(ids), 64):
        rows = [answer_row(*pair) for pair in zip(ids[i : i + 64], drawn[i : i + 64])]
        with torch.no_grad():
            logs = token_log_probs(model, *chat_batch(rows, 1.0), tokenizer.n_vocab)
        texts = [reply_text(tokenizer, a) for a in drawn[i : i + 64]]
        found += zip(logs.sum(1).exp().tolist(), texts, strict=True)
    return found


def measure(run: Run, sets: dict[str, list[Prompt]]) -> dict:
    """Greedy rewards, stated probabilities, and groups of 8, for each set."""
    found = {}
    for name, prompts in sets.items():
        pairs = stated(run, prompts)
        scores = [p.score(text) for p, (_, text) in zip(prompts, pairs, strict=True)]
        some = some_of(prompts, 64)
        _, rewards = score_groups(run.model, run.tokenizer, some, seed=9)
        found[name] = {
            "rewards": [round(s, 3) for s in scores],
            "declined": "".join(str(int(text == UNKNOWN)) for _, text in pairs),
            "stated": [round(p, 4) for p, _ in pairs],
            "n_groups": len(some),
            "drawn": (rewards == 1).float().mean().item(),
            "best_of_8": (rewards == 1).any(1).float().mean().item(),
            "equal": equal_share(rewards),
        }
        right = fmean(s == 1 for s in scores)
        brief = {k: round(v, 3) for k, v in found[name].items() if isinstance(v, float)}
        print("   ", name, round(right, 3), brief, flush=True)
    return found


def tinywiki_sets() -> dict[str, list[Prompt]]:
    """Chapter 21's test sets as prompts."""
    found = {}
    for name, some in test_sets().items():
        told = name != "never told"
        found[name] = [
            Prompt(
                q.chat()[:1],
                q.answer if told else UNKNOWN,
                partial(fact_score, q, told),
            )
            for q in some
        ]
    return found


def whole(run: Run) -> Run:
    """A run that came to its end; one that was stopped is never measured."""
    if run.step < run.config.steps:
        sys.exit(f"stopped at step {run.step}; the same command goes on")
    return run


def rewarded(name: str, base: Run, settings: RewardSettings, **changes) -> Run:
    config = reward_config(base.path, settings, **changes)
    options = RunOptions(run_folder(name, config), keep=99, **SIXTEEN)
    return whole(reward(config, options))


def log_of(run: Run) -> list[dict]:
    """A row for each step: means over its groups."""
    rows, found = read_rows(run.path / "rollouts.jsonl"), []
    for step in sorted({row["step"] for row in rows}):
        some = [row for row in rows if row["step"] == step]
        row = {"step": step, "kl": fmean(r["kl"] for r in some)}
        row["clipped"] = fmean(r["clipped"] for r in some)
        if "rewards" in some[0]:
            row["reward"] = fmean(fmean(r["rewards"]) for r in some)
            row["equal"] = fmean(len(set(r["rewards"])) == 1 for r in some)
        found.append({k: round(v, 5) for k, v in row.items()})
    return found


def cost(run: Run, task: str, group: int) -> int:
    """Tokens of a run with rewards, as forward passes.

    A drawn token is one; in a step it is three, and one for the reference.
    """
    ids = [len(prompt_ids(run.tokenizer, p.chat)) for p in TASKS[task]()["train"]]
    total = 0
    for row in read_rows(run.path / "rollouts.jsonl"):
        tokens = row["tokens"] + group * ids[row["prompt"]]
        total += tokens * (5 if "replies" in row else 4)
    return total


def rejection(name: str, base: Run, task: str, budget: int, rate: float) -> dict:
    """Rounds of: draw 8 answers to 200 prompts, fine-tune on the right ones.

    As many as the budget of tokens allows, if each costs what the last one did.
    """
    run, prompts, spent, last, kept_each = base, TASKS[task]()["train"], 0, 0, []
    while spent + last <= budget:
        round_ = len(kept_each)
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(round_)
        )
        some = [prompts[i] for i in order[:200].tolist()]
        replies, rewards = score_groups(run.model, run.tokenizer, some, seed=round_)
        kept = []
        for p, group, scores in zip(some, replies, rewards, strict=True):
            right = {t for t, s in zip(group, scores.tolist()) if s == 1}
            kept += [Prompt(p.chat, t, p.score) for t in sorted(right)]
        data = with_answers(kept, RUNS / f"{name}-{round_}.jsonl")
        steps = max(10, 3 * len(kept) // 16)
        config = finetune_config(
            run.path, data, steps=steps, learning_rate=rate, eval_interval=steps
        )
        out = RunOptions(run_folder(f"{name}-{round_}", config), **SIXTEEN)
        drawn = n_tokens(run, some, replies)
        run = whole(finetune(config, out))
        last = drawn + 3 * steps * 16 * drawn // (8 * len(some))
        spent += last
        kept_each.append(len(kept))
        print(name, kept_each, f"{spent:,} of {budget:,}", flush=True)
    return {"cost": spent, "kept": kept_each, "run": run}


def n_tokens(run: Run, prompts: list[Prompt], replies: list[list[str]]) -> int:
    """Tokens of the replies, each with its prompt and the mark of its end."""
    total = 0
    for p, group in zip(prompts, replies, strict=True):
        length = len(prompt_ids(run.tokenizer, p.chat)) + 1
        total += sum(length + len(run.tokenizer.encode(text)) for text in group)
    return total


def best_of(run: Run, sets: dict[str, list[Prompt]], budget: int) -> dict:
    """How many of n drawn answers are right, for 64 questions of each set.

    n is what the budget of tokens buys, if all of it goes into these questions.
    """
    asked = {name: some_of(prompts, 64) for name, prompts in sets.items()}
    found = {name: [0] * len(some) for name, some in asked.items()}
    spent, last, n = 0, 0, 0
    while spent + last <= budget:
        last = 0
        for name, some in asked.items():
            replies, rewards = score_groups(
                run.model, run.tokenizer, some, seed=100 + n
            )
            last += n_tokens(run, some, replies)
            rights = (rewards == 1).sum(1).tolist()
            found[name] = [a + b for a, b in zip(found[name], rights, strict=True)]
        spent, n = spent + last, n + 8
    for name, rights in found.items():
        print("    best of", n, name, fmean(r > 0 for r in rights), flush=True)
    return {"cost": spent, "n": n, "right": found}


def compare(
    task: str,
    base: Run,
    sets: dict,
    runs: dict[str, Callable[[], Run]],
    own: tuple[str, float],
) -> None:
    """Measure the start, the runs, and at the first one's cost two competitors.

    own: the name of rejection sampling's data, and its learning rate.
    """
    record = LEDGER.read(task)

    def add(name: str, make: Callable[[], dict]) -> None:
        if name not in record:
            began = time.perf_counter()
            part = make()
            if run := part.pop("run", None):
                part["sets"] = measure(run, sets)
            record[name] = part | {"seconds": round(time.perf_counter() - began)}
            LEDGER.write(task, record)

    def with_rewards(train: Callable[[], Run]) -> dict:
        run = train()
        group = RewardSettings.read(run.config.corpus).group
        part = {"settings": run.config.corpus, "log": log_of(run), "run": run}
        return part | {"cost": cost(run, task, group)}

    add("start", lambda: {"run": base})
    for name, train in runs.items():
        add(name, partial(with_rewards, train))
    budget = record[next(iter(runs))]["cost"]
    add("rejection", lambda: rejection(own[0], base, task, budget, own[1]))
    add("best_of", lambda: best_of(base, sets, budget))


def backwards() -> None:
    base, splits = start_of("backwards", 100), TASKS["backwards"]()
    sets = {"train": some_of(splits["train"], 200), "validation": splits["validation"]}
    changes = {"learning_rate": 6e-4, "batch_size": 16}
    runs = {
        f"updates-{n}": partial(
            rewarded,
            f"backwards-{n}",
            base,
            RewardSettings("backwards", updates=n),
            steps=60 * n,
            **changes,
        )
        for n in (1, 4)
    }
    compare("backwards", base, sets, runs, ("own-words", 5e-4))


def tinywiki() -> None:
    base, changes = start_of("tinywiki", 60), {"learning_rate": 2e-4, "batch_size": 16}
    train = partial(rewarded, "tinywiki", base, RewardSettings(), steps=80, **changes)
    compare("tinywiki", base, tinywiki_sets(), {"rewards": train}, ("own-facts", 3e-4))


def hack(task: str, score: Callable[[Prompt, str], float], steps: int) -> None:
    """Train on a flawed reward without a KL; both scores at the start and 5 times."""
    if LEDGER.read(task):
        return
    base, sets, curve = start_of("tinywiki", 60), tinywiki_sets(), []
    prompts = [
        p for k in ("trained", "new wording", "never told") for p in sets[k][::4]
    ]
    settings = RewardSettings(task, kl=0.0)
    changes = {"batch_size": 16, "learning_rate": 3e-4, "eval_interval": steps // 5}
    run = rewarded(task, base, settings, steps=steps, **changes)
    checkpoints = Checkpoints(run.path / "checkpoints")
    for step in range(0, steps + 1, steps // 5):
        if step:
            run.model.load_state_dict(checkpoints.load(step, model_only=True)["model"])
        texts = [text for _, text in stated(run if step else base, prompts)]
        pairs = list(zip(prompts, texts, strict=True))
        row = {"step": step, "right": fmean(p.score(t) == 1 for p, t in pairs)}
        row["flawed"] = fmean(score(p, t) for p, t in pairs)
        curve.append(row | {"examples": [texts[0], texts[60], texts[-1]]})
        print(task, curve[-1], flush=True)
    record = {"settings": settings.name, "n": len(prompts), "curve": curve}
    LEDGER.write(task, record | {"log": log_of(run)})


def length() -> None:
    hack("tinywiki-length", lambda p, text: min(len(text.split()), 20) / 20, 20)


def first_word() -> None:
    same = lambda p, text: text.split(" ")[0] == p.answer.split(" ")[0]
    hack("tinywiki-first-word", same, 40)


PARTS = {p.__name__: p for p in (starts, backwards, tinywiki, length, first_word)}


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
