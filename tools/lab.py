"""The reader's own copies: lab/ holds every notebook and page once.

python tools/lab.py    make what is missing; never write over what a reader changed

A file that is byte for byte what was put there may be replaced by a newer edition. Any
other is the reader's: a newer edition is laid beside it as NAME.new.ipynb, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from manuscripts import (
    NOT_PLAIN,
    NOTEBOOKS,
    ROOT,
    Chapter,
    chapters,
    nbformat,
    pages,
    why_damaged,
)
from plain import plain_cells
from weave import KERNELSPEC, read


LAB = ROOT / "lab"
START = """# How GPT works, and how to train one

This folder is yours. The notebooks in it are copies: change them, add cells, save.
`make lab` never writes over what you have changed. If there is a newer edition of a
chapter, it is laid beside yours as `NAME.new.ipynb`.

## Chapters

{lessons}

## Workshop

{workshop}

## Other pages

- [README](README.ipynb)
{others}
"""


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reader_pages() -> list[Chapter]:
    return [page for page in pages() if page.stem not in NOT_PLAIN]


def as_bytes(notebook: nbformat.NotebookNode) -> bytes:
    """A notebook as a file of lab/, where the pages lie beside the chapters."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
        for page in reader_pages():
            old = f"../book/{page.stem}.md"
            cell.source = cell.source.replace(old, f"{page.stem}.ipynb")
    return (nbformat.writes(notebook) + "\n").encode()


def as_notebook(text: str) -> bytes:
    """Markdown as a notebook, since JupyterLab shows a .md file as its source."""
    parts = [part.strip() for part in re.split(r"\n(?=## )", text)]
    new = nbformat.v4.new_markdown_cell
    cells = [new(part, id=f"page-{i}") for i, part in enumerate(parts)]
    metadata = {"kernelspec": KERNELSPEC}
    return as_bytes(nbformat.v4.new_notebook(cells=cells, metadata=metadata))


def start_page() -> str:
    def rows(chosen: list[Chapter]) -> str:
        paths = [c.notebook_path if c.label else f"{c.stem}.ipynb" for c in chosen]
        names = [f"{c.label}. {c.title}" if c.label else c.title for c in chosen]
        return "\n".join(f"- [{n}]({p})" for n, p in zip(names, paths, strict=True))

    return START.format(
        lessons=rows([c for c in chapters() if not c.workshop]),
        workshop=rows([c for c in chapters() if c.workshop]),
        others=rows(reader_pages()),
    )


def editions() -> dict[str, bytes]:
    """What lab/ should hold: name -> content."""

    def move(link: re.Match) -> str:
        return "](" if link[1] else "](../"

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"\]\((?!https?:|mailto:|#)(notebooks/)?", move, readme)
    files = {"00_start.ipynb": as_notebook(start_page())}
    files["README.ipynb"] = as_notebook(readme)
    for page in reader_pages():
        text = "\n\n".join(cell.source for cell in plain_cells(page)[0])
        files[f"{page.stem}.ipynb"] = as_notebook(text)
    for chapter in chapters():
        if notebook := read(NOTEBOOKS / chapter.notebook_path):
            files[chapter.notebook_path.as_posix()] = as_bytes(notebook)
    return files


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def place(path: Path, data: bytes, known: list[str]) -> str:
    """Put one edition at `path`; `known` holds the hashes of all put there before."""
    new, done = sha(data), ""
    path.parent.mkdir(parents=True, exist_ok=True)
    present = sha(path.read_bytes()) if path.exists() else ""
    if not present or (present in known and new not in known):
        write(path, data)
    elif present != new and new not in known:
        names = [f"{path.stem}.new{n or ''}.ipynb" for n in (0, *range(2, 1000))]
        beside = next(
            path.with_name(name)
            for name in names
            if not path.with_name(name).exists()
            or sha(path.with_name(name).read_bytes()) in known
        )
        write(beside, data)
        done = f"{path.name} is yours; the newer edition lies beside it: {beside.name}"
    if new not in known:
        known.append(new)
    return done


def fill(lab: Path, files: dict[str, bytes]) -> list[str]:
    """Bring `lab` up to date and lose no byte of the reader's; lines to print."""
    lab.mkdir(parents=True, exist_ok=True)
    record, lines, known = lab / ".editions.json", [], {}
    try:
        stored = (
            json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        )
        known = {name: [str(h) for h in hashes] for name, hashes in stored.items()}
    except (ValueError, AttributeError, TypeError):
        lines.append(f"{record.name} is damaged: every file in lab/ counts as yours")
    for path in sorted(lab.rglob("*.ipynb")):
        try:
            nbformat.validate(nbformat.read(path, as_version=4))
        except Exception as error:
            what = f"lab/{path.relative_to(lab)}{why_damaged(error)}"
            cure = "left as it is; move it away and run `make lab` for a fresh one"
            lines.append(f"{what}: {cure}")
    for name, data in files.items():
        lines.append(place(lab / name, data, known.setdefault(name, [])))
        write(record, json.dumps(known, indent=1).encode())
    return [line for line in lines if line]


if __name__ == "__main__":
    print("\n".join([*fill(LAB, editions()), "your copies: lab/00_start.ipynb"]))
