"""What the scripts of this folder share. NAME.py makes the files of NAME/."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gptlib.pretraining import pretrain
from gptlib.training import PRESETS
from gptlib.workshop.run_folders import Run, run_folder
from gptlib.workshop.runs import RunOptions


RUNS = Path(os.environ.get("GPTLIB_RUNS", "runs"))
HOW = {"device": "cpu", "precision": "fp32", "progress": False}  # of every run


class Entries:
    """The entries that a script makes. script: its `__file__`."""

    def __init__(self, script: str):
        self.folder = Path(script).with_suffix("")

    def read(self, name: str) -> dict:
        """An entry; empty if there is none yet."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write(self, name: str, record: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def demo() -> Run:
    """The demo of chapter 14, trained if GPTLIB_RUNS has no such run yet."""
    config = PRESETS["demo"]
    return pretrain(config, RunOptions(run_folder("demo", config), **HOW))
