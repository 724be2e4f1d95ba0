"""Measure how cost grows with a model's shape: writes ledger/speed/roofline.json.

`python tools/roofline.py` takes about 15 minutes on two cores. All shapes take turns in
several rounds, and of each time the least counts, since other programs come and go.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gptlib.training import PRESETS
from gptlib.workshop.devices import cpu_information, pick_precision, use_large_pages
from gptlib.workshop.roofline import bytes_per_second, limit_rows, product_seconds


LEDGER = Path(__file__).parent.parent / "ledger/speed/roofline.json"
ROUNDS = 1
SHAPES = {  # name -> options of `gptlib benchmark`, and threads
    "Table 1": {"micro_batch_size": 2},
    "width 192": {"n_embd": 192},
    "width 768": {"n_embd": 768},
    "width 1,024": {"n_embd": 1024},
    "1 layer": {"n_layer": 1},
    "8 layers": {"n_layer": 8},
    "16 layers": {"n_layer": 16},
    "context 128": {"block_size": 128, "micro_batch_size": 4},
    "context 512": {"block_size": 512, "micro_batch_size": 1},
    "context 1,024": {"block_size": 1024, "micro_batch_size": 1},
    "4 sequences": {"micro_batch_size": 4},
    "8 sequences": {"micro_batch_size": 8},
    "vocabulary 12,288": {"vocab_size": 12_288},
    "vocabulary 100,352": {"vocab_size": 100_352},
    "12 heads": {"n_head": 12},
    "1 thread": {"threads": 1},
    "124M": {"preset": "gpt2", "micro_batch_size": 1},
}


def options_of(name: str) -> dict:
    """What is measured under this name, with nothing left to a default."""
    start = {"preset": "tinytiny", "micro_batch_size": 2, "threads": os.cpu_count()}
    return start | SHAPES[name]


def least(old: dict | None, new: list[dict], options: dict) -> dict:
    """The rows of a round joined with what earlier rounds found."""
    if old:
        for before, row in zip(old["limit"], new, strict=True):
            for key in ("least_seconds", "seconds"):
                row[key] = min(row[key], before[key])
    new[-1]["least_seconds"] = sum(row["least_seconds"] for row in new[:-1])
    return {"options": options, "limit": new, "peak_bytes": old and old["peak_bytes"]}


def measure(name: str) -> list[dict]:
    """Rows of `limit_rows` for one micro-batch, timed anew."""
    options = options_of(name)
    config = PRESETS[options["preset"]]
    names = config.model.__dataclass_fields__
    shape = {key: value for key, value in options.items() if key in names}
    torch.set_num_threads(options["threads"])
    product_seconds.cache_clear()
    bytes_per_second.cache_clear()
    config = replace(config, model=replace(config.model, **shape))
    precision = pick_precision(torch.device("cpu"))
    return limit_rows(config, options["micro_batch_size"], 1, precision)


def peak(options: dict) -> int:
    """Peak bytes of a few steps, in a process of their own."""
    flags = ["--micro-batches", "1", "--only", "final", "--rounds", "1", "--steps", "1"]
    for name, value in options.items():
        if name != "threads":
            flags += ["--" + name.replace("_", "-"), str(value)]
    command = [sys.executable, "-m", "gptlib.workshop.benchmark", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"]


def main() -> None:
    use_large_pages()
    machine = f"{cpu_information().get('model name', '?')}, {os.cpu_count()} cores"
    found: dict = {"machine": machine, "rounds": 0, "shapes": {}}
    shapes = found["shapes"]
    for found["rounds"] in range(1, ROUNDS + 1):
        for name in SHAPES:
            shapes[name] = least(shapes.get(name), measure(name), options_of(name))
        LEDGER.write_text(json.dumps(found, indent=1) + "\n")
        print("round", found["rounds"], flush=True)
    for row in shapes.values():
        row["peak_bytes"] = peak(row["options"])
    LEDGER.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
