"""The reader's own copies: lab/ holds every notebook and page once, and is never overwritten.

python tools/lab.py    make what is missing; offer newer editions beside what a reader has touched

A file that is byte for byte what was put there may be replaced by a newer edition. Any other is
the reader's: a newer edition is laid beside it as NAME.new.ipynb, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat


sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import (
    NOT_PLAIN,
    NOTEBOOKS,
    ROOT,
    Chapter,
    ManuscriptError,
    chapters,
    pages,
)
from plain import plain_cells
from weave import KERNELSPEC, read


LAB = ROOT / "lab"
START = "00_start.ipynb"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_bytes(notebook: nbformat.NotebookNode) -> bytes:
    """A notebook as a file of lab/, where the pages of the book lie beside the chapters."""
    texts = (cell for cell in notebook.cells if cell.cell_type == "markdown")
    for cell in texts:
        for page in (p for p in pages() if p.stem not in NOT_PLAIN):
            cell.source = cell.source.replace(
                f"../book/{page.stem}.md", f"{page.stem}.ipynb"
            )
        cell.source = cell.source.replace("../README.md", "README.ipynb")
    return (nbformat.writes(notebook) + "\n").encode()


def page_notebook(text: str) -> nbformat.NotebookNode:
    """Markdown as a notebook, since JupyterLab shows a .md file as its source."""
    parts = re.split(r"\n(?=## )", text)
    cells = [
        nbformat.v4.new_markdown_cell(p.strip(), id=f"page-{i}")
        for i, p in enumerate(parts)
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})


def start_page() -> str:
    def row(chapter: Chapter) -> str:
        return (
            f"- [{chapter.label}. {chapter.title}]({chapter.notebook_path.as_posix()})"
        )

    lessons = "\n".join(row(c) for c in chapters() if not c.workshop)
    workshop = "\n".join(row(c) for c in chapters() if c.workshop)
    others = "\n".join(
        f"- [{p.title}]({p.stem}.ipynb)" for p in pages() if p.stem not in NOT_PLAIN
    )
    return (
        "# How GPT works, and how to train one\n\n"
        "This folder is yours. The notebooks in it are copies: change them, add cells, save. "
        "`make lab` never writes over what you have changed; a newer edition of a chapter is laid "
        "beside yours, as `NAME.new.ipynb`.\n\n"
        f"## Chapters\n\n{lessons}\n\n## Workshop\n\n{workshop}\n\n"
        f"## Other pages\n\n- [README](README.ipynb)\n{others}\n"
    )


def editions() -> dict[str, bytes]:
    """What lab/ should hold: name -> content."""
    files = {START: as_bytes(page_notebook(start_page()))}
    readme = re.sub(
        r"\]\((?!https?:|mailto:|#)(?:notebooks/)?",
        lambda found: "](" if "notebooks/" in found[0] else "](../",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    files["README.ipynb"] = as_bytes(page_notebook(readme))
    for page in (p for p in pages() if p.stem not in NOT_PLAIN):
        text = "\n\n".join(cell.source for cell in plain_cells(page)[0])
        files[f"{page.stem}.ipynb"] = as_bytes(page_notebook(text))
    for chapter in chapters():
        notebook = read(NOTEBOOKS / chapter.notebook_path)
        if notebook is not None:
            files[chapter.notebook_path.as_posix()] = as_bytes(notebook)
    return files


def damage(path: Path) -> str:
    """Why a notebook of the reader's cannot be opened, or ''."""
    try:
        nbformat.validate(nbformat.read(path, as_version=4))
        return ""
    except Exception as error:
        return str(error).splitlines()[0][:80]


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def place(lab: Path, name: str, data: bytes, known: list[str]) -> str:
    """Put one edition into `lab`; `known` lists the hashes of those put there. What was done."""
    path, new = lab / name, sha(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write(path, data)
        done = ""
    elif (present := sha(path.read_bytes())) == new or new in known:
        done = ""
    elif present in known:
        write(path, data)
        done = f"lab/{name}: newer edition (you had not changed it)"
    else:
        for number in ("", *range(2, 1000)):
            beside = path.with_name(f"{path.stem}.new{number}.ipynb")
            if not beside.exists() or sha(beside.read_bytes()) in known:
                break
        write(beside, data)
        done = f"lab/{name}: yours; a newer edition lies beside it, {beside.name}"
    if new not in known:
        known.append(new)
    return done


def fill(lab: Path, files: dict[str, bytes]) -> list[str]:
    """Bring `lab` up to date without losing a byte of the reader's; returns lines to print."""
    lab.mkdir(parents=True, exist_ok=True)
    record, lines = lab / ".editions.json", []
    try:
        known = (
            json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        )
        known = {str(name): [str(h) for h in hashes] for name, hashes in known.items()}
    except (ValueError, AttributeError, TypeError):
        known = {}
        lines.append(
            f"{record} is damaged; every notebook in lab/ counts as changed by you"
        )
    for path in sorted(lab.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and (why := damage(path)):
            lines.append(
                f"lab/{path.relative_to(lab).as_posix()} is damaged ({why}); left as it is"
            )
    for name, data in files.items():
        lines.append(place(lab, name, data, known.setdefault(name, [])))
        write(record, json.dumps(known, indent=1).encode())
    return [line for line in lines if line]


if __name__ == "__main__":
    try:
        for line in fill(LAB, editions()):
            print(line)
        print(f"your copies: lab/; begin with lab/{START}")
    except ManuscriptError as error:
        sys.exit(f"lab: {error}")
