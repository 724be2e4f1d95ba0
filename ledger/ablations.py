"""Ablations: which change of training or of the model reaches a loss with fewer tokens?

`python ledger/ablations.py GROUP` runs what the group still lacks in
ledger/ablations/runs.jsonl, two runs at a time with one thread each. Chapter 24 shows
the groups from `parts` on, and the page "What did not work" the others. Model, data and
budget were fixed before the first run: 4 layers of width 128 on the books, a vocabulary
of 2,048 tokens trained on them, 2,048,000 tokens of training (a third of it where
said), every schedule scaled to the length of its run. The final loss is that of the
same 131,072 validation tokens. `parts-tinywiki` trains the preset `demo`; the
chapter shows the loss that these runs measured themselves. Needs GPTLIB_DATA, the
folder that holds `books`.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from gptlib.corpus import load_corpus
from gptlib.decoder import all_fields, model_config
from gptlib.evaluation import token_losses
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import PRESETS, TrainConfig
from gptlib.workshop.devices import describe_code
from gptlib.workshop.files import cache_dir
from gptlib.workshop.runs import RunOptions, run_training
from gptlib.workshop.token_files import load_tokens
from gptlib.workshop.watching import read_rows


LEDGER = Path(__file__).with_suffix("") / "runs.jsonl"
STEPS = 1000  # of 16 x 128 tokens
ADAMW, MUON = 4e-3, 8e-3  # the best of the group `rates`, at the report's schedule
REPORT = {"warmup_fraction": 800 / 3400, "decay_fraction": 6000 / 3400}
WARM, WHOLE = {"warmup_fraction": 0.05}, {"decay_fraction": 1.0}
TRAPEZOID = {"schedule": "trapezoid", "cooldown_fraction": 0.5}
MUON_ON = {"optimizer": "muon", "learning_rate": MUON}
ALL = (
    WARM | TRAPEZOID | MUON_ON | {"final_learning_rate": 0.0, "zero_projections": True}
)


def named_rates(prefix: str, rates: list[float], **changes) -> dict[str, dict]:
    return {f"{prefix} {rate:g}": {"learning_rate": rate} | changes for rate in rates}


# group -> (candidates: name -> what differs from the report's recipe, seeds)
GROUPS = {
    "rates": (
        named_rates("adamw", [2e-3, 4e-3, 8e-3, 1.6e-2])
        | named_rates("muon", [4e-3, 8e-3, 1.6e-2, 3.2e-2], optimizer="muon"),
        [1],
    ),
    "single": (
        {
            "report": {},
            "short warm-up": WARM,
            "whole cosine": WHOLE,
            "trapezoid": TRAPEZOID | {"final_learning_rate": 0.0},
            "zero projections": {"zero_projections": True},
            "muon": MUON_ON,
        },
        [1, 2, 3],
    ),
    "together": (
        {
            "all changes": ALL,
            "all, a third of the tokens": ALL | {"steps": STEPS // 3},
            "all, half the tokens": ALL | {"steps": STEPS // 2},
            "all, half the batch, a third of the tokens": ALL
            | {"batch_size": 8, "steps": 2 * STEPS // 3},
        },
        [1, 2, 3],
    ),
    # `together` had shown that a third of the tokens is too few; can another rate help?
    "third": (
        {
            "a third, rate halved": ALL
            | {"steps": STEPS // 3, "learning_rate": MUON / 2},
            "a third, rate doubled": ALL
            | {"steps": STEPS // 3, "learning_rate": MUON * 2},
            "a third, a quarter of the batch": ALL
            | {"batch_size": 4, "steps": 4 * STEPS // 3},
            "a third, a quarter of the batch, rate halved": ALL
            | {"batch_size": 4, "steps": 4 * STEPS // 3, "learning_rate": MUON / 2},
            "a third, half the batch, rate halved": ALL
            | {"batch_size": 8, "steps": 2 * STEPS // 3, "learning_rate": MUON / 2},
        },
        [1, 2, 3],
    ),
}

# chapter 24: the best third of the tokens so far, with other parts of the model
THIRD = ALL | {"batch_size": 8, "steps": 2 * STEPS // 3}
MODERN = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "qk_norm": True}
PARTS = {
    "gpt2": {},
    "rms": {"norm": "rms"},
    "qk-norm": {"qk_norm": True},
    "grouped": {"n_kv_head": 2},
    "swiglu": {"mlp": "swiglu"},
    "rotary": {"positions": "rotary"},
    "alibi": {"positions": "alibi"},
    "modern": MODERN,
    "modern with alibi": MODERN | {"positions": "alibi"},
}
FACTORS = (0.5, 2)  # of the rate that was best for GPT-2's parts


def part(name: str, factor: float) -> dict:
    """What differs from the report's recipe: these parts, at this share of the rate."""
    return THIRD | {"model": PARTS[name], "learning_rate": MUON * factor}


GROUPS["parts"] = ({name: part(name, 1) for name in PARTS}, [1, 2, 3])
GROUPS["part-rates"] = (
    {
        f"{name}, rate {factor:g}": part(name, factor)
        for name in ("gpt2", "rotary", "alibi", "modern")
        for factor in FACTORS
    },
    [1],
)
GROUPS["better-rates"] = (
    {"modern, rate 0.5": part("modern", 0.5), "rotary, rate 2": part("rotary", 2)},
    [1, 2, 3],
)
# as long as GPT-2's parts take: fewer steps, by the ratio measured in turns
STEP = 1.15  # times the step of GPT-2's parts
GROUPS["equal-time"] = (
    {"alibi, equal time": part("alibi", 1) | {"steps": round(THIRD["steps"] / STEP)}},
    [1, 2, 3],
)
GROUPS["parts-tinywiki"] = (
    {
        f"tinywiki {name}": {"preset": "demo", "model": PARTS[name]}
        for name in ("gpt2", "alibi", "modern")
    },
    [1, 2, 3],
)


# one seed each, too few to compare: no table shows them
GROUPS["alone"] = (
    {
        "rms, rate 0.5": part("rms", 0.5),
        "tinywiki rotary": {"preset": "demo", "model": PARTS["rotary"]},
    },
    [1],
)


def config_of(changes: dict, seed: int, tokenizer: Path):
    if "preset" in changes:
        preset = PRESETS[changes["preset"]]
        model = model_config(all_fields(preset.model) | changes["model"])
        return dataclasses.replace(preset, model=model, seed=seed)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128}
    shape |= {"block_size": 128, "vocab_size": 2048}
    model = model_config(shape | changes.get("model", {}))
    changes = {name: value for name, value in changes.items() if name != "model"}
    settings = (
        {"learning_rate": ADAMW, "steps": STEPS, "batch_size": 16} | REPORT | changes
    )
    settings.setdefault("final_learning_rate", settings["learning_rate"] / 10)
    return TrainConfig(
        model=model, corpus="books", tokenizer=str(tokenizer), seed=seed,
        eval_interval=settings["steps"] // 4, eval_sequences=256, **settings,
    )  # fmt: skip


def own_tokenizer() -> Path:
    """A tokenizer of 2,048 tokens from the first 200 pieces of the books, once."""
    path = cache_dir() / "ablations" / "tokenizer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = (
            piece.text[:20_000]
            for piece in islice(load_corpus("books").pieces("train"), 200)
        )
        Tokenizer.from_merges(train_bpe(texts, 2048), "books-2048").save(path)
    return path


def run_one(name: str, changes: dict, seed: int) -> dict:
    """Train one candidate and give its line of the ledger."""
    config = config_of(changes, seed, own_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = RunOptions(
            out=out, precision="fp32", micro_batch_size=16, progress=False
        )
        run = run_training(config, options)
        rows, times = read_rows(out / "metrics.jsonl"), read_rows(out / "timings.jsonl")
    ids = load_tokens(config.corpus, run.tokenizer).split("validation").ids[:131_073]
    losses = token_losses(run.model, ids, batch_size=32)
    settings = dataclasses.asdict(config) | {"tokenizer": run.tokenizer.hash[:16]}
    return {
        "name": name, "seed": seed, "changes": changes,
        "validation_loss": losses.mean(),
        "curve": [
            [r["step"], r["validation_loss"]] for r in rows if "validation_loss" in r
        ],
        "train_loss": statistics.mean([r["loss"] for r in rows if "loss" in r][-50:]),
        "tokens": config.steps * config.tokens_per_step,
        "parameters": run.model.n_parameters(),
        "seconds": sum(r.get("seconds_per_step", 0) for r in times), "config": settings,
        "code": describe_code(),
    }  # fmt: skip


def add(row: dict) -> None:
    with LEDGER.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{row['name']}, seed {row['seed']}: {row['validation_loss']:.4f}", flush=True
    )


def start(group: str, name: str, seed: int) -> None:
    """Run a candidate in a process of its own and add its line to the ledger."""
    wanted = config_of(GROUPS[group][0][name], seed, own_tokenizer())
    # a run is a function of its configuration: done once is enough
    for row in read_rows(LEDGER):
        done = type(wanted).from_dict(row["config"])
        if dataclasses.replace(done, tokenizer=wanted.tokenizer) == wanted:
            return add(row | {"name": name})
    command = [sys.executable, __file__, group, name, str(seed)]
    threads = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=threads)
    if found.returncode:
        return print(
            f"{name}, seed {seed} failed: {found.stderr.strip().splitlines()[-1]}"
        )
    add(json.loads(found.stdout.strip().splitlines()[-1]))


def main() -> None:
    group = sys.argv[1] if len(sys.argv) > 1 else ""
    if group not in GROUPS:
        sys.exit(f"usage: python ledger/ablations.py {'|'.join(GROUPS)}")
    candidates, seeds = GROUPS[group]
    if len(sys.argv) == 4:
        name, seed = sys.argv[2], int(sys.argv[3])
        return print(json.dumps(run_one(name, candidates[name], seed)))
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    own_tokenizer()
    done = {(row["name"], row["seed"]) for row in read_rows(LEDGER)}
    missing = [(name, s) for s in seeds for name in candidates if (name, s) not in done]
    with ThreadPoolExecutor(int(os.environ.get("RUNS_AT_ONCE", "2"))) as pool:
        list(pool.map(lambda pair: start(group, *pair), missing))


if __name__ == "__main__":
    main()
