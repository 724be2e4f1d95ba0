"""Write _toc.yml: the contents of the site, from the manuscripts that there are.

python tools/toc.py            write it
python tools/toc.py --check    exit 1 if it is out of date
"""

from __future__ import annotations

import sys

import yaml
from manuscripts import BOOK, ROOT, Chapter, chapters


PARTS = {
    "Text into numbers": range(1, 4),
    "The model": range(4, 8),
    "Training and talking": range(8, 11),
    "What it is worth": range(11, 14),
    "A whole run": range(14, 16),
    "After the report": range(21, 100),
}
APPENDICES = (
    "notation",
    "troubleshooting",
    "glossary",
    "report_reread",
    "what_did_not_work",
    "library",
    "bibliography",
)


def entry(chapter: Chapter) -> dict:
    return {"file": f"notebooks/{chapter.notebook_path.with_suffix('').as_posix()}"}


def part(caption: str, files: list[dict], numbered: bool) -> list[dict]:
    number = {"numbered": True} if numbered else {}
    return [{"caption": caption, **number, "chapters": files}] if files else []


def contents() -> str:
    lessons = [c for c in chapters() if not c.workshop]
    setup = [{"file": "book/setup"}]
    start = [entry(c) for c in lessons if c.number == 0]
    parts = part("Start", setup, False) + part("One page", start, True)
    for caption, numbers in PARTS.items():
        parts += part(caption, [entry(c) for c in lessons if c.number in numbers], True)
    parts += part("Workshop", [entry(c) for c in chapters() if c.workshop], True)
    there = [name for name in APPENDICES if (BOOK / f"{name}.md").exists()]
    parts += part("Appendices", [{"file": f"book/{name}"} for name in there], False)
    toc = {"format": "jb-book", "root": "book/index", "parts": parts}
    return "# made by tools/toc.py\n" + yaml.safe_dump(toc, sort_keys=False)


if __name__ == "__main__":
    path = ROOT / "_toc.yml"
    if "--check" not in sys.argv:
        path.write_text(contents(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != contents():
        sys.exit("_toc.yml is out of date; mend: run `make tangle`")
