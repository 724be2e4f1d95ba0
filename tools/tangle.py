"""Tangle: the exported cells of a chapter, one after another, are its module of gptlib.

Its blocks of JavaScript, one after another, are a file of gptlib/web.

python tools/tangle.py            write every module
python tools/tangle.py --check    exit 1 with a diff if a module is out of date
"""

from __future__ import annotations

import ast
import difflib
import sys

from manuscripts import (
    PACKAGE,
    ROOT,
    Chapter,
    ManuscriptError,
    chapters,
    floors,
    gptlib_imports,
)


CURE = "mend: edit the manuscript, then run `make tangle`"


def tangle(chapter: Chapter) -> str:
    """Source of the module that a chapter exports, to the letter of its cells."""
    cells = [cell.source.strip() for cell in chapter.exported]
    exported = [id(cell) for cell in chapter.exported]
    lines = [line for cell, line in chapter.cells if id(cell) in exported]
    for cell, line in zip(cells, lines, strict=True):
        tree = chapter.parse(cell, line)
        imports = [isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body]
        if any(imports) and (cell != cells[0] or not all(imports)):
            raise ManuscriptError(
                f"{chapter.at(line)}: the first exported cell holds all imports of the "
                f"module and nothing else; move {cell.splitlines()[0]!r}"
            )
        if cell == cells[-1] and "\ndef main(" in "\n" + cell:
            cells[-1] += '\n\n\nif __name__ == "__main__":\n    main()'
    path = chapter.path.relative_to(ROOT).as_posix()
    head = (
        f'"""{chapter.title}.\n\nTangled from {path}; change it there, not here.\n"""'
    )
    return (
        head
        + "\n\nfrom __future__ import annotations\n\n"
        + "\n\n\n".join(cells)
        + "\n"
    )


def tangle_scripts(chapter: Chapter) -> str:
    """The file that a chapter's blocks of JavaScript make, in a scope of its own."""
    path = chapter.path.relative_to(ROOT).as_posix()
    head = f"// {chapter.title}. Tangled from {path}; change it there, not here.\n"
    return head + '"use strict";\n{\n' + "\n".join(chapter.scripts) + "}\n"


def check_floors(chapter: Chapter, source: str) -> None:
    """A module imports only from floors below its own."""
    order = floors()
    if chapter.module not in order:
        raise ManuscriptError(
            f"{chapter.stem}: gptlib.{chapter.module} stands on no floor; "
            "add it to [tool.gptlib] floors in pyproject.toml"
        )
    for name in sorted(gptlib_imports(source)):
        if order.index(name) >= order.index(chapter.module):
            raise ManuscriptError(
                f"{chapter.stem}: imports gptlib.{name}, which stands on a higher "
                "floor; hand it in as an argument, or move the code"
            )


def main() -> None:
    check = "--check" in sys.argv[1:]
    stale = []
    written = ("__init__.py", "__main__.py", "workshop/__init__.py")  # by hand
    expected = {PACKAGE / name for name in written}
    for chapter in chapters():
        made = {}
        if chapter.exported:
            made[chapter.module_path] = tangle(chapter)
            check_floors(chapter, made[chapter.module_path])
        if chapter.scripts:
            made[chapter.script_path] = tangle_scripts(chapter)
        expected |= made.keys()
        for path, new in made.items():
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            name = path.relative_to(ROOT).as_posix()
            if new != old and check:
                stale.append(name)
                lines = old.splitlines(True), new.splitlines(True)
                sys.stdout.writelines(
                    difflib.unified_diff(*lines, name, chapter.stem + ".md")
                )
            elif new != old:
                path.write_text(new, encoding="utf-8")
                print(f"tangled {chapter.stem} -> {name}")
    for path in sorted({*PACKAGE.rglob("*.py")} - expected):
        raise ManuscriptError(
            f"{path.relative_to(ROOT)}: no chapter makes it; delete it or write one"
        )
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; {CURE}")


if __name__ == "__main__":
    main()
