"""Weave: execute a manuscript into its notebook, in plain Markdown, outputs kept.

python tools/weave.py                 execute the chapters whose code or imported modules changed
python tools/weave.py 04_attention    only this one, executed even if nothing changed
python tools/weave.py --all           every chapter
python tools/weave.py --text          bring text and inputs up to date, execute nothing
python tools/weave.py --check         write nothing; exit 1 if a notebook is out of date
python tools/weave.py --to FOLDER     write there instead of notebooks/ (what `make book` does)

What changed is decided by a hash of the chapter's code and of every gptlib module it imports, kept
in the notebook; file times never matter. A notebook that holds cells written by hand is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import nbformat
import yaml


sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import (
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    Chapter,
    ManuscriptError,
    chapters,
    floors,
    gptlib_imports,
    new_id,
    text_hash,
)
from plain import plain_cells, targets


KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
CURE = "mend: run `make weave` and commit notebooks/"


@cache
def imports_of_module(module: str) -> frozenset[str]:
    """gptlib modules that a module needs, itself included."""
    source = (
        PACKAGE.joinpath(*module.split("."))
        .with_suffix(".py")
        .read_text(encoding="utf-8")
    )
    return frozenset({module}).union(
        *(imports_of_module(n) for n in gptlib_imports(source))
    )


def source_hash(chapter: Chapter) -> str:
    """Hash of all that decides a chapter's outputs: its code and every gptlib module it imports.

    Prose does not count, so that mending a sentence never makes a notebook stale.
    """
    code = [cell.source for cell in chapter.code_cells]
    direct = set().union(*(gptlib_imports(source) for source in code))
    if any(
        "import gptlib\n" in f"{source}\n" or "from gptlib import" in source
        for source in code
    ):
        direct |= set(floors())
    needed = set().union(*(imports_of_module(name) for name in direct))
    files = [
        PACKAGE.joinpath(*name.split(".")).with_suffix(".py") for name in sorted(needed)
    ]
    if "workshop.tinywiki" in needed:
        files += sorted(
            p
            for p in (PACKAGE / "workshop").rglob("*")
            if p.suffix in (".txt", ".json", ".toml")
        )
    digest = hashlib.sha256()
    for part in code + [path.read_text(encoding="utf-8") for path in files]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def repository() -> str:
    """The book's public address, or '' while `_config.yml` names none."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return (settings.get("repository") or {}).get("url") or ""


def opening(chapter: Chapter) -> list[nbformat.NotebookNode]:
    """What a notebook says first, for whoever has it alone."""
    kind = "Workshop chapter" if chapter.workshop else "Chapter"
    text = f"*{kind} {chapter.label} of* How GPT works, and how to train one."
    if not chapter.exported and not any(
        gptlib_imports(c.source) for c in chapter.code_cells
    ):
        return [nbformat.v4.new_markdown_cell(text)]
    address = repository()
    if not address:
        text += " It needs the library `gptlib`: run `pip install .` in a copy of the book's repository."
        return [nbformat.v4.new_markdown_cell(text)]
    text += (
        f" It needs the library `gptlib`. If you have this notebook alone, run "
        f"`pip install git+{address}` first; on Colab the next cell does it."
    )
    code = f'import sys\n\nif "google.colab" in sys.modules:\n    %pip install --quiet git+{address}'
    return [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]


def inputs(chapter: Chapter) -> nbformat.NotebookNode:
    """The chapter as a notebook without outputs; a cell's id depends on its text alone."""
    cells, problems = plain_cells(chapter)
    if problems := targets()[1] + problems:
        raise ManuscriptError(problems[0])
    cells, seen = opening(chapter) + cells, {}
    for cell in cells:
        cell.id = new_id(cell.cell_type, cell.source, seen)
    known = {
        "source_hash": source_hash(chapter),
        **chapter.notebook.metadata.get("gptlib", {}),
    }
    metadata = {
        "kernelspec": KERNELSPEC,
        "language_info": {"name": "python"},
        "gptlib": known,
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def with_outputs(cells: list, stored: nbformat.NotebookNode) -> list:
    """The cells with the outputs of `stored` for each code cell that is in both."""
    old = {cell.id: cell for cell in stored.cells if cell.cell_type == "code"}
    for cell in cells:
        if cell.cell_type == "code" and cell.id in old:
            cell.outputs = old[cell.id].outputs
            cell.execution_count = old[cell.id].execution_count
    return cells


def read(path: Path) -> nbformat.NotebookNode | None:
    """The notebook at `path`, None if there is none. Raises ManuscriptError for a damaged one."""
    if not path.exists():
        return None
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        reason = str(error).splitlines()[0][:80]
        raise ManuscriptError(
            f"{path} is damaged ({reason}); restore it or delete it"
        ) from None


def never_executed(notebook: nbformat.NotebookNode) -> bool:
    code = (c for c in notebook.cells if c.cell_type == "code" and c.source)
    return any(cell.execution_count is None for cell in code)


def same_inputs(one: nbformat.NotebookNode, other: nbformat.NotebookNode) -> bool:
    """Whether two notebooks differ in nothing but outputs."""

    def view(notebook):
        keys = ("tags", "jupyter")
        return [
            (c.cell_type, c.source, [c.metadata.get(k) for k in keys])
            for c in notebook.cells
        ]

    return view(one) == view(other)


def problem(chapter: Chapter, path: Path) -> str:
    """Why the notebook at `path` is out of date, or '' if it is not."""
    stored = read(path)
    if stored is None:
        return "no notebook yet"
    fresh = inputs(chapter)
    if (
        stored.metadata.get("gptlib", {}).get("source_hash")
        != fresh.metadata.gptlib.source_hash
    ):
        return "a cell or an imported module changed since it was executed"
    if never_executed(stored):
        return "a cell was never executed"
    return (
        "" if same_inputs(fresh, stored) else "its text differs from the manuscript's"
    )


def refuse_to_lose(
    stored: nbformat.NotebookNode, fresh: nbformat.NotebookNode, path: Path
) -> None:
    """Raises ManuscriptError, naming them, if `stored` holds cells that somebody wrote by hand.

    Weave names a cell after its text, so a cell whose id does not fit its text is a person's. It
    may go only if the manuscript or the last commit holds it too.
    """
    kept = {cell.source.strip() for cell in fresh.cells}
    mine = [
        cell
        for cell in stored.cells
        if not cell.id.startswith(text_hash(cell.cell_type, cell.source))
        and cell.source.strip() not in kept | {""}
    ]
    if mine:
        name = (
            path.resolve().relative_to(ROOT).as_posix()
            if path.resolve().is_relative_to(ROOT)
            else "?"
        )
        done = subprocess.run(
            ["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True
        )
        if done.returncode == 0:
            kept = {
                c.source.strip() for c in nbformat.reads(done.stdout.decode(), 4).cells
            }
            mine = [cell for cell in mine if cell.source.strip() not in kept]
    if mine:
        firsts = "; ".join(
            repr(cell.source.strip().splitlines()[0][:60]) for cell in mine
        )
        raise ManuscriptError(
            f"{path.name} holds {len(mine)} cells written by hand, which would be lost: {firsts}; "
            "move the file to lab/ or copy them into the manuscript"
        )


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel whose working directory is `folder`."""
    import asyncio
    import warnings

    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    warnings.filterwarnings("ignore", module="zmq")
    os.environ.setdefault("GPTLIB_RUNS", str(ROOT / "runs"))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        asyncio.run(client.async_execute())
    except CellExecutionError as error:
        raise ManuscriptError(f"a cell failed:\n{error}") from None
    notebook.metadata["language_info"] = {"name": "python"}
    places = [place for place in (str(ROOT), str(Path.home())) if len(place) > 5]
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number + 1
            if found := [place for place in places if place in str(output)]:
                raise ManuscriptError(
                    f"an output names a folder of this machine: {found[0]}; "
                    f"print something shorter in\n{cell.source}"
                )


def weave(chapter: Chapter, path: Path, options: argparse.Namespace) -> str:
    """Bring one notebook up to date; returns what was done, '' if nothing had to be."""
    fresh, stored = inputs(chapter), read(path)
    if stored is not None:
        refuse_to_lose(stored, fresh, path)
    forced = options.all or options.chapters
    if not forced and not options.text and not problem(chapter, path):
        return ""
    began = time.perf_counter()
    old = stored if stored is not None else read(NOTEBOOKS / chapter.notebook_path)
    if old is not None:
        with_outputs(fresh.cells, old)
    hash_of_old = (old or fresh).metadata.get("gptlib", {}).get("source_hash", "")
    current = hash_of_old == fresh.metadata.gptlib.source_hash and not never_executed(
        fresh
    )
    if options.text or (current and stored is not None and not forced):
        if stored is not None and same_inputs(fresh, stored):
            return ""
        if not current:
            fresh.metadata.gptlib.source_hash = ""
        done = "text only"
    else:
        for cell in fresh.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        execute(fresh, path.parent)
        done = f"{time.perf_counter() - began:.1f} s"
    temporary = path.with_suffix(
        ".tmp"
    )  # by rename: an interruption leaves the old one whole
    nbformat.write(fresh, temporary)
    os.replace(temporary, path)
    return done


def check(chosen: list[Chapter]) -> None:
    stale = {c: why for c in chosen if (why := problem(c, NOTEBOOKS / c.notebook_path))}
    for chapter, why in stale.items():
        print(f"notebooks/{chapter.notebook_path.as_posix()}: {why}")
    if stale:
        raise ManuscriptError(f"{len(stale)} notebooks are out of date; {CURE}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "chapters", nargs="*", metavar="NN_name", help="only these chapters"
    )
    parser.add_argument(
        "--all", action="store_true", help="execute even what has not changed"
    )
    parser.add_argument("--text", action="store_true", help="execute nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if out of date"
    )
    parser.add_argument(
        "--to", type=Path, default=NOTEBOOKS, help="folder to write notebooks to"
    )
    options = parser.parse_args()
    by_name = {chapter.stem: chapter for chapter in chapters()}
    if unknown := [name for name in options.chapters if name not in by_name]:
        raise ManuscriptError(
            f"no chapter {unknown[0]!r}; there are {', '.join(by_name)}"
        )
    chosen = [by_name[name] for name in options.chapters or by_name]
    if options.check:
        return check(chosen)
    for chapter in chosen:
        path = options.to / chapter.notebook_path
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{chapter.stem} ", end="", flush=True)
        try:
            print(weave(chapter, path, options) or "is up to date", flush=True)
        except ManuscriptError as error:
            print()
            raise ManuscriptError(f"{chapter.stem}: {error}") from None
    wanted = {chapter.notebook_path for chapter in chapters()}
    for path in sorted(options.to.rglob("*.ipynb")):
        if (
            path.relative_to(options.to) not in wanted
            and ".ipynb_checkpoints" not in path.parts
        ):
            raise ManuscriptError(
                f"{path.name}: no chapter makes this notebook; delete it or move it to lab/"
            )


if __name__ == "__main__":
    try:
        main()
    except ManuscriptError as error:
        sys.exit(f"weave: {error}")
