"""Measure how cost grows with a model's shape: writes ledger/speed/roofline.json.

`python tools/roofline.py` takes about 20 minutes on two cores. Each shape is measured
in a process of its own; what the file has for this machine is not measured again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from gptlib.workshop.devices import cpu_information


LEDGER = Path(__file__).parent.parent / "ledger/speed/roofline.json"
SHAPES = {  # name -> options of `gptlib benchmark`, and threads
    "Table 1": {},
    "width 192": {"n_embd": 192},
    "width 768": {"n_embd": 768, "n_head": 8},
    "2 layers": {"n_layer": 2},
    "8 layers": {"n_layer": 8},
    "16 layers": {"n_layer": 16, "micro_batch_size": 6},
    "context 128": {"block_size": 128, "micro_batch_size": 24},
    "context 512": {"block_size": 512, "micro_batch_size": 6},
    "context 1024": {"block_size": 1024, "micro_batch_size": 3},
    "micro-batch 4": {"micro_batch_size": 4},
    "micro-batch 24": {"micro_batch_size": 24},
    "vocabulary 12,288": {"vocab_size": 12_288},
    "vocabulary 100,352": {"vocab_size": 100_352},
    "1 thread": {"threads": 1},
    "GPT-2, 124M": {"preset": "gpt2", "micro_batch_size": 1},
    "the demo, AdamW's part": {"n_layer": 2, "n_embd": 160, "vocab_size": 1536},
}


def benchmark(options: dict, *flags: str) -> dict | list:
    """What `gptlib benchmark --json` prints, in a process of its own."""
    options = {"micro_batches": 1, **options}
    threads = str(options.pop("threads", os.cpu_count()))
    command = [sys.executable, "-m", "gptlib.workshop.benchmark", "--json", *flags]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    machine = f"{cpu_information().get('model name', '?')}, {os.cpu_count()} cores"
    found = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    if found.get("machine") != machine:
        found = {"machine": machine, "shapes": {}}
    for name, options in SHAPES.items():
        if name in found["shapes"]:
            continue
        real = benchmark(options, "--only", "final", "--rounds", "1", "--steps", "4")
        row = {"options": options, "limit": benchmark(options, "--limit"), **real}
        found["shapes"][name] = row
        LEDGER.write_text(json.dumps(found, indent=1) + "\n")
        least = row["limit"][-1]["least_seconds"]
        print(name, f"{real['tokens_per_second']:,.0f} tokens/s, least {least:.2f} s")


if __name__ == "__main__":
    main()
