"""Sphinx extension: a line over each exported cell that names the module it goes to."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def mark_exported_cells(app, doctree, docname: str) -> None:
    from manuscripts import chapters

    modules = {chapter.stem: chapter.module for chapter in chapters()}
    module = modules.get(Path(docname).name)
    for cell in list(doctree.findall(nodes.container)):
        if module and "tag_export" in cell.get("classes", []):
            label = nodes.paragraph(
                "",
                "",
                nodes.inline("", "goes to "),
                nodes.literal("", f"gptlib/{module}.py"),
                classes=["goes-to"],
            )
            cell.insert(0, label)


def setup(app) -> dict:
    app.connect("doctree-resolved", mark_exported_cells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
