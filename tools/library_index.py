"""Write book/library.md: every public name of gptlib, with its first line of documentation.

python tools/library_index.py            write it
python tools/library_index.py --check    exit 1 if it is out of date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import PACKAGE, ROOT, chapters

PAGE = ROOT / "book" / "library.md"
OPENING = """# Library index

Every public name of `gptlib`, by module. Each module is made of the cells of one chapter, which explains it; the full docstrings, with shapes, units and errors, are in the code and in `help()`.
"""


def first_line(node: ast.AST) -> str:
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())


def section(chapter) -> str:
    tree = ast.parse(chapter.module_path.read_text(encoding="utf-8"))
    rows = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            kind = "class " if isinstance(node, ast.ClassDef) else ""
            rows.append(f"`{kind}{node.name}`\n: {first_line(node) or 'See the chapter.'}\n")
    return (
        f"## gptlib.{chapter.module}\n\nFrom {{doc}}`{chapter.title} <../notebooks/{chapter.notebook_path.with_suffix('')}>`.\n\n"
        + "\n".join(rows)
    )


if __name__ == "__main__":
    page = OPENING + "\n" + "\n".join(section(chapter) for chapter in chapters())
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit("book/library.md is out of date; mend: run `make tangle`")
