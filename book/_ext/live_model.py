"""Sphinx extension: the model that answers inside the page.

A page with an empty `<div class="gpt-page">` gets the model's program and style, and
stored examples for a reader without JavaScript. The weights lie beside the program. The
small form of the front page loads them when its button is pressed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gptlib.page import page_body, read_page_weights


ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "gptlib" / "web"
PROGRAM = ("start.js", "page.js", "view.js")
PLACE = re.compile(r'<div class="gpt-page"(?: data-form="(\w+)")?></div>')


def weight_file() -> Path:
    """The weights that `make book` has just written, or those of the repository."""
    runs = Path(os.environ.get("GPTLIB_RUNS") or ROOT / "runs")
    trained = runs / "page" / "weights.js"
    if os.environ.get("BOOK_NOTEBOOKS") and trained.exists():
        return trained
    return ROOT / "book" / "page" / "weights.js"


def copy_program(app) -> None:
    if app.builder.format != "html":
        return
    folder = Path(app.outdir, "_static", "gpt")
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*(WEB / name for name in PROGRAM), WEB / "view.css", weight_file()]:
        shutil.copyfile(path, folder / path.name)
    app.env.gptlib_header = read_page_weights(weight_file())[0]


def fill_places(app, pagename, templatename, context, doctree) -> None:
    if not PLACE.search(context.get("body") or ""):
        return
    weights = context["pathto"]("_static/gpt/weights.js", resource=True)

    def fill(found: re.Match) -> str:
        form = found[1] or "whole"
        return page_body(app.env.gptlib_header, weights=weights, form=form)

    context["body"] = PLACE.sub(fill, context["body"])
    for name in PROGRAM:
        app.add_js_file(f"gpt/{name}", loading_method="defer")
    app.add_css_file("gpt/view.css")


def setup(app) -> dict:
    app.connect("builder-inited", copy_program)
    app.connect("html-page-context", fill_places)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
