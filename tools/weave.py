"""Weave: execute a manuscript into its notebook, in plain Markdown, outputs kept.

python tools/weave.py                 execute what changed: code or imported modules
python tools/weave.py 04_attention    only this one, executed even if nothing changed
python tools/weave.py --all           every chapter
python tools/weave.py --text          bring the text up to date, execute nothing
python tools/weave.py --check         write nothing; exit 1 if out of date
python tools/weave.py --to FOLDER     write there, as `make book` does
python tools/weave.py --jobs 2        two at a time, each with half of the processor's
                                      cores; those that measure time alone, before them

What changed is decided by a hash of the chapter's code and of every gptlib module that
it imports, kept in the notebook. A notebook with cells written by hand is left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml
from manuscripts import (
    NOTEBOOKS,
    PACKAGE,
    ROOT,
    Chapter,
    ManuscriptError,
    chapters,
    floors,
    gptlib_imports,
    nbformat,
    new_id,
    text_hash,
    why_damaged,
)
from PIL import Image  # matplotlib brings it
from plain import plain_cells, targets


Notebook = nbformat.NotebookNode
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


def source_path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


@cache
def imports_of_module(module: str) -> frozenset[str]:
    """gptlib modules that a module needs, itself included."""
    direct = gptlib_imports(source_path(module).read_text(encoding="utf-8"))
    return frozenset({module}).union(*(imports_of_module(name) for name in direct))


def source_hash(chapter: Chapter) -> str:
    """Hash of a chapter's code and of all of gptlib that it uses: not of its prose."""
    code = [cell.source for cell in chapter.code_cells]
    direct = set().union(*(gptlib_imports(source) for source in code))
    if any(f"import gptlib{end}" in f"{s}\n" for s in code for end in ("\n", " as")):
        direct |= set(floors())  # which of them it uses cannot be seen
    needed = set().union(*(imports_of_module(name) for name in direct))
    files = [source_path(name) for name in sorted(needed)]
    if "workshop.tinywiki" in needed:
        world = (PACKAGE / "workshop").rglob("*")
        files += sorted(p for p in world if p.suffix in (".txt", ".json", ".toml"))
    digest = hashlib.sha256()
    for part in (
        code + chapter.scripts + [path.read_text(encoding="utf-8") for path in files]
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def opening(chapter: Chapter) -> list[Notebook]:
    """What a notebook says first, for whoever has it alone."""
    kind = "Workshop chapter" if chapter.workshop else "Chapter"
    text = f"*{kind} {chapter.label} of* How GPT works, and how to train one."
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    address = (settings.get("repository") or {}).get("url")
    cells = []
    if any("gptlib" in cell.source for cell in chapter.code_cells) or chapter.exported:
        what = f"git+{address}" if address else "."
        where = "" if address else " in a copy of the book's repository"
        text += f" It needs the library `gptlib`: `pip install {what}`{where}."
        if address:
            text += " On Colab the next cell does that."
            code = f'if "google.colab" in sys.modules:\n    %pip install -q {what}'
            cells = [nbformat.v4.new_code_cell(f"import sys\n\n{code}")]
    return [nbformat.v4.new_markdown_cell(text), *cells]


def inputs(chapter: Chapter) -> Notebook:
    """The chapter as a notebook without outputs; a cell's id depends on its text."""
    cells, problems = plain_cells(chapter)
    if problems := targets()[1] + problems:
        raise ManuscriptError(problems[0])
    cells, seen = opening(chapter) + cells, {}
    for cell in cells:
        cell.id = new_id(cell.cell_type, cell.source, seen)
    known = {"source_hash": source_hash(chapter)}
    known |= chapter.notebook.metadata.get("gptlib", {})
    python = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=python | {"gptlib": known})


def with_outputs(cells: list, stored: Notebook | None) -> list:
    """The cells with the outputs of `stored` for each code cell that is in both."""
    code = (cell for cell in stored.cells if cell.cell_type == "code") if stored else ()
    old = {cell.id: cell for cell in code}
    for cell in cells:
        if cell.cell_type == "code" and cell.id in old:
            cell.outputs = old[cell.id].outputs
            cell.execution_count = old[cell.id].execution_count
    return cells


def read(path: Path) -> Notebook | None:
    """The notebook at `path`, None if there is none, an error if it is damaged."""
    try:
        return nbformat.read(path, as_version=4) if path.exists() else None
    except Exception as error:
        what = f"{path}{why_damaged(error)}"
        raise ManuscriptError(f"{what}; restore or delete it") from None


def never_executed(notebook: Notebook) -> bool:
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    return any(cell.execution_count is None for cell in code)


def stored_hash(notebook: Notebook) -> str:
    return notebook.metadata.get("gptlib", {}).get("source_hash", "")


def view(notebook: Notebook) -> list:
    """All of a notebook but its outputs."""
    keys = ("tags", "jupyter")
    cells = notebook.cells
    return [(c.cell_type, c.source, [c.metadata.get(k) for k in keys]) for c in cells]


def problem(fresh: Notebook, stored: Notebook | None) -> str:
    """Why a stored notebook is out of date, or '' if it is not."""
    if stored is None:
        return "no notebook yet"
    if stored_hash(stored) != stored_hash(fresh):
        return "a cell or an imported module changed since it was executed"
    if never_executed(stored):
        return "a cell was never executed"
    return (
        "" if view(fresh) == view(stored) else "its text differs from the manuscript's"
    )


def refuse_to_lose(fresh: Notebook, stored: Notebook, path: Path) -> None:
    """Raises ManuscriptError, naming them, if a notebook has cells written by hand.

    Weave names a cell after its text, so a cell whose id does not fit its text is a
    person's; it may go only if the manuscript has it too.
    """
    kept = {cell.source.strip() for cell in fresh.cells} | {""}
    mine = [
        cell.source.strip()
        for cell in stored.cells
        if not cell.id.startswith(text_hash(cell.cell_type, cell.source))
        and cell.source.strip() not in kept
    ]
    if mine:
        firsts = "; ".join(repr(source.splitlines()[0][:60]) for source in mine)
        raise ManuscriptError(
            f"{path.name} holds cells written by hand, which would be lost: {firsts}; "
            "move the file to lab/, or copy them into the manuscript"
        )


async def execute(notebook: Notebook, folder: Path, threads: int | None) -> None:
    """Run all cells in a fresh kernel whose working directory is `folder`.

    threads: of the kernel's arithmetic; None leaves that to PyTorch.
    """
    import warnings

    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    warnings.filterwarnings("ignore", module="zmq")
    env = {"GPTLIB_RUNS": str(ROOT / "runs")} | dict(os.environ)
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
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
        await client.async_execute(env=env)
    except CellExecutionError as error:
        raise ManuscriptError(f"a cell failed:\n{error}") from None
    notebook.metadata["language_info"] = {"name": "python"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number


def with_palette(data: bytes) -> bytes:
    """An opaque PNG with a palette of 256 colours, if that is shorter."""
    with Image.open(io.BytesIO(data)) as image:
        alpha = image.getchannel("A") if "A" in image.mode else None
        opaque = alpha is None or alpha.getextrema()[0] == 255
        if image.mode == "P" or not opaque:
            return data
        how = {"method": Image.Quantize.MEDIANCUT, "dither": Image.Dither.NONE}
        small = image.convert("RGB").quantize(256, **how)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return min(file.getvalue(), data, key=len)


def lighten_figures(notebook: Notebook) -> None:
    """Give the figures a palette: lighter to clone, to download and to look at."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for data in [output.data for output in cell.outputs if "data" in output]:
            if "image/png" in data:
                figure = with_palette(base64.b64decode(data["image/png"]))
                data["image/png"] = base64.b64encode(figure).decode()


def refuse_places(notebook: Notebook) -> None:
    """What is committed names no folder of the machine that made it."""
    places = [place for place in (str(ROOT), str(Path.home())) if len(place) > 5]
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            if found := [place for place in places if place in str(output)]:
                raise ManuscriptError(
                    f"an output names a folder of this machine: {found[0]}; "
                    f"print something shorter in\n{cell.source}"
                )


def measures_time(chapter: Chapter) -> bool:
    """Whether another notebook at work beside it would change what it shows."""
    return any("perf_counter" in cell.source for cell in chapter.code_cells)


async def weave(
    chapter: Chapter,
    path: Path,
    forced: bool,
    text_only: bool,
    threads: int | None = None,
) -> str:
    """Bring one notebook up to date; returns what was done."""
    fresh, stored = inputs(chapter), read(path)
    if stored is not None:
        refuse_to_lose(fresh, stored, path)
    if not forced and not problem(fresh, stored):
        return "is up to date"
    began = time.perf_counter()
    with_outputs(fresh.cells, stored)
    current = stored is not None and stored_hash(stored) == stored_hash(fresh)
    if text_only or (current and not forced and not never_executed(fresh)):
        fresh.metadata.gptlib.source_hash = stored_hash(stored) if stored else ""
        done = "text only"
    else:
        for cell in (cell for cell in fresh.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [], None
        # where readers run it, wherever the result goes: chapters read `../ledger`
        home = (NOTEBOOKS / chapter.notebook_path).parent
        home.mkdir(parents=True, exist_ok=True)
        print(f"{chapter.stem} ...", flush=True)
        await execute(fresh, home, threads)
        lighten_figures(fresh)
        if path.is_relative_to(NOTEBOOKS):
            refuse_places(fresh)
        done = f"{time.perf_counter() - began:.1f} s"
    temporary = path.with_suffix(".part")  # by rename: an interruption loses nothing
    nbformat.write(fresh, temporary)
    os.replace(temporary, path)
    return done


def summary(folder: Path) -> None:
    """Print what the cells tagged `summary` said, and the page to open."""
    for path in sorted(folder.rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "summary" in cell.metadata.get("tags", []):
                print("".join(out.get("text", "") for out in cell.outputs).rstrip())
    print(f"\nThe book: {(ROOT / '_build/html/index.html').as_uri()}")


@contextmanager
def naming(chapter: str) -> Iterator[None]:
    """An error inside says in which chapter it is."""
    try:
        yield
    except ManuscriptError as error:
        raise ManuscriptError(f"{chapter}: {error}") from None


def check(wanted: list[Chapter], folder: Path) -> None:
    """Raises ManuscriptError if a notebook is out of date, and prints which and why."""
    stale = 0
    for chapter in wanted:
        with naming(chapter.stem):
            why = problem(inputs(chapter), read(folder / chapter.notebook_path))
        stale += bool(why)
        print(f"{chapter.stem}: {why}\n" if why else "", end="")
    if stale:
        raise ManuscriptError(f"{stale} notebooks are out of date; run `make weave`")


async def in_turns(wanted: list[Chapter], one: Callable, jobs: int) -> None:
    """Await `one` for each chapter, `jobs` at a time where they do not measure time."""
    alone = [c for c in wanted if jobs == 1 or measures_time(c)]
    for chapter in alone:
        await one(chapter)
    room, threads = asyncio.Semaphore(jobs), max(1, (os.cpu_count() or 1) // jobs)

    async def when_there_is_room(chapter: Chapter) -> None:
        async with room:
            await one(chapter, threads)

    try:
        async with asyncio.TaskGroup() as group:  # an error or Ctrl-C ends the others
            for chapter in wanted:
                if chapter not in alone:
                    group.create_task(when_there_is_room(chapter))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def refuse_strays(folder: Path) -> None:
    """Raises ManuscriptError for a notebook that no chapter makes."""
    wanted = {chapter.notebook_path for chapter in chapters()}
    for path in sorted(folder.rglob("*.ipynb")):
        inside = path.relative_to(folder)
        if inside not in wanted and ".ipynb_checkpoints" not in path.parts:
            raise ManuscriptError(f"{path}: no chapter makes it; move it to lab/")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("chapters", nargs="*", metavar="NN_name")
    for flag in ("--all", "--text", "--check", "--summary"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--to", type=Path, default=NOTEBOOKS, metavar="FOLDER")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    by_name = {chapter.stem: chapter for chapter in chapters()}
    if unknown := [name for name in options.chapters if name not in by_name]:
        names = ", ".join(by_name)
        raise ManuscriptError(f"no chapter {unknown[0]!r}; there are {names}")
    if options.summary:
        return summary(options.to)
    wanted = [by_name[name] for name in options.chapters or by_name]

    async def one(chapter: Chapter, threads: int | None = None) -> None:
        path = options.to / chapter.notebook_path
        path.parent.mkdir(parents=True, exist_ok=True)
        forced = options.all or bool(options.chapters)
        with naming(chapter.stem):
            done = await weave(chapter, path, forced, options.text, threads)
        print(chapter.stem, done, flush=True)

    if options.check:
        check(wanted, options.to)
    else:
        asyncio.run(in_turns(wanted, one, options.jobs))
    refuse_strays(options.to)


if __name__ == "__main__":
    main()
