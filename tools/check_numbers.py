"""Numbers that cannot go stale: what the prose says was computed or has a source.

python tools/check_numbers.py [NAME ...]    one line for each number nobody computed

Checked are decimals, percentages, and integers from 1,000 on. A number holds if it
equals, rounded to the digits given, one in the stored outputs or the code of the same
chapter or in book/figures.txt ("figure  source"), or if its sentence has a citation.
README and the pages of the book are held against all notebooks and the ledger.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache

from manuscripts import (
    BOOK,
    NOTEBOOKS,
    ROOT,
    Chapter,
    ManuscriptError,
    chapters,
    pages,
)
from weave import read


NUMBER = (
    r"(?P<number>\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?|\d+\.\d+|\d+)(?:e(?P<power>[+-]?\d+))?"
)
ANY = re.compile(rf"(?<![\w.]){NUMBER}", re.IGNORECASE)
PROSE = re.compile(rf"(?<![\w.,/-]){NUMBER}(?P<unit>\s?[%\w]+)?")
NOT_PROSE = re.compile(  # math, code, addresses, options
    r"^(`{3,}|:{3,})(?:\{(?:math|code-cell)\}|\w*\n).*?^\1|\$\$.*?\$\$|(?<!\\)\$[^$]+\$"
    r"|`+[^`]+`+|https?://\S+|\]\([^)]*\)|<[^>\n]+>|^:[\w-]+:.*$",
    re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"[.?!;](?=\s+[^a-z\s])|\n\s*\n|\|\n")
NAMED = re.compile(  # numbers that are names
    r"\b(GTX|RTX|Python|PyTorch|torch|CUDA|Jupyter\w*|version|[Cc]hapters?|[Ss]ections?"
    r"|Figs?\.|[Ff]igures?|[Tt]ables?|[Ee]xercises?|[Ee]quations?|BY|seeds?|ports?) $"
)
SCALES = {"%": 0.01, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9}
SCALES |= {"billion": 1e9, "trillion": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9}
SCALES |= {"ms": 1e-3, "µs": 1e-6, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def value(found: re.Match) -> float:
    return float(re.sub("[,_]", "", found["number"])) * 10.0 ** int(found["power"] or 0)


def numbers_in(text: str) -> set[float]:
    return {value(found) for found in ANY.finditer(text)}


@cache
def computed(chapter: Chapter) -> frozenset[float]:
    """Every number in a notebook's text outputs and in its code."""
    texts = [cell.source for cell in chapter.code_cells]
    notebook = read(NOTEBOOKS / chapter.notebook_path)
    for cell in notebook.cells if notebook else ():
        for output in cell.get("outputs", []):
            texts += [
                output.get("text", ""),
                output.get("data", {}).get("text/plain", ""),
            ]
    return frozenset(numbers_in("\n".join(texts)))


@cache
def sourced() -> frozenset[float]:
    """The figures of book/figures.txt, each of which has its source beside it."""
    path, found = BOOK / "figures.txt", set()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
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
    """What all notebooks and the ledger know."""
    ledger = (
        p for p in (ROOT / "ledger").rglob("*") if p.suffix in (".json", ".jsonl")
    )
    known = (numbers_in(path.read_text(encoding="utf-8")) for path in ledger)
    return frozenset().union(*known, *(computed(chapter) for chapter in chapters()))


def holds(found: re.Match, known: list[float]) -> bool:
    digits = len(found["number"].partition(".")[2])
    if not digits:
        plain = re.sub("[,_]", "", found["number"])
        digits = len(plain.rstrip("0")) - len(plain)  # 33,000 may be 32,896
    half = 0.5000001 * 10.0 ** (int(found["power"] or 0) - digits)
    for scale in {1.0, SCALES.get((found["unit"] or "").strip().lower(), 1.0)}:
        place = bisect_left(known, (value(found) - half) * scale)
        if place < len(known) and known[place] <= (value(found) + half) * scale:
            return True
    return False


def claims(text: str) -> Iterator[tuple[re.Match, str]]:
    """Each number in running text that must hold, with its sentence."""
    bare = NOT_PROSE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    ends = [0, *(found.end() for found in SENTENCE_END.finditer(bare)), len(text)]
    for found in PROSE.finditer(bare):
        last = bisect_left(ends, found.end())
        sentence = text[ends[last - 1] : ends[last]]
        year = re.fullmatch(r"(19|20)\d\d", found["number"])
        large = value(found) >= 1000 and not year
        counts = "." in found["number"] or large or "%" in (found["unit"] or "")
        named = NAMED.search(bare[max(0, found.start() - 14) : found.start()])
        if counts and not named and "{cite" not in sentence:
            yield found, " ".join(sentence.split())


def check(texts: list[tuple[str, str]], known: frozenset[float]) -> Iterator[str]:
    """One line for each number that does not hold; texts with where each begins."""
    ordered = sorted(known | sourced())
    for text, place in texts:
        name, _, line = place.rpartition(":")
        for found, sentence in claims(text):
            if not holds(found, ordered):
                here = int(line) + text.count("\n", 0, found.start())
                yield f"{name}:{here}: {found['number']}: {sentence[:160]}"


def prose(page: Chapter) -> Iterator[tuple[str, str]]:
    """The texts of a manuscript, captions included, with where each begins."""
    for cell, line in page.cells:
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        text = (
            cell.source if cell.cell_type == "markdown" else figure.get("caption", "")
        )
        yield text, page.at(line)


def main() -> None:
    only, wrong = sys.argv[1:], []
    for page in (*chapters(), *pages()):
        if page.stem in (only or {page.stem} - {"library", "bibliography"}):
            known = computed(page) if page.label else everything()
            wrong += check(list(prose(page)), known)
    if not only or "README" in only:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        wrong += check([(text, "README.md:1")], everything())
    print("\n".join(wrong) or "every number was computed or has a source")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
