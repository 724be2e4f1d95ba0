"""The folder in which `make book` executes and renders, so that tracked files stay as they are.

python tools/stage.py FOLDER             copy the site's sources there (its executed notebooks stay)
python tools/stage.py --report FOLDER    print the results of the last notebook and the page to open
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import ROOT, chapters

SOURCES = ("_config.yml", "_toc.yml", "book", "ledger", "tools", "gptlib")


def fill(stage: Path) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source, target = ROOT / name, stage / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    wanted = {chapter.notebook_path.name for chapter in chapters()}
    for path in (stage / "notebooks").rglob("*.ipynb"):
        if path.name not in wanted:
            path.unlink()


def report(stage: Path) -> None:
    """Print the output of the cells tagged `summary` in the last chapter."""
    last = stage / "notebooks" / next(c for c in chapters() if c.module == "pretraining").notebook_path
    for cell in nbformat.read(last, as_version=4).cells:
        if "summary" in cell.metadata.get("tags", []):
            print("".join(output.get("text", "") for output in cell.outputs).rstrip())
    print(f"\nThe book: {(ROOT / '_build' / 'html' / 'index.html').as_uri()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", type=Path)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    report(options.stage) if options.report else fill(options.stage)
