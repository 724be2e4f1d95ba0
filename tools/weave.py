"""Weave: execute book/chapters/NN_name.md into notebooks/NN_name.ipynb, outputs kept.

    python tools/weave.py                 execute the chapters whose text or imported modules changed
    python tools/weave.py 04_attention    only this one (executed even if nothing changed)
    python tools/weave.py --all           every chapter
    python tools/weave.py --inputs        update the notebooks' input cells, execute nothing
    python tools/weave.py --check         write nothing; exit 1 if a notebook is out of date
    python tools/weave.py --to FOLDER     write there instead of notebooks/ (what `make book` does)

What changed is decided by a hash of the chapter and of every gptlib module it imports, kept in the
notebook; file times never matter.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
from manuscripts import NOTEBOOKS, PACKAGE, ROOT, Chapter, ManuscriptError, chapters, gptlib_imports

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
CURE = "mend: run `make weave` and commit notebooks/"


def source_path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


@cache
def imports_of_module(module: str) -> frozenset[str]:
    """gptlib modules that a module needs, itself included."""
    direct = gptlib_imports(source_path(module).read_text(encoding="utf-8"))
    return frozenset({module}).union(*(imports_of_module(name) for name in direct))


def source_hash(chapter: Chapter) -> str:
    """Hash of all that decides a chapter's outputs: its code and every gptlib module it imports.

    Prose does not count, so that mending a sentence never makes a notebook stale.
    """
    code = [cell.source for cell in chapter.code_cells]
    needed = set().union(
        *(imports_of_module(name) for source in code for name in gptlib_imports(source))
    )
    digest = hashlib.sha256()
    for part in code + [
        source_path(name).read_text(encoding="utf-8") for name in sorted(needed)
    ]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def inputs(chapter: Chapter) -> nbformat.NotebookNode:
    """The chapter as a notebook without outputs, with cell ids that depend on its text alone."""
    cells, seen = [], {}
    for cell in chapter.notebook.cells:
        key = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[key] = seen.get(key, 0) + 1
        make = (
            nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        )
        metadata = {
            name: cell.metadata[name] for name in ("tags", "mystnb") if name in cell.metadata
        }
        cells.append(make(cell.source, id=f"{key}-{seen[key]}", metadata=metadata))
    metadata = {
        "kernelspec": KERNELSPEC,
        "language_info": {"name": "python"},
        "gptlib": {
            **chapter.notebook.metadata.get("gptlib", {}),
            "source_hash": source_hash(chapter),
        },
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def with_stored_outputs(
    fresh: nbformat.NotebookNode, stored: nbformat.NotebookNode
) -> nbformat.NotebookNode:
    """`fresh` with the outputs of `stored` for each cell that is in both."""
    old = {cell.id: cell for cell in stored.cells if cell.cell_type == "code"}
    for cell in fresh.cells:
        if cell.cell_type == "code" and cell.id in old:
            cell.outputs, cell.execution_count = old[cell.id].outputs, old[cell.id].execution_count
    return fresh


def problem(chapter: Chapter, path: Path) -> str:
    """Why the stored notebook at `path` is out of date, or '' if it is not."""
    if not path.exists():
        return "no notebook yet"
    fresh, stored = inputs(chapter), nbformat.read(path, as_version=4)
    if not same_inputs(fresh, stored):
        return "its input cells differ from the manuscript's"
    if stored.metadata.get("gptlib", {}).get("source_hash") != fresh.metadata.gptlib.source_hash:
        return "a cell or an imported module changed since it was executed"
    if any(
        cell.execution_count is None
        for cell in stored.cells
        if cell.cell_type == "code" and cell.source
    ):
        return "a cell was never executed"
    return ""


def same_inputs(one: nbformat.NotebookNode, other: nbformat.NotebookNode) -> bool:
    def view(notebook):
        return [
            (c.cell_type, c.source, c.metadata.get("tags", []), c.metadata.get("mystnb", {}))
            for c in notebook.cells
        ]

    return view(one) == view(other)


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
        notebook, timeout=None, record_timing=False, coalesce_streams=True, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    try:
        asyncio.run(client.async_execute())
    except CellExecutionError as error:
        raise ManuscriptError(f"a cell failed:\n{error}") from None
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number + 1
            found = [
                place
                for place in (str(ROOT), str(Path.home()))
                if len(place) > 5 and place in str(output)
            ]
            if found:
                raise ManuscriptError(
                    f"an output names a folder of this machine: {found[0]}; print something shorter in\n{cell.source}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", metavar="NN_name", help="only these chapters")
    parser.add_argument("--all", action="store_true", help="execute even what has not changed")
    parser.add_argument("--inputs", action="store_true", help="update input cells, execute nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a notebook is out of date"
    )
    parser.add_argument("--to", type=Path, default=NOTEBOOKS, help="folder to write notebooks to")
    options = parser.parse_args()
    chosen = chapters()
    if options.chapters:
        by_name = {chapter.stem: chapter for chapter in chosen}
        unknown = [name for name in options.chapters if name not in by_name]
        if unknown:
            raise ManuscriptError(f"no chapter {unknown[0]!r}; there are {', '.join(by_name)}")
        chosen = [by_name[name] for name in options.chapters]
    if options.check:
        return check(chosen)
    options.to.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for number, chapter in enumerate(chosen, start=1):
        path = options.to / chapter.notebook_path
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = next(
            (nbformat.read(p, as_version=4) for p in (path, NOTEBOOKS / chapter.notebook_path) if p.exists()),
            None,
        )
        if options.inputs:
            if stored is None or not same_inputs(inputs(chapter), stored):
                fresh = inputs(chapter)
                if stored is not None:
                    with_stored_outputs(fresh, stored)
                    fresh.metadata.gptlib.source_hash = stored.metadata.get("gptlib", {}).get(
                        "source_hash", ""
                    )
                write(fresh, path)
                print(f"inputs of {path.name} updated")
            continue
        if not options.all and not options.chapters and not problem(chapter, path):
            continue
        notebook = inputs(chapter)
        unchanged = (
            stored is not None
            and stored.metadata.get("gptlib", {}).get("source_hash")
            == notebook.metadata.gptlib.source_hash
        )
        same_folder = path.exists() or options.to == NOTEBOOKS
        print(f"[{number:2d}/{len(chosen)}] {chapter.stem} ", end="", flush=True)
        began = time.perf_counter()
        if unchanged and same_folder and not options.all and not options.chapters:
            notebook = with_stored_outputs(notebook, stored)
            done = "text only"
            if any(
                cell.execution_count is None
                for cell in notebook.cells
                if cell.cell_type == "code" and cell.source
            ):
                unchanged = False
        else:
            unchanged = False
        if not unchanged:
            try:
                execute(notebook, path.parent)
            except ManuscriptError as error:
                print()
                raise ManuscriptError(f"{chapter.stem}: {error}") from None
            done = f"{time.perf_counter() - began:.1f} s"
        write(notebook, path)
        print(done, flush=True)
    stale = {p.name for p in options.to.rglob("*.ipynb")} - {
        c.notebook_path.name for c in chapters()
    }
    if stale:
        raise ManuscriptError(f"{sorted(stale)[0]}: no chapter makes this notebook; delete it")
    if not options.inputs:
        print(f"woven in {time.perf_counter() - started:.0f} s")


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write by rename, so that an interrupted run leaves the old notebook whole."""
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def check(chosen: list[Chapter]) -> None:
    stale = []
    for chapter in chosen:
        why = problem(chapter, NOTEBOOKS / chapter.notebook_path)
        if why:
            stale.append(chapter.stem)
            print(f"notebooks/{chapter.stem}.ipynb: {why}")
            if (NOTEBOOKS / chapter.notebook_path).exists():
                stored = nbformat.read(NOTEBOOKS / chapter.notebook_path, as_version=4)
                old, new = (
                    "\n".join(cell.source for cell in nb.cells).split("\n")
                    for nb in (stored, inputs(chapter))
                )
                print(
                    "\n".join(difflib.unified_diff(old, new, "notebook", "manuscript", lineterm=""))
                )
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; {CURE}")


if __name__ == "__main__":
    try:
        main()
    except ManuscriptError as error:
        sys.exit(f"weave: {error}")
