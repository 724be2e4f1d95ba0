"""Format the code cells of manuscripts with ruff: book and module agree to the letter.

python tools/format.py [FILE ...]    write them
python tools/format.py --check       exit 1 and name each cell that is not formatted
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from manuscripts import ROOT, Chapter, chapters


CELL = re.compile(
    r"^```\{code-cell\}[^\n]*\n((?:---\n.*?\n---\n|(?::[^\n]*\n)+)?\n*)(.*?)^```$",
    re.M | re.S,
)
RUFF = [sys.executable, "-m", "ruff", "format", "--stdin-filename"]


def formatted(code: str) -> str:
    """The code as ruff writes it; code that it cannot read stays as it is."""
    name = "cell.ipy" if re.search(r"^[%!]", code, re.MULTILINE) else "cell.py"
    done = subprocess.run(
        [*RUFF, name, "-"], input=code, capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout if done.returncode == 0 and code.strip() else code


def differing(chapter: Chapter) -> list[re.Match]:
    """Cells that ruff would write otherwise; all of a chapter are tried at once."""
    cells = list(CELL.finditer(chapter.text))
    codes = [found[2] for found in cells]
    mark = "# -- next cell --\n"
    together = f"\n{mark}".join(codes)
    if not re.search(r"^[%!]", together, re.MULTILINE):
        parts = [p.strip() for p in formatted(together).split(mark)]
        if parts == [code.strip() for code in codes]:
            return []
    return [found for found in cells if formatted(found[2]) != found[2]]


def main() -> None:
    check, only = (
        "--check" in sys.argv,
        [Path(a).stem for a in sys.argv[1:] if a[0] != "-"],
    )
    count = 0
    for chapter in (c for c in chapters() if not only or c.stem in only):
        text = chapter.text
        for found in reversed(differing(chapter)):
            count += 1
            print(
                chapter.at(text.count("\n", 0, found.start(2)) + 1),
                found[2].split("\n")[0],
            )
            text = text[: found.start(2)] + formatted(found[2]) + text[found.end(2) :]
        if text != chapter.text and not check:
            chapter.path.write_text(text, encoding="utf-8")
    if count and check:
        sys.exit(f"{count} cells are not formatted; mend: run `make format`")


if __name__ == "__main__":
    main()
