"""What the tools share: the list of chapters, and how a manuscript is read."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path


# jsonschema would spend two seconds on a grammar of addresses, which no notebook needs
sys.modules.setdefault("rfc3987_syntax", None)

import jupytext  # noqa: E402
import nbformat  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
NOTEBOOKS = ROOT / "notebooks"
PACKAGE = ROOT / "gptlib"
SCRIPT = re.compile(r"^```javascript\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEM = re.compile(r"(?P<workshop>W?)(?P<number>\d+)_(?P<name>[a-z][a-z0-9_]*)")
NOT_PLAIN = {"index", "library", "bibliography"}  # pages that only the site has


class ManuscriptError(ValueError):
    """A manuscript that cannot be used; the message names the chapter and the cure."""


def one_line(kind: type, error: BaseException, trace) -> None:
    """What Python calls for an error that nothing caught."""
    if not issubclass(kind, ManuscriptError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)


sys.excepthook = one_line


def why_damaged(error: Exception) -> str:
    """`:3 is damaged (Expecting value)`, to put behind the name of a notebook."""
    cause = error.__cause__ or error.__context__ or error
    line = f":{cause.lineno}" if hasattr(cause, "lineno") else ""
    why = getattr(cause, "msg", "") or str(error).splitlines()[0][:60]
    return f"{line} is damaged ({why})"


@dataclass(frozen=True)
class Chapter:
    """One manuscript: `book/chapters/NN_name.md` or `book/workshop/WN_name.md`."""

    path: Path

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def workshop(self) -> bool:
        return self.stem.startswith("W")

    @property
    def number(self) -> int:
        return int(STEM.fullmatch(self.stem)["number"])

    @property
    def label(self) -> str:
        """What its numbers begin with, `4` or `W4`; nothing for a page of the book."""
        found = STEM.fullmatch(self.stem)
        return found["workshop"] + str(self.number) if found else ""

    @property
    def module(self) -> str:
        """The module below `gptlib` that it exports: `attention`, `workshop.files`."""
        return ("workshop." if self.workshop else "") + STEM.fullmatch(self.stem)[
            "name"
        ]

    @property
    def module_path(self) -> Path:
        return PACKAGE.joinpath(*self.module.split(".")).with_suffix(".py")

    @property
    def notebook_path(self) -> Path:
        """Where its notebook lies, below the folder of notebooks."""
        return Path("workshop" if self.workshop else "") / f"{self.stem}.ipynb"

    @property
    def script_path(self) -> Path:
        """Where its JavaScript goes, if it has any."""
        return PACKAGE / "web" / f"{self.module.rpartition('.')[2]}.js"

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8").replace("\r\n", "\n")

    @cached_property
    def notebook(self) -> nbformat.NotebookNode:
        """The manuscript without outputs; a cell's id depends on its text alone."""
        if self.label and not self.text.startswith("---\n"):
            raise ManuscriptError(f"{self.at(1)}: no header; copy another chapter's")
        try:
            notebook, seen = jupytext.reads(self.text, fmt="md:myst"), {}
        except Exception as error:
            line = re.search(r"at line (\d+)", str(error))
            why = "the options between its first lines are not YAML"
            raise ManuscriptError(
                f"{self.at(int(line[1]) if line else 1)}: {why}"
            ) from None
        for cell in notebook.cells:
            cell.id = new_id(cell.cell_type, cell.source, seen)
        return notebook

    @cached_property
    def cells(self) -> list[tuple[nbformat.NotebookNode, int]]:
        """Its cells, each with the line of the manuscript on which the text begins."""
        place, cells = 0, []
        for cell in self.notebook.cells:
            place = max(place, self.text.find(cell.source, place))
            line = self.text.count("\n", 0, place) + 1
            if cell.cell_type == "code":
                self.parse(plain_python(cell.source), line)
            cells.append((cell, line))
            place += len(cell.source)
        return cells

    def at(self, line: int) -> str:
        """`book/chapters/04_attention.md:12`, to begin a message with."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{line}"

    def parse(self, source: str, line: int) -> ast.Module:
        """The tree of Python that begins on a line of the manuscript."""
        try:
            return ast.parse(source)
        except SyntaxError as error:
            place, text = line + (error.lineno or 1) - 1, (error.text or "").strip()
            raise ManuscriptError(
                f"{self.at(place)}: not plain Python, {error.msg}: {text!r}"
            ) from None

    @cached_property
    def title(self) -> str:
        found = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        if not found:
            raise ManuscriptError(f"{self.stem}: no title; begin with a line '# Title'")
        return found[1].strip()

    @property
    def code_cells(self) -> list[nbformat.NotebookNode]:
        return [cell for cell, _ in self.cells if cell.cell_type == "code"]

    @property
    def exported(self) -> list[nbformat.NotebookNode]:
        """The cells that make the module."""
        return [c for c in self.code_cells if "export" in c.metadata.get("tags", [])]

    @property
    def scripts(self) -> list[str]:
        """Its blocks of JavaScript, which make a file beside the module."""
        text = (c.source for c in self.notebook.cells if c.cell_type == "markdown")
        return [found[1] for source in text for found in SCRIPT.finditer(source)]


@cache
def chapters() -> tuple[Chapter, ...]:
    """All manuscripts: the lessons by number, then the workshop by number."""
    found = [
        Chapter(p)
        for part in ("chapters", "workshop")
        for p in (BOOK / part).glob("*.md")
    ]
    for chapter in found:
        if not STEM.fullmatch(chapter.stem):
            raise ManuscriptError(
                f"{chapter.path.name}: name it NN_name.md or WN_name.md"
            )
    return tuple(sorted(found, key=lambda chapter: (chapter.workshop, chapter.number)))


@cache
def pages() -> tuple[Chapter, ...]:
    """The other pages of the book, such as setup and notation."""
    return tuple(Chapter(path) for path in sorted(BOOK.glob("*.md")))


def text_hash(cell_type: str, source: str) -> str:
    return hashlib.sha256(f"{cell_type}\n{source}".encode()).hexdigest()[:10]


def new_id(cell_type: str, source: str, seen: dict[str, int]) -> str:
    """The hash of a cell's text, and how many cells with that text came before."""
    key = text_hash(cell_type, source)
    seen[key] = seen.get(key, 0) + 1
    return f"{key}-{seen[key]}"


@cache
def floors() -> tuple[str, ...]:
    """The modules of gptlib from the ground up; each may import those before it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return tuple(settings["tool"]["gptlib"]["floors"])


def plain_python(source: str) -> str:
    """A cell's source without IPython magics and shell lines, for `ast`."""
    lines = source.split("\n")
    return "\n".join(
        "" if line.lstrip().startswith(("%", "!")) else line for line in lines
    )


def fold_title(cell: nbformat.NotebookNode) -> str:
    """What a folded cell holds: its own title, or its names; '' if it has neither."""
    own = cell.metadata.get("mystnb", {})
    if "code_prompt_show" in own:
        return own["code_prompt_show"]
    if "figure" in own:
        return "The plot"
    body = ast.parse(plain_python(cell.source)).body
    names = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 4 else ""
        return ", ".join(names[: 3 if more else 4]) + more
    if isinstance(body[0], ast.Import | ast.ImportFrom):
        only = all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)
        module = "export" in cell.metadata.get("tags", [])
        title = "The imports of the module" if module else "The imports of this chapter"
        return title if only else f"{title}, and settings"
    return ""


def gptlib_imports(source: str) -> set[str]:
    """Names below `gptlib` that a piece of Python imports, wherever it does."""
    named = set()
    for node in ast.walk(ast.parse(plain_python(source))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {n.removeprefix("gptlib.") for n in named} & set(floors())
