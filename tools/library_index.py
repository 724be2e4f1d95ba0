"""Write book/library.md: every public name, its signature and its first sentence.

python tools/library_index.py            write it
python tools/library_index.py --check    exit 1 if it is out of date
"""

from __future__ import annotations

import ast
import sys

from manuscripts import ROOT, Chapter, chapters


PAGE = ROOT / "book" / "library.md"
OPENING = """# Library index

Every public name of `gptlib`, by module. Each module is made of the cells of one
chapter, which explains it. The link after a name leads to the cell that defines it,
`[source]` to its line in the module. The full docstrings, with shapes, units and
errors, stand there and in `help()`.
"""
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def first_sentence(node: ast.AST) -> str:
    text = " ".join(
        (ast.get_docstring(node) or "See the chapter.").split("\n\n")[0].split()
    )
    end = next((i for i in range(len(text)) if text[i : i + 2] == ". "), len(text))
    text = text[:end].rstrip(".") + "."
    # what MyST would read as markup is shown as written
    return (
        "".join("\\" + c if c in "*_<>[]{}$|" else c for c in text)
        if "`" not in text
        else text
    )


def signature(node: DEFINITION) -> str:
    """How to call it: arguments of a function or `__init__`, fields of a dataclass."""
    if not isinstance(node, ast.ClassDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({ast.unparse(node.args)}){returns}"
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    if "__init__" in methods:
        given = methods["__init__"].args
        first = given.posonlyargs or given.args
        del first[0]
        return f"{node.name}({ast.unparse(given)})"
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    inside = ", ".join(n.target.id for n in fields if not n.target.id.startswith("_"))
    return f"{node.name}({inside})" if inside else node.name


def public(chapter: Chapter) -> list[DEFINITION]:
    tree = ast.parse(chapter.module_path.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, DEFINITION)]
    return [node for node in found if not node.name.startswith("_")]


def section(chapter: Chapter) -> str:
    page = chapter.notebook_path.with_suffix("").as_posix()
    origin = f"From {{doc}}`{chapter.title} <../notebooks/{page}>`."
    rows = [f"## gptlib.{chapter.module}\n\n{origin}\n"]
    for node in public(chapter):
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        module = f":module: gptlib.{chapter.module}"
        first = f"```{{py:{kind}}} {signature(node)}\n{module}"
        rows.append(f"{first}\n{first_sentence(node)}\n```\n")
    return "\n".join(rows)


def page() -> str:
    made = (
        c for c in chapters() if c.exported and c.module_path.exists() and public(c)
    )
    return OPENING + "\n" + "\n".join(section(chapter) for chapter in made)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("book/library.md is out of date; mend: run `make tangle`")
