"""Does a branch end where a run planned for its length ends?

`python ledger/branching.py` trains, for three seeds, a run planned for 400 steps up to
step 100, a branch off it (200 steps, half of them cooling down), and a run that was
planned for 200 steps from the start. They differ in the warm-up alone: it has 5% of the
steps that were planned. Each result is a line of ledger/branching/runs.jsonl, and a
line that is there is not made again. Small models on TinyWiki; about two minutes.
"""

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from entries import HOW

from gptlib.corpus import load_corpus
from gptlib.evaluation import evaluate
from gptlib.pretraining import pretrain
from gptlib.training import PRESETS, TrainConfig
from gptlib.workshop.run_folders import Run
from gptlib.workshop.runs import RunOptions, branch_run
from gptlib.workshop.token_files import load_tokens
from gptlib.workshop.watching import read_rows


LEDGER = Path(__file__).with_suffix("") / "runs.jsonl"
DEMO = PRESETS["demo"]
LONG = dataclasses.replace(
    DEMO,
    model=dataclasses.replace(DEMO.model, n_embd=64, block_size=128),
    steps=400,
    batch_size=8,
    cooldown_fraction=0.5,
    eval_interval=100,
    eval_sequences=16,
)


def options(out: Path, max_steps: int | None = None) -> RunOptions:
    return RunOptions(out, max_steps=max_steps, **HOW)


def loss_of(run: Run) -> float:
    """Nats per token on the whole validation split, each document alone."""
    tokens = load_tokens(load_corpus("tinywiki"), run.tokenizer).split("validation")
    how = {"corpus": "tinywiki", "separate": True, "batch_size": 32}
    return evaluate(run.model, tokens, run.tokenizer, **how).nats_per_token


def pair(seed: int, folder: Path) -> tuple[Run, Run]:
    """The branch of a seed, and the run planned for its length."""
    long = dataclasses.replace(LONG, seed=seed)
    pretrain(long, options(folder / "long", max_steps=100))
    config: TrainConfig = branch_run(folder / "long", folder / "branch")
    planned = dataclasses.replace(long, steps=config.steps)
    return (
        pretrain(config, options(folder / "branch")),
        pretrain(planned, options(folder / "planned")),
    )


def main() -> None:
    rows = read_rows(LEDGER)
    for seed in {1, 2, 3} - {row["seed"] for row in rows}:
        with tempfile.TemporaryDirectory() as folder:
            branch, planned = pair(seed, Path(folder))
            row = {"seed": seed, "steps": branch.step}
            for name, run in (("branch", branch), ("planned", planned)):
                row[f"{name}_warmup_steps"] = run.config.spans()["warmup_steps"]
                row[name] = loss_of(run)
        rows.append(row)
        LEDGER.parent.mkdir(exist_ok=True)
        with LEDGER.open("a") as file:
            file.write(json.dumps(row) + "\n")
    for row in rows:
        print(f"seed {row['seed']}: {row['branch']:.3f} {row['planned']:.3f}")
    gaps = [row["branch"] - row["planned"] for row in rows]
    spread = statistics.stdev(row["planned"] for row in rows)
    print(
        f"branch - planned: mean {statistics.mean(gaps):+.4f}; planned: sd {spread:.4f}"
    )


if __name__ == "__main__":
    main()
