"""How does a training step grow with the shape of the model?

`python ledger/growth.py` changes one size of Table 1's model at a time. For each shape
a process of its own plans (`gptlib plan`, six seconds), then times whole steps of four
micro-batches and divides their tokens by the median time. Three rounds, all shapes in
turn, so that a slow minute of the machine falls on many shapes. The rows go into
ledger/growth/NAME.json; about half an hour, in which nothing else should compute.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from entries import Entries

from gptlib.gpt import GPT, GPTConfig
from gptlib.pretraining import plan
from gptlib.speed import fast_loss
from gptlib.training import PRESETS, Precision
from gptlib.workshop.benchmark import own_peak, training_rate
from gptlib.workshop.devices import describe_machine, pick_device
from gptlib.workshop.runs import RunOptions


ROUNDS, MICRO_BATCHES = 3, 4
BASE = {"micro_batch": 12, "threads": 2}
SHAPES = {  # what differs from Table 1's model and from BASE
    "Table 1": {},
    "width 192": {"n_embd": 192},
    "width 768": {"n_embd": 768},
    "1 layer": {"n_layer": 1},
    "12 layers": {"n_layer": 12},
    "context 64": {"block_size": 64},
    "context 1,024": {"block_size": 1024, "micro_batch": 3},
    "vocabulary 1,536": {"vocab_size": 1536},
    "vocabulary 8,192": {"vocab_size": 8192},
    "vocabulary 25,152": {"vocab_size": 25152},
    "micro-batch 1": {"micro_batch": 1},
    "micro-batch 4": {"micro_batch": 4},
    "1 thread": {"threads": 1},
}


def shape(changes: dict) -> GPTConfig:
    """Table 1's model with what changes of it."""
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    own = {name: value for name, value in changes.items() if name in names}
    return dataclasses.replace(PRESETS["tinytiny"].model, **own)


def measure(changes: dict) -> dict:
    """One round of a shape in this very process."""
    device, size = pick_device("cpu"), changes.get("micro_batch", BASE["micro_batch"])
    config = dataclasses.replace(
        PRESETS["tinytiny"], model=shape(changes), batch_size=MICRO_BATCHES * size
    )
    options = RunOptions(Path("unused"), micro_batch_size=size, device="cpu")
    planned = plan(config, options, seconds=6)
    rate = training_rate(
        config,
        fast_loss(config.model.vocab_size),
        Precision(planned.precision),
        device,
        micro_batch_size=size,
        micro_batches=MICRO_BATCHES,
        steps=3,
    )
    return {
        "planned": planned.tokens_per_second,
        "tokens_per_second": rate,
        "peak_bytes": own_peak(device),
        "precision": planned.precision,
    }


def row(changes: dict) -> dict:
    """What does not depend on the machine: sizes and operations."""
    model = GPT(shape(changes))
    head = 6 * model.config.vocab_size * model.config.n_embd
    return {"flops_per_token": model.flops_per_token(), "head": head, "rounds": []}


def main(name: str) -> None:
    device = pick_device("cpu")
    record = {
        "machine": describe_machine(device)["device_name"],
        "rows": {what: row(changes) for what, changes in SHAPES.items()},
    }
    for _ in range(ROUNDS):
        for what, changes in SHAPES.items():
            threads = str(changes.get("threads", BASE["threads"]))
            done = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps(changes)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": threads},
            )
            found = json.loads(done.stdout.splitlines()[-1])
            record["rows"][what]["rounds"].append(found)
            print(what, found, flush=True)
    Entries(__file__).write(name, record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main(*sys.argv[1:] or ["here"])
