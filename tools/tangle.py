"""Tangle: the cells tagged `export` of book/chapters/NN_name.md become gptlib/name.py.

python tools/tangle.py            write every module
python tools/tangle.py --check    write nothing; exit 1 with a diff if a module is out of date
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import PACKAGE, Chapter, ManuscriptError, chapters

CURE = "mend: edit the manuscript, then run `make tangle`"


def tangle(chapter: Chapter, earlier: set[str], modules: set[str]) -> str:
    """Source of the module that `chapter` exports; may import only the modules in `earlier`."""
    imports: list[str] = []
    body: list[str] = []
    public: list[str] = []
    defined: dict[str, str] = {}
    heading = written_heading = ""
    for cell in chapter.notebook.cells:
        if cell.cell_type == "markdown":
            heading = last_heading(cell.source) or heading
            continue
        if "export" not in cell.metadata.get("tags", []):
            continue
        tree = parse(chapter, cell.source)
        check_imports(chapter, tree, earlier, modules)
        statements = []
        for start, node in with_comments(cell.source, tree):
            text = "\n".join(cell.source.split("\n")[start : node.end_lineno])
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(text)
                continue
            for name in bound_names(node):
                if name in defined:
                    raise ManuscriptError(
                        f"{chapter.stem}: exports {name!r} twice; tag only the last version of it"
                    )
                defined[name] = heading
                if not name.startswith("_"):
                    public.append(name)
            statements.append(text)
        if statements:
            if heading != written_heading:
                body.append(f"# {heading}")
                written_heading = heading
            body.append(
                "\n\n\n".join(statements)
                if len(statements) > 1 and has_definition(tree)
                else "\n".join(statements)
            )
    if not body:
        raise ManuscriptError(
            f"{chapter.stem}: no cell is tagged `export`, so there is no module to write"
        )
    docstring = f'"""{chapter.title}.\n\nTangled from book/chapters/{chapter.stem}.md; change it there, not here.\n"""'
    parts = [docstring, "from __future__ import annotations", "\n".join(dict.fromkeys(imports))]
    names = ", ".join(repr(name) for name in public)
    parts += [f"__all__ = [{names}]", *body]
    if "main" in defined:
        parts.append('if __name__ == "__main__":\n    main()')
    return "\n\n".join(part for part in parts if part) + "\n"


def last_heading(markdown: str) -> str:
    """The last heading of a markdown cell, as plain text; fenced blocks do not count."""
    unfenced = re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#{1,4} (.+)$", unfenced, re.MULTILINE)
    return re.sub(r"[`*]|\{[a-z]+\}", "", found[-1]).strip() if found else ""


def parse(chapter: Chapter, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ManuscriptError(
            f"{chapter.stem}: an export cell is not plain Python: {line!r} ({error.msg})"
        ) from None


def with_comments(source: str, tree: ast.Module):
    """(first line, node) of each statement, its decorators and the comments right above included."""
    lines = source.split("\n")
    for node in tree.body:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
        while first > 0 and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        yield first, node


def bound_names(node: ast.stmt) -> list[str]:
    """Module-level names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        leaf.id
        for target in targets
        for leaf in ast.walk(target)
        if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)
    ]


def has_definition(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)


def check_imports(chapter: Chapter, tree: ast.Module, earlier: set[str], modules: set[str]) -> None:
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            root, _, module = name.partition(".")
            if root != "gptlib" or not module:
                continue
            module = module.split(".")[0]
            if module not in modules:
                raise ManuscriptError(f"{chapter.stem}: imports {name!r}, which no chapter makes")
            if module not in earlier:
                raise ManuscriptError(
                    f"{chapter.stem}: imports {name!r}, which a later chapter makes; move the code or the import"
                )


def ruff(sources: dict[str, str]) -> dict[str, str]:
    """Sorted imports and formatting of all modules at once, with the project's settings."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "gptlib"  # ruff must know these modules as one package
        package.mkdir()
        for module, source in sources.items():
            (package / f"{module}.py").write_text(source, encoding="utf-8")
        settings = [
            "--config",
            str(PACKAGE.parent / "pyproject.toml"),
            "--no-cache",
            "--quiet",
            folder,
        ]
        for command in (["check", "--select", "I,F401", "--fix"], ["format"]):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *settings], capture_output=True, text=True
            )
            if done.returncode:
                raise ManuscriptError(
                    f"ruff {command[0]} failed: {(done.stdout + done.stderr).strip()}"
                )
        return {
            module: (package / f"{module}.py").read_text(encoding="utf-8") for module in sources
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a module is out of date"
    )
    options = parser.parse_args()
    everything = chapters()
    modules = {chapter.module for chapter in everything}
    raw: dict[str, str] = {}
    for chapter in everything:
        if chapter.module in raw:
            raise ManuscriptError(
                f"{chapter.stem}: another chapter already makes gptlib/{chapter.module}.py; rename one"
            )
        raw[chapter.module] = tangle(chapter, set(raw), modules)
    stale: list[str] = []
    expected = {"__init__.py"}
    for chapter, new in zip(everything, ruff(raw).values(), strict=True):
        path = PACKAGE / f"{chapter.module}.py"
        expected.add(path.name)
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if new == old:
            continue
        if options.check:
            stale.append(path.name)
            sys.stdout.writelines(
                difflib.unified_diff(
                    old.splitlines(True),
                    new.splitlines(True),
                    f"gptlib/{path.name}",
                    f"book/chapters/{chapter.stem}.md",
                )
            )
        else:
            path.write_text(new, encoding="utf-8")
            print(f"tangled {chapter.stem} -> gptlib/{path.name}")
    orphans = sorted({path.name for path in PACKAGE.glob("*.py")} - expected)
    if orphans:
        raise ManuscriptError(
            f"gptlib/{orphans[0]}: no chapter makes this module; delete it or write its chapter"
        )
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; {CURE}")


if __name__ == "__main__":
    try:
        main()
    except ManuscriptError as error:
        sys.exit(f"tangle: {error}")
