"""The tools on a small book of their own: what they make and what they refuse.

Above all: that nothing a reader wrote is lost.
"""
# ruff: noqa: E501

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "ledger")]

HEADER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
ONE = (
    HEADER
    + r"""(ch-one)=
# The first chapter

It leads to {ref}`chapter 2 <ch-two>`, to {ref}`sec-more` and to {doc}`setup <../../book/setup>`.
See {eq}`eq-one`, {numref}`fig-one`, {numref}`the picture %s <fig-one>`, {ref}`ex-one` and {term}`nat`.
As {cite:t}`vaswani` say, attention is all one needs {cite}`vaswani,press`.

```{math}
:label: eq-one
a = b .
```

```{code-cell} ipython3
:tags: [export]

import math
```

```{code-cell} ipython3
:tags: [export]

def area(r: float) -> float:
    '''Area of a circle. In square units.'''
    return math.pi * r * r
```

```{code-cell} ipython3
---
tags: [hide-input]
mystnb:
  figure: {caption: "A *circle* of {eq}`eq-one`.", name: fig-one}
---
print(round(area(2), 3), 12_345)
```

(sec-more)=
## More of it

```{note}
Mind the gap.
```

````{dropdown} Why $\pi$
Because of `{ref}` and
```python
x = "{eq}`no role`"
```
````

```{exercise} Squares (2 minutes)
:label: ex-one
Square a circle of {eq}`eq-one`.
```

````{solution-start} ex-one
:class: dropdown
````

It cannot be done.

```{code-cell} ipython3
print("solved")
```

Not at all.

````{solution-end}
````

## Summary

The area is 12.566, or 12,345 of something, and 50.0% is from {cite}`press`.
"""
)
TWO = (
    HEADER
    + """(ch-two)=
# The second chapter

```{code-cell} ipython3
from gptlib.one import area

print(area(1))
```

```{exercise} Untold
:label: ex-two
Say {ref}`one <ch-one>`.
```
"""
)
BIB = """@article{vaswani, author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki}, title={Attention}, year={2017}, journal={arXiv:1706.03762}}
@misc{press, author={Press, Ofir and Wolf, Lior}, title={A {Tie}}, year={2016}}
"""


@pytest.fixture(scope="session")
def first_edition(tmp_path_factory):
    """A project with two chapters; its notebooks are written, not executed."""
    book = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "tools", book / "tools")
    files = {
        "book/chapters/01_one.md": ONE,
        "book/workshop/W2_two.md": TWO,
        "book/references.bib": BIB,
        "book/setup.md": "# Setup\n\nSee {ref}`ch-one`.\n",
        "book/glossary.md": "# Glossary\n\n```{glossary}\nnat\n  A unit.\n```\n",
        "book/index.md": "# Index\n",
        "README.md": "# A book\n\n[First](notebooks/01_one.ipynb), 12.566\n",
        "_config.yml": "title: A book\n",
        "gptlib/__init__.py": "",
        "gptlib/workshop/__init__.py": "",
        "pyproject.toml": '[tool.gptlib]\nfloors = ["one", "workshop.two"]\n',
    }
    for name, text in files.items():
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        (book / name).write_text(text, encoding="utf-8")
    for tool in (("tangle",), ("library_index",), ("toc",), ("weave", "--text")):
        done = run(book, *tool)
        assert done.returncode == 0, done
    return book


@pytest.fixture
def book(first_edition, tmp_path):
    """A copy of it."""
    return shutil.copytree(first_edition, tmp_path / "book")


def run(book, tool, *arguments):
    command = [sys.executable, book / "tools" / f"{tool}.py", *filter(None, arguments)]
    environment = os.environ | {"PYTHONPATH": str(book)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=book, env=environment
    )


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def woven(book, name="01_one"):
    name = f"workshop/{name}" if name.startswith("W") else name
    return nbformat.read(book / "notebooks" / f"{name}.ipynb", as_version=4)


def text_of(book, name="01_one"):
    return "\n\n".join(
        c.source for c in woven(book, name).cells if c.cell_type == "markdown"
    )


def add_cell(path, source):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, path)


WRITERS = [("tangle",), ("library_index",), ("toc",), ("weave", "--text"), ("weave", "--all"), ("weave",), ("format",)]  # fmt: skip


# ------------------------------------------------------------ plain notebooks


@pytest.mark.parametrize(
    "expected",
    [
        "[chapter 2](workshop/W2_two.ipynb)",
        "[More of it](#More-of-it)",
        "[setup](../book/setup.md)",
        "See (1.1), Fig. 1.1, the picture 1.1, Exercise 1.1 and [nat](../book/glossary.md).",
        '[Vaswani et al. (2017)](https://arxiv.org/abs/1706.03762 "Attention") say',
        "needs ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762 \"Attention\"); Press and Wolf, 2016).",
        "$$\na = b . \\tag{1.1}\n$$",
        "*goes into* [`gptlib/one.py`](../gptlib/one.py)",
        "**Fig. 1.1** A *circle* of (1.1).",
        "> **Note.** Mind the gap.",
        "<details>\n<summary>Why $\\pi$</summary>\n\nBecause of `{ref}` and\n```python\nx = \"{eq}`no role`\"\n```\n\n</details>",
        "**Exercise 1.1: Squares (2 minutes)**\n\nSquare a circle of (1.1).",
        "<details>\n<summary>Solution of exercise 1.1</summary>\n\nIt cannot be done.\n\n</details>",
        "<details>\n<summary>Solution of exercise 1.1, continued</summary>\n\nNot at all.\n\n</details>\n\n## Summary",
    ],
)  # fmt: skip
def test_notebooks_are_plain_markdown(plain_text, expected):
    assert expected in plain_text


@pytest.fixture(scope="session")
def plain_text(first_edition):
    return text_of(first_edition)


def test_folds_and_links_from_the_workshop(book):
    cells = {cell.source: cell for cell in woven(book).cells}
    both = {"source_hidden": True, "outputs_hidden": True}
    assert cells['print("solved")'].metadata["jupyter"] == both
    shown = cells["print(round(area(2), 3), 12_345)"].metadata["jupyter"]
    assert shown == {"source_hidden": True}
    assert "[one](../01_one.ipynb)" in text_of(book, "W2_two")
    assert "**Exercise W2.1: Untold**" in text_of(book, "W2_two")


def test_first_cell_says_how_to_get_the_library(book):
    assert "pip install ." in woven(book).cells[0].source
    edit(book / "_config.yml", "book\n", "book\nrepository: {url: https://e.org/b}\n")
    assert run(book, "weave", "--text").returncode == 0
    says, installs = woven(book).cells[:2]
    assert "pip install git+https://e.org/b" in says.source
    assert "google.colab" in installs.source
    assert run(book, "weave").returncode == 0
    assert not woven(book).cells[1].outputs, "does nothing where no Colab is"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{eq}`eq-one`, {num", "{eq}`eq-two`, {num", "{eq} 'eq-two' leads nowhere"),
        ("{term}`nat`", "{term}`bit`", "term 'bit'"),
        ("{term}`nat`", "{trm}`nat`", "role {trm} is unknown"),
        ("vaswani,press", "vaswani,pres", "'pres' is not in book/references.bib"),
        (":label: eq-one", ":label: ch-one", "'ch-one' is used twice"),
        ("```{note}", "```{nota}", "directive {nota} is unknown"),
        ("```{note}", "`````{note}", "is never closed"),
        ("{solution-start} ex-one", "{solution-start} ex", "exercise 'ex' does not"),
        ("Not at all.", "Not [at](all.md).", "link to 'all.md' leads nowhere"),
        ("Not at all.", "{py:func}`gptlib.one.are`", "'gptlib.one.are' is not in"),
        ("{doc}`setup <../../book/setup>`", "{doc}`s <../set>`", "page '../set'"),
    ],
)
def test_a_wrong_reference_is_one_line_with_file_and_line(book, old, new, message):
    path, notebook = book / "book/chapters/01_one.md", book / "notebooks/01_one.ipynb"
    edit(path, old, new)
    text, before = path.read_text(), notebook.read_bytes()
    line = text.count("\n", 0, text.index(new)) + 1 - new.startswith(":label")
    said = run(book, "plain")
    found = [row for row in said.stdout.splitlines() if message in row]
    assert said.returncode == 1 and len(found) == 1, said
    assert found[0].startswith(f"book/chapters/01_one.md:{line}: ")
    said = run(book, "weave")
    assert said.returncode == 1 and len(said.stderr.splitlines()) == 1
    assert notebook.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ":tags: [export]\n\nimport math",
            ":tags: [export\n\nimport math",
            "are not YAML",
        ),
        ("import math", "import math(", "not plain Python"),
        ('print("solved")', 'print("solved"', "not plain Python"),
        ("---\njupytext", "--\njupytext", "no header"),
    ],
)
@pytest.mark.parametrize("tool", ["plain", "weave", "lab"])
def test_a_cell_that_cannot_be_read_is_one_line(book, tool, old, new, message):
    path = book / "book/chapters/01_one.md"
    edit(path, old, new)
    said = run(book, tool)
    line = path.read_text()[: path.read_text().index(new)].count("\n") + 1
    line -= "YAML" in message
    assert f"book/chapters/01_one.md:{line}: " in said.stderr, said
    assert message in said.stderr and len(said.stderr.splitlines()) == 1


def test_raw_marks_are_counted(book):
    path = book / "notebooks/01_one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source += "\n\n{ref}`x`"
    nbformat.write(notebook, path)
    assert "01_one.ipynb: 1 raw marks" in run(book, "plain").stdout


# --------------------------------------------------------------------- weave


def test_weave_executes_what_changed_and_keeps_the_rest(book):
    assert run(book, "weave", "--check").returncode == 1
    assert run(book, "weave").returncode == 0
    assert run(book, "weave", "--check").returncode == 0
    assert "12.566 12345" in str(woven(book).cells)
    before = {p: p.read_bytes() for p in (book / "notebooks").rglob("*.ipynb")}
    run(book, "weave")
    assert before == {p: p.read_bytes() for p in before}
    edit(book / "book/chapters/01_one.md", "Mind the gap", "Mind it")
    assert "text differs" in run(book, "weave", "--check").stdout
    said = run(book, "weave").stdout
    assert "01_one text only" in said and "W2_two is up to date" in said
    assert "12.566 12345" in str(woven(book).cells)
    edit(book / "book/chapters/01_one.md", "math.pi * r", "3 * r")
    run(book, "tangle")
    said = run(book, "weave", "--check").stdout
    assert said.count("changed since it was executed") == 2, "and what imports it"
    assert run(book, "weave").returncode == 0
    assert "12 12345" in str(woven(book).cells)


def test_weave_elsewhere_leaves_the_notebooks_alone(book):
    before = (book / "notebooks/01_one.ipynb").read_bytes()
    assert run(book, "weave", "--to", "_build/nb").returncode == 0
    assert (book / "notebooks/01_one.ipynb").read_bytes() == before
    made = nbformat.read(book / "_build/nb/01_one.ipynb", as_version=4)
    assert "12.566" in str(made.cells)


def test_weave_elsewhere_executes_where_readers_do(book):
    """`make book` writes below _build, and chapters read `../ledger`."""
    edit(
        book / "book/chapters/01_one.md",
        'print("solved")',
        'print(open("../new").read())',
    )
    (book / "new").write_text("from the root")
    assert run(book, "weave", "--to", "_build/nb").returncode == 0
    made = nbformat.read(book / "_build/nb/01_one.ipynb", as_version=4)
    assert "from the root" in str(made.cells)


def test_weave_two_at_a_time_executes_all_and_what_measures_time_first(book):
    edit(
        book / "book/workshop/W2_two.md",
        "from gptlib",
        "from time import perf_counter\n\nfrom gptlib",
    )
    said = run(book, "weave", "--jobs", "2", "--to", "_build/nb")
    done = [row.split()[0] for row in said.stdout.splitlines() if row.endswith(" s")]
    assert said.returncode == 0 and done[0] == "W2_two" and len(done) > 1, said
    made = nbformat.read(book / "_build/nb/01_one.ipynb", as_version=4)
    assert "12.566" in str(made.cells)
    assert "at least 1" in run(book, "weave", "--jobs", "0").stderr


def test_a_failed_cell_ends_weave_with_the_chapter_named(book):
    edit(book / "book/chapters/01_one.md", 'print("solved")', "1 / 0")
    said = run(book, "weave", "--jobs", "2", "--to", "_build/nb")
    assert said.returncode == 1
    assert said.stderr.startswith("weave: 01_one: a cell failed"), said
    assert "ZeroDivisionError" in said.stderr


def test_weave_refuses_paths_of_this_machine(book):
    edit(book / "book/chapters/01_one.md", 'print("solved")', f"print({str(book)!r})")
    assert "folder of this machine" in run(book, "weave").stderr
    # a reader's own build stays with the reader: `make book` after a finished run
    assert run(book, "weave", "--to", "_build/nb").returncode == 0


# --------------------------------------------- nothing a reader writes is lost


def test_no_tool_touches_a_notebook_with_cells_of_a_reader(book):
    path = book / "notebooks/01_one.ipynb"
    add_cell(path, "# MY OWN ANSWER\n1 + 1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = "# First, my remark"
    nbformat.write(notebook, path)
    edit(book / "book/chapters/01_one.md", "Mind the gap", "Mind it")
    before = path.read_bytes()
    for tool in WRITERS * 2:
        said = run(book, *tool)
        assert path.read_bytes() == before, tool
        if tool[0] == "weave":
            assert (
                said.returncode == 1
                and "cells written by hand" in said.stderr
                and "First" in said.stderr
            )
            assert "'# MY OWN ANSWER'" in said.stderr


def test_a_damaged_notebook_is_one_line(book):
    path = book / "notebooks/01_one.ipynb"
    path.write_text(path.read_text()[:500])
    for arguments in ((), ("--check",), ("--all",)):
        said = run(book, "weave", *arguments)
        assert said.returncode == 1 and "is damaged" in said.stderr
        assert len(said.stderr.strip().splitlines()) == 1
    assert len(path.read_text()) == 500


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*.ipynb")}


def test_lab_is_made_once_and_never_overwritten(book):
    run(book, "format"), run(book, "tangle"), run(book, "weave")
    assert run(book, "lab").returncode == 0
    made, lab = contents(book / "lab"), book / "lab"
    names = {p.relative_to(lab).as_posix() for p in made}
    assert names == {"00_start.ipynb", "README.ipynb", "setup.ipynb", "glossary.ipynb", "01_one.ipynb", "workshop/W2_two.ipynb"}  # fmt: skip
    assert "](setup.ipynb)" in made[lab / "01_one.ipynb"].decode()
    assert "](01_one.ipynb)" in made[lab / "README.ipynb"].decode()
    for link in re.findall(r"\]\(([^)#]+)\)", made[lab / "00_start.ipynb"].decode()):
        assert (lab / link).exists(), link
    add_cell(lab / "01_one.ipynb", "# my answer")
    mine = contents(lab)
    for tool in [*WRITERS, ("lab",)] * 2:
        run(book, *tool)
        assert contents(lab) == mine, f"same edition: {tool}"


def test_lab_offers_a_newer_edition_beside_what_was_touched(book):
    run(book, "lab")
    lab, mine = book / "lab", book / "lab/01_one.ipynb"
    add_cell(mine, "# my answer")
    written = mine.read_bytes()
    edit(book / "book/chapters/01_one.md", "Mind the gap", "Mind it")
    edit(book / "book/workshop/W2_two.md", "Say {", "Tell {")
    run(book, "weave", "--text")
    said = run(book, "lab").stdout
    assert mine.read_bytes() == written
    assert "Mind it" in (lab / "01_one.new.ipynb").read_text()
    assert "01_one.new.ipynb" in said
    assert "Tell [one]" in (lab / "workshop/W2_two.ipynb").read_text(), "was untouched"
    (lab / "01_one.new.ipynb").unlink()
    run(book, "lab")
    assert not (lab / "01_one.new.ipynb").exists(), "offered once"
    edit(book / "book/chapters/01_one.md", "Mind it", "Mind me")
    run(book, "weave", "--text"), run(book, "lab")
    add_cell(lab / "01_one.new.ipynb", "# here too")
    both = mine.read_bytes(), (lab / "01_one.new.ipynb").read_bytes()
    edit(book / "book/chapters/01_one.md", "Mind me", "Mind us")
    run(book, "weave", "--text"), run(book, "lab")
    assert (mine.read_bytes(), (lab / "01_one.new.ipynb").read_bytes()) == both
    assert "Mind us" in (lab / "01_one.new2.ipynb").read_text()


def test_lab_leaves_damage_as_it_is(book):
    run(book, "lab")
    lab = book / "lab"
    (lab / "01_one.ipynb").write_text('{"cells": [{"source": "my answer')
    (lab / ".editions.json").write_text("[not json")
    said = run(book, "lab")
    assert said.returncode == 0, said.stderr
    lines = [
        row for row in said.stdout.splitlines() if "01_one.ipynb:1 is damaged" in row
    ]
    assert len(lines) == 1 and ".editions.json is damaged" in said.stdout
    assert "my answer" in (lab / "01_one.ipynb").read_text()


# ------------------------------------------------------------- other checks


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("import math", "import math\nX = 1", "holds all imports"),
        ("    return math", "    import math\n    return math", ""),
        ("def area", "%time\ndef area", "not plain Python"),
        ("import math", "from gptlib.workshop.two import x", "higher floor"),
    ],
)
def test_tangle_refuses(book, old, new, message):
    edit(book / "book/chapters/01_one.md", old, new)
    said = run(book, "tangle")
    assert said.returncode == bool(message) and message in said.stderr


def test_module_is_its_cells(book):
    source = (book / "gptlib/one.py").read_text()
    assert source.startswith('"""The first chapter.')
    assert source.endswith("import math\n\n\ndef area(r: float) -> float:\n    '''Area of a circle. In square units.'''\n    return math.pi * r * r\n")  # fmt: skip
    edit(book / "gptlib/one.py", "pi", "e")
    said = run(book, "tangle", "--check")
    assert said.returncode == 1 and "-    return math.e" in said.stdout


def test_numbers_must_be_computed(book):
    assert run(book, "weave").returncode == 0
    assert run(book, "check_numbers").returncode == 0, run(book, "check_numbers").stdout
    edit(book / "book/chapters/01_one.md", "area is 12.566", "area is 12.57, not 12.58")
    edit(
        book / "book/chapters/01_one.md",
        "12,345 of",
        "12,000, of which 1,236 are white. All of",
    )
    edit(book / "README.md", "12.566", "12.6, but 7.25 too")
    said = run(book, "check_numbers")
    found = {row.split(": ")[1]: row.split(": ")[0] for row in said.stdout.splitlines()}
    assert said.returncode == 1
    assert "12.58" in found and "12.57" not in found and "12.6" not in found
    assert found["7.25"] == "README.md:3"
    assert "1,236" in found and "12,000" not in found and "50.0" not in found
    assert found["12.58"] == "book/chapters/01_one.md:77"
    (book / "book/figures.txt").write_text(
        "7.25  somebody's report\n12.58  another's\n"
    )
    assert "7.25" not in run(book, "check_numbers").stdout
    (book / "book/figures.txt").write_text("7.25\n")
    assert "figures.txt:1" in run(book, "check_numbers").stderr


def test_format_finds_what_ruff_would_change(book):
    assert run(book, "format", "--check").returncode == 1, "ruff wants double quotes"
    assert run(book, "format").returncode == 0
    assert '"""Area of a circle.' in (book / "book/chapters/01_one.md").read_text()
    assert run(book, "format", "--check").returncode == 0


def test_library_index_and_contents_say_when_they_are_old(book):
    page = (book / "book/library.md").read_text()
    assert (
        "{py:function} area(r: float) -> float" in page and "Area of a circle." in page
    )
    assert "square units" not in page
    assert "notebooks/workshop/W2_two" in (book / "_toc.yml").read_text()
    edit(book / "gptlib/one.py", "def area(", "def circle_area(")
    assert "make tangle" in run(book, "library_index", "--check").stderr
    (book / "book/workshop/W2_two.md").unlink()
    assert "make tangle" in run(book, "toc", "--check").stderr


# ---------------------------------------------------------- the book as it is


def test_every_notebook_has_its_outputs():
    for path in sorted((ROOT / "notebooks").rglob("[0-9W]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [c for c in cells if c["cell_type"] == "code" and c["source"]]
        assert all(c["execution_count"] for c in code), path.name
        assert sum(bool(c["outputs"]) for c in code) >= len(code) // 4, path.name


def test_folds_have_a_title_and_what_is_open_has_40_lines_at_most():
    from manuscripts import chapters, fold_title

    untitled, tall = [], []
    for chapter in chapters():
        for cell, line in chapter.cells:
            if cell.cell_type != "code":
                continue
            folded = {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", []))
            if folded and not fold_title(cell):
                untitled.append(chapter.at(line))
            if not folded and len(cell.source.splitlines()) > 40:
                tall.append(chapter.at(line))
    assert (untitled, tall) == ([], [])


def test_the_tools_use_gptlib_as_it_is():
    """Imports inside functions, too: they are found only when somebody runs them."""
    from importlib import import_module

    for path in (*ROOT.glob("tools/*.py"), *ROOT.glob("ledger/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "")[:6] == "gptlib":
                home = import_module(node.module)
                missing = [a.name for a in node.names if not hasattr(home, a.name)]
                assert not missing, f"{path.name}: {node.module} has no {missing}"


def test_the_candidates_of_the_ablations_are_configurations(tmp_path):
    import ablations

    for candidates, seeds in ablations.GROUPS.values():
        for changes in candidates.values():
            config = ablations.config_of(changes, seeds[0], tmp_path / "tokenizer.json")
            trapezoid = "cooldown_fraction" in changes or "preset" in changes
            assert config.schedule == ("trapezoid" if trapezoid else "cosine")


def test_an_ablation_that_was_done_is_found_in_the_ledger(tmp_path, monkeypatch):
    import ablations

    monkeypatch.setattr(ablations, "own_tokenizer", lambda: tmp_path / "tokenizer.json")
    done, added = ablations.read_rows(ablations.LEDGER), []
    monkeypatch.setattr(ablations, "add", added.append)
    for group, (candidates, seeds) in ablations.GROUPS.items():
        for name in candidates:
            ablations.start(group, name, seeds[0])
            assert added[-1]["name"] == name and added[-1]["seed"] == seeds[0]
            assert any(row | {"name": name} == added[-1] for row in done)


def test_each_run_of_the_ablations_belongs_to_a_group():
    import ablations

    groups = ablations.GROUPS.values()
    known = {
        (name, seed) for names, seeds in groups for name in names for seed in seeds
    }
    assert {
        (row["name"], row["seed"]) for row in ablations.read_rows(ablations.LEDGER)
    } <= known
