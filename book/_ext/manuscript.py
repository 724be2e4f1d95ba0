"""Sphinx extension: a chapter's page shows its manuscript with its notebook's outputs.

The notebooks hold plain Markdown for those who open them elsewhere. When Sphinx reads
one, its cells are replaced by the manuscript's, so that numbers and references work.
Chapters keep their numbers (0, 1, ..., W1, W2), whatever the order of the contents. A
line over each exported cell leads to its module's source and to the library index.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from manuscripts import NOTEBOOKS, chapters, fold_title  # noqa: E402
from weave import KERNELSPEC, read, with_outputs  # noqa: E402


KINDS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def chapter_of(docname: str):
    if not docname.startswith("notebooks/"):
        return None
    return {chapter.stem: chapter for chapter in chapters()}.get(Path(docname).name)


def executed(chapter) -> Path:
    """The notebook whose outputs the page shows: `make book` makes its own."""
    return Path(os.environ.get("BOOK_NOTEBOOKS") or NOTEBOOKS) / chapter.notebook_path


def put_manuscript(app, docname: str, source: list[str]) -> None:
    chapter = chapter_of(docname)
    if chapter is None:
        return
    notebook = nbformat.from_dict(chapter.notebook)
    with_outputs(notebook.cells, read(executed(chapter)))
    for cell in notebook.cells:
        if {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
            titles = cell.metadata.setdefault("mystnb", nbformat.NotebookNode())
            titles["code_prompt_show"] = fold_title(cell)
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    for path in (chapter.path, executed(chapter)):
        app.env.note_dependency(str(path))
    source[0] = nbformat.writes(notebook)


def read_again(app, env, added, changed, removed) -> list[str]:
    """Every chapter, if the last build showed the outputs of other notebooks."""
    folder = os.environ.get("BOOK_NOTEBOOKS", "")
    before, env.gptlib_executed = getattr(env, "gptlib_executed", folder), folder
    return (
        [name for name in env.found_docs if chapter_of(name)]
        if folder != before
        else []
    )


def names_of(cell: nodes.container) -> list[str]:
    """Public functions and classes that an exported cell defines."""
    code = next((n.astext() for n in cell.findall(nodes.literal_block)), "")
    found = [node.name for node in ast.parse(code).body if isinstance(node, KINDS)]
    return [name for name in found if not name.startswith("_")]


def find_definitions(app, doctree) -> None:
    """Give each exported cell an anchor, and remember which names it defines."""
    chapter = chapter_of(app.env.docname)
    known = app.env.__dict__.setdefault("gptlib_names", {})
    for name in [name for name, place in known.items() if place[0] == app.env.docname]:
        del known[name]
    if chapter is None:
        return
    exported = (
        c
        for c in doctree.findall(nodes.container)
        if "tag_export" in c.get("classes", [])
    )
    for number, cell in enumerate(exported, start=1):
        cell["ids"].append(f"exported-{number}")
        for name in names_of(cell):
            known[f"gptlib.{chapter.module}.{name}"] = (
                app.env.docname,
                f"exported-{number}",
            )


def link(
    app, docname: str, target: str, anchor: str, text: nodes.Node
) -> nodes.reference:
    address = app.builder.get_relative_uri(docname, target) + f"#{anchor}"
    return nodes.reference("", "", text, refuri=address, internal=True)


def mark_exported_cells(app, doctree, docname: str) -> None:
    chapter = chapter_of(docname)
    for cell in list(doctree.findall(nodes.container)):
        if not chapter or "tag_export" not in cell.get("classes", []):
            continue
        line = nodes.paragraph("", "", classes=["goes-to"])
        line += nodes.inline("", "goes into ")
        source, index = (
            f"_modules/gptlib/{chapter.module.replace('.', '/')}",
            "book/library",
        )
        file = nodes.literal("", chapter.module_path.relative_to(ROOT).as_posix())
        names = names_of(cell)
        line += link(app, docname, source, names[0] if names else "", file)
        for name in names:
            line += nodes.inline("", ", " if name != names[0] else ": ")
            text = nodes.literal("", name)
            line += link(app, docname, index, f"gptlib.{chapter.module}.{name}", text)
        cell.insert(0, line)
    if chapter and chapter.scripts:
        for block in list(doctree.findall(nodes.literal_block)):
            if block.get("language") == "javascript":
                line = nodes.paragraph("", "", classes=["goes-to"])
                line += nodes.inline("", "goes into ")
                name = chapter.script_path.relative_to(ROOT).as_posix()
                line += nodes.literal("", name)
                block.parent.insert(block.parent.index(block), line)
    if docname == "book/library":
        known = app.env.gptlib_names
        for signature in doctree.findall(lambda n: n.tagname == "desc_signature"):
            name = next(iter(signature["ids"]), "")
            if name in known:
                there, anchor = known[name]
                text = nodes.inline(
                    "", f"chapter {chapter_of(there).label}", classes=["defined"]
                )
                signature += link(app, docname, there, anchor, text)


def number_chapters(plain_numbers):
    """Let every number begin with the chapter's own, such as 0 or W3."""

    def assign_section_numbers(self, env):
        changed = plain_numbers(self, env)
        for docname, numbers in env.toc_secnumbers.items():
            chapter = chapter_of(docname)
            if chapter is None:
                continue
            first = chapter.label if chapter.workshop else chapter.number

            def own(number, first=first):
                return number and type(number)([first, *number[1:]])

            env.toc_secnumbers[docname] = {k: own(v) for k, v in numbers.items()}
            title = env.titles[docname]
            title["secnumber"] = own(title.get("secnumber"))
            for reference in env.tocs[docname].findall(nodes.reference):
                reference["secnumber"] = own(reference.get("secnumber"))
        return changed

    return assign_section_numbers


def setup(app) -> dict:
    app.connect("source-read", put_manuscript)
    app.connect("env-get-outdated", read_again)
    app.connect("doctree-read", find_definitions)
    app.connect("doctree-resolved", mark_exported_cells)
    collector = TocTreeCollectorWithStyles
    collector.assign_section_numbers = number_chapters(collector.assign_section_numbers)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
