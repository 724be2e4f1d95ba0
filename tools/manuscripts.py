"""What tangle and weave share: the list of chapters and how a manuscript is read."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "book" / "chapters"
NOTEBOOKS = ROOT / "notebooks"
PACKAGE = ROOT / "gptlib"
STEM = re.compile(r"(?P<order>A?\d+)_(?P<module>[a-z][a-z0-9_]*)")


class ManuscriptError(ValueError):
    """A manuscript that cannot be tangled or woven; the message names the chapter and the cure."""


@dataclass(frozen=True)
class Chapter:
    """One manuscript: `book/chapters/NN_name.md`."""

    path: Path

    @property
    def stem(self) -> str:
        return self.path.stem

    @cached_property
    def module(self) -> str:
        """The module it exports: the chapter's name, unless its header says `gptlib: {module: other}`."""
        named = re.search(
            r"^gptlib: \{module: (\w+)\}$", self.text.split("\n---\n")[0], re.MULTILINE
        )
        return named[1] if named else STEM.fullmatch(self.stem)["module"]

    @property
    def sort_key(self) -> tuple[int, int]:
        """Appendices (A1, A2, ...) come before chapter 1, since chapters may build on them."""
        order = STEM.fullmatch(self.stem)["order"]
        return (0, int(order[1:])) if order.startswith("A") else (1, int(order))

    @property
    def notebook_path(self) -> Path:
        return NOTEBOOKS / f"{self.stem}.ipynb"

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8").replace("\r\n", "\n")

    @cached_property
    def notebook(self) -> nbformat.NotebookNode:
        """The manuscript as a notebook without outputs."""
        return jupytext.reads(self.text, fmt="md:myst")

    @cached_property
    def title(self) -> str:
        found = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        if not found:
            raise ManuscriptError(f"{self.stem}: no title; begin the chapter with a line '# Title'")
        return found[1].strip()

    @property
    def code_cells(self) -> list[nbformat.NotebookNode]:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]


@cache
def chapters() -> tuple[Chapter, ...]:
    """All manuscripts in the order in which modules may build on each other."""
    found = [Chapter(path) for path in CHAPTERS.glob("*.md")]
    for chapter in found:
        if not STEM.fullmatch(chapter.stem):
            raise ManuscriptError(
                f"{chapter.path.name}: name it NN_name.md, such as 04_attention.md"
            )
    return tuple(sorted(found, key=lambda chapter: chapter.sort_key))


def plain_python(source: str) -> str:
    """The cell's source with IPython magics and shell lines blanked out, so that `ast` can read it."""
    return "\n".join(
        "" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n")
    )


def gptlib_imports(source: str) -> set[str]:
    """Names of the gptlib modules that a piece of Python imports."""
    modules = set()
    for node in ast.walk(ast.parse(plain_python(source))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        modules.update(name.split(".")[1] for name in names if name.startswith("gptlib."))
    return modules & {chapter.module for chapter in chapters()}
