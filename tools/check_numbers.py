"""Numbers that cannot go stale: each one in the prose must have been computed or have a source.

python tools/check_numbers.py [FILE ...]    one line for each number that nobody computed

A number is a decimal, a percentage, or an integer from 1,000 on. It holds if it equals, after
rounding to the digits given, a number in the stored outputs or the code of the same chapter, or one
in book/figures.txt ("figure  source"); or if its sentence has a citation. README and the other
pages of the book are held against all notebooks and against the ledger.
"""

from __future__ import annotations

import bisect
import re
import sys
from functools import cache
from pathlib import Path

import nbformat


sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import BOOK, NOTEBOOKS, ROOT, Chapter, ManuscriptError, chapters, pages
from weave import read


NUMBER = r"\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?|\d+\.\d+|\d+"
ANY = re.compile(rf"(?<![\w.])({NUMBER})(?:e([+-]?\d+))?", re.I)
PROSE = re.compile(rf"(?<![\w.,/-])({NUMBER})(?:e([+-]?\d+))?(?P<unit>\s?[%\w]+)?")
NOT_PROSE = re.compile(
    r"^(`{3,}|:{3,})(?:math|\{(?:math|code-cell|figure-md)\}|\w*\n).*?^\1|\$\$.*?\$\$"  # fences, math
    r"|(?<!\\)\$[^$]+\$|`+[^`]+`+|https?://\S+|\]\([^)]*\)|<[^>\n]+>|^:[\w-]+:.*$",
    re.MULTILINE | re.DOTALL,
)
NAMED = re.compile(  # numbers that are names: of versions, places, licences
    r"\b(GTX|RTX|Python|PyTorch|torch|CUDA|Jupyter\w*|version|[Cc]hapters?|[Ss]ections?|Figs?\.|[Ff]igures?"
    r"|[Tt]ables?|[Ee]xercises?|[Ee]quations?|CC BY|BY|seeds?|ports?|pages?|arXiv) $"
)
SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "trillion": 1e12,
          "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1e-3, "µs": 1e-6, "kib": 2**10, "mib": 2**20, "gib": 2**30}  # fmt: skip


def value(found: re.Match) -> float:
    return float(
        found[1].replace(",", "").replace("_", "")
        + (f"e{found[2]}" if found[2] else "")
    )


def numbers_in(text: str) -> set[float]:
    return {value(found) for found in ANY.finditer(text)}


def computed(chapter: Chapter) -> set[float]:
    """Every number in a notebook's text outputs and in its code."""
    texts = [cell.source for cell in chapter.code_cells]
    notebook = read(NOTEBOOKS / chapter.notebook_path) or nbformat.v4.new_notebook()
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        for output in cell.outputs:
            texts += [
                output.get("text", ""),
                output.get("data", {}).get("text/plain", ""),
            ]
    return numbers_in("\n".join(texts))


@cache
def cited() -> frozenset[float]:
    """The figures of book/figures.txt, each of which has its source beside it."""
    path, found = BOOK / "figures.txt", set()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        figure, _, source = line.partition("  ")
        if line.strip() and not line.startswith("#"):
            if not source.strip() or not numbers_in(figure):
                raise ManuscriptError(
                    f"book/figures.txt:{number}: write 'figure  source'"
                )
            found |= numbers_in(figure)
    return frozenset(found)


@cache
def everything() -> frozenset[float]:
    """What all notebooks and the ledger know, for the pages that speak of the whole."""
    files = sorted(
        p for p in (ROOT / "ledger").rglob("*") if p.suffix in (".json", ".jsonl")
    )
    known = set().union(
        *(numbers_in(path.read_text(encoding="utf-8")) for path in files)
    )
    return frozenset(known.union(*(computed(chapter) for chapter in chapters())))


def holds(found: re.Match, known: list[float]) -> bool:
    digits = len(found[1].partition(".")[2])
    if not digits:
        plain = re.sub(r"[,_]", "", found[1])
        digits = len(plain.rstrip("0")) - len(plain)  # 33,000 may be 32,896
    unit = (found["unit"] or "").strip().lower()
    scales = {1.0, 0.01} if unit == "%" else {1.0, SCALES.get(unit, 1.0)}
    half = 0.5000001 * 10.0**-digits * 10.0 ** int(found[2] or 0)
    for scale in scales:
        place = bisect.bisect_left(known, (value(found) - half) * scale)
        if place < len(known) and known[place] <= (value(found) + half) * scale:
            return True
    return False


def claims(text: str, line: int):
    """(line, sentence, number) for each number in running text that needs a source."""
    blank = lambda found: re.sub(r"[^\n]", " ", found[0])  # noqa: E731
    cites = [found.start() for found in re.finditer(r"\{cite[:a-z]*\}", text)]
    bare = NOT_PROSE.sub(blank, text)
    ends = [
        found.start() + 1
        for found in re.finditer(r"[.?!;](?=\s+[^a-z\s])|\n\s*\n|\|\n", bare)
    ]
    for found in PROSE.finditer(bare):
        number, unit = found[1], (found["unit"] or "").strip()
        large = value(found) >= 1000 and not re.fullmatch(r"(19|20)\d\d", number)
        start = max((end for end in ends if end <= found.start()), default=0)
        stop = min((end for end in ends if end > found.start()), default=len(text))
        if not ("." in number or unit == "%" or large) or any(
            start <= c < stop for c in cites
        ):
            continue
        if not NAMED.search(bare[max(0, found.start() - 14) : found.start()]):
            sentence = " ".join(text[start:stop].split())
            yield line + bare.count("\n", 0, found.start()), sentence, found


def check(name: str, texts: list[tuple[str, int]], known: set[float]) -> list[str]:
    ordered, wrong = sorted(known | cited()), []
    for text, first in texts:
        for line, sentence, found in claims(text, first):
            if not holds(found, ordered):
                wrong.append(f"{name}:{line}: {found[0].strip()}: {sentence[:160]}")
    return wrong


def prose(page: Chapter) -> list[tuple[str, int]]:
    """The texts of a manuscript with their first lines, captions and alternative texts included."""
    texts = []
    for cell, line in zip(page.notebook.cells, page.lines, strict=True):
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        texts.append(
            (
                cell.source
                if cell.cell_type == "markdown"
                else figure.get("caption", ""),
                line,
            )
        )
    return texts


def main() -> None:
    wrong, only = [], [Path(name).stem for name in sys.argv[1:]]
    for page in (*chapters(), *pages()):
        if (not only or page.stem in only) and page.stem not in (
            "library",
            "bibliography",
        ):
            known = computed(page) if page.label else everything()
            wrong += check(page.at(1)[:-2], prose(page), known)
    if not only or "README" in only:
        wrong += check(
            "README.md",
            [((ROOT / "README.md").read_text(encoding="utf-8"), 1)],
            everything(),
        )
    print("\n".join(wrong) or "every number in the prose was computed or has a source")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    try:
        main()
    except ManuscriptError as error:
        sys.exit(f"numbers: {error}")
