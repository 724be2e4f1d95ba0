"""What rewards change: the figures of chapter 23.

`python tools/rewards.py` trains the demo if GPTLIB_RUNS has no such run yet, fine-tunes
starts from it, and trains these on rewards. It writes ledger/rewards/NAME.json. About
fifteen minutes on two cores, and the demo's training. With names of parts (starts,
backwards, tinywiki, length, first_word) it makes these alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from gptlib.finetuning import (
    UNKNOWN,
    chat_batch,
    draw_answers,
    finetune,
    finetune_config,
    prompt_ids,
    test_sets,
)
from gptlib.pretraining import pretrain
from gptlib.rewards import (
    TASKS,
    Prompt,
    RewardSettings,
    answer_row,
    equal_share,
    fact_score,
    reply_text,
    reward,
    reward_config,
    score_groups,
    token_log_probs,
)
from gptlib.training import PRESETS
from gptlib.workshop.run_folders import Run, run_folder
from gptlib.workshop.runs import RunOptions
from gptlib.workshop.watching import read_rows


LEDGER = Path(__file__).parents[1] / "ledger" / "rewards"
RUNS = Path(os.environ.get("GPTLIB_RUNS", "runs"))
HOW = {"precision": "fp32", "progress": False, "micro_batch_size": 16, "device": "cpu"}


def write(name: str, record: dict) -> None:
    LEDGER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (LEDGER / f"{name}.json").write_text(text, encoding="utf-8")


def demo() -> Run:
    config = PRESETS["demo"]
    options = {"precision": "fp32", "progress": False}
    return pretrain(config, RunOptions(run_folder("demo", config), **options))


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
    return finetune(config, RunOptions(run_folder(f"start-{task}", config), **HOW))


def starts() -> None:
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
    write("starts", {"starts": found})


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


def rewarded(name: str, base: Run, settings: RewardSettings, **changes) -> Run:
    config = reward_config(base.path, settings, **changes)
    run = reward(config, RunOptions(run_folder(name, config), **HOW))
    return run if run.step == config.steps else sys.exit("stopped; the same goes on")


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


def rejection(
    name: str, base: Run, task: str, budget: int, n: int, rate: float
) -> tuple:
    """Rounds of: draw 8 answers to n prompts, keep the right ones, fine-tune on them.

    Until the budget of tokens is spent. Returns the last run, the tokens, the rounds.
    """
    run, prompts, spent, round_ = base, TASKS[task]()["train"], 0, 0
    while spent < budget:
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(round_)
        )
        some = [prompts[i] for i in order[:n].tolist()]
        replies, rewards = score_groups(run.model, run.tokenizer, some, seed=round_)
        kept, tokens = [], 0
        for p, group, scores in zip(some, replies, rewards, strict=True):
            length = len(prompt_ids(run.tokenizer, p.chat))
            tokens += sum(length + 1 + len(run.tokenizer.encode(t)) for t in group)
            right = {t for t, s in zip(group, scores.tolist()) if s == 1}
            kept += [Prompt(p.chat, t, p.score) for t in sorted(right)]
        data = with_answers(kept, RUNS / f"{name}-{round_}.jsonl")
        steps = max(10, 3 * len(kept) // 16)
        config = finetune_config(
            run.path, data, steps=steps, learning_rate=rate, eval_interval=steps
        )
        run = finetune(
            config, RunOptions(run_folder(f"{name}-{round_}", config), **HOW)
        )
        if run.step < steps:
            sys.exit("stopped; the same command goes on")
        spent += tokens + 3 * steps * 16 * tokens // (8 * n)
        round_ += 1
        print(
            name,
            round_,
            f"{len(kept)} kept of {n}, {spent:,} of {budget:,}",
            flush=True,
        )
    return run, spent, round_


def unfinished(name: str) -> dict:
    """What the ledger has of a part already; it is not measured again."""
    path = LEDGER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def against_rejection(
    task: str,
    base: Run,
    sets: dict,
    runs: dict[str, Callable[[], Run]],
    own: tuple[str, float, float],
) -> None:
    """Measure the start, the runs, and rejection sampling.

    own: its name, its rate, and how much of the first run's tokens it gets.
    """
    record = unfinished(task)
    if "start" not in record:
        record["start"] = measure(base, sets)
    for name, train in runs.items():
        if name not in record:
            run = train()
            part = {"settings": run.config.corpus, "log": log_of(run)}
            group = RewardSettings.read(run.config.corpus).group
            part |= {"cost": cost(run, task, group), "sets": measure(run, sets)}
            record[name] = part
            write(task, record)
    if "rejection" not in record:
        name, rate, part_of_it = own
        budget = int(part_of_it * record[next(iter(runs))]["cost"])
        run, spent, rounds = rejection(name, base, task, budget, 200, rate)
        part = {"cost": spent, "rounds": rounds, "sets": measure(run, sets)}
        write(task, record | {"rejection": part})


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
    against_rejection("backwards", base, sets, runs, ("own-words", 5e-4, 1.0))


def tinywiki() -> None:
    base, changes = start_of("tinywiki", 60), {"learning_rate": 2e-4, "batch_size": 16}
    train = partial(rewarded, "tinywiki", base, RewardSettings(), steps=80, **changes)
    against_rejection(
        "tinywiki", base, tinywiki_sets(), {"rewards": train}, ("own-facts", 3e-4, 0.55)
    )


def hack(task: str, score: Callable[[Prompt, str], float], steps: int) -> None:
    """Train on a flawed reward without a KL; both scores at five points and the end."""
    base, sets, curve = start_of("tinywiki", 60), tinywiki_sets(), []
    prompts = [
        p for k in ("trained", "new wording", "never told") for p in sets[k][::4]
    ]
    settings = RewardSettings(task, kl=0.0)
    changes = {"batch_size": 16, "learning_rate": 3e-4, "eval_interval": steps}
    config = reward_config(base.path, settings, steps=steps, **changes)
    options, run = (
        RunOptions(run_folder(task, config), max_steps=steps // 5, **HOW),
        base,
    )
    for step in range(0, steps + 1, steps // 5):
        run = reward(config, options) if step else base
        texts = [text for _, text in stated(run, prompts)]
        pairs = list(zip(prompts, texts, strict=True))
        row = {"step": run.step if step else 0}
        row["right"] = fmean(p.score(t) == 1 for p, t in pairs)
        row["flawed"] = fmean(score(p, t) for p, t in pairs)
        curve.append(row | {"examples": [texts[0], texts[60], texts[-1]]})
        print(task, curve[-1], flush=True)
    record = {"settings": settings.name, "n": len(prompts), "curve": curve}
    write(task, record | {"log": log_of(run)})


def length() -> None:
    hack("tinywiki-length", lambda p, text: min(len(text.split()), 20) / 20, 20)


def first_word() -> None:
    same = lambda p, text: text.split(" ")[0] == p.answer.split(" ")[0]
    hack("tinywiki-first-word", same, 40)


PARTS = {p.__name__: p for p in (starts, backwards, tinywiki, length, first_word)}


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
