"""Tangle and weave: what they refuse, and that what they make is up to date."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import manuscripts  # noqa: E402
import tangle  # noqa: E402
import weave  # noqa: E402

HEADER = """---
jupytext:
  formats: ipynb,md:myst
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""


def chapter(folder, name, *cells):
    """A manuscript whose export cells are `cells`."""
    body = "".join(
        "```{code-cell} ipython3\n:tags: [export]\n\n" + cell + "\n```\n\n"
        for cell in cells
    )
    path = folder / f"{name}.md"
    path.write_text(
        f"{HEADER}# Title of {name}\n\n## A heading\n\n{body}", encoding="utf-8"
    )
    return manuscripts.Chapter(path)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["%matplotlib inline"], "not plain Python"),
        (["x = = 1"], "not plain Python"),
        (["def f(): ...", "def f(): ..."], "'f' twice"),
        (["LIMIT = 1", "LIMIT = 2"], "'LIMIT' twice"),
        (["from gptlib.later import x"], "later chapter"),
        (["import gptlib.nowhere"], "no chapter makes"),
        ([], "no cell is tagged"),
    ],
)
def test_tangle_refuses(tmp_path, cells, message):
    made = chapter(tmp_path, "05_middle", *cells)
    with pytest.raises(manuscripts.ManuscriptError, match=message):
        tangle.tangle(made, earlier={"early"}, modules={"early", "middle", "later"})


def test_tangled_module_reads_as_if_written_by_hand(tmp_path):
    made = chapter(
        tmp_path,
        "05_middle",
        "from gptlib.early import g\nimport math\n\nA = 1",
        "# why it is there\ndef f(x):\n    return math.sqrt(g(x) + A)",
        "import math\n\n\ndef main():\n    print(f(1))\n\n\ndef _hidden(): ...",
    )
    raw = tangle.tangle(made, {"early"}, {"early", "middle"})
    source = tangle.ruff({"middle": raw})["middle"]
    assert source.startswith('"""Title of 05_middle.')
    assert source.count("import math") == 1
    assert (
        source.index("import math")
        < source.index("from gptlib.early import g")
        < source.index("A = 1")
    )
    assert "# A heading" in source and "# why it is there\ndef f(x):" in source
    assert '__all__ = ["A", "f", "main"]' in source
    assert source.endswith('if __name__ == "__main__":\n    main()\n')
    compile(source, "middle.py", "exec")


def test_tangle_is_deterministic(tmp_path):
    made = chapter(tmp_path, "05_middle", "def f(): ...")
    assert tangle.tangle(made, set(), {"middle"}) == tangle.tangle(
        made, set(), {"middle"}
    )


def test_weave_sees_what_changed(tmp_path):
    made = chapter(tmp_path, "05_middle", "A = 1\nprint(A)")
    notebook, path = weave.inputs(made), tmp_path / "05_middle.ipynb"
    assert weave.problem(made, path) == "no notebook yet"
    weave.write(notebook, path)
    assert "never executed" in weave.problem(made, path)
    weave.execute(notebook, tmp_path)
    weave.write(notebook, path)
    assert weave.problem(made, path) == ""
    assert notebook.cells[-1].outputs[0]["text"] == "1\n"
    edited = chapter(tmp_path, "05_middle", "A = 2\nprint(A)")
    assert "differ" in weave.problem(edited, path)


def test_weave_refuses_paths_of_this_machine(tmp_path):
    made = chapter(tmp_path, "05_middle", f"print({str(ROOT)!r})")
    with pytest.raises(manuscripts.ManuscriptError, match="folder of this machine"):
        weave.execute(weave.inputs(made), tmp_path)


def test_cell_ids_depend_on_text_alone(tmp_path):
    one = weave.inputs(chapter(tmp_path, "05_middle", "A = 1", "B = 1"))
    two = weave.inputs(chapter(tmp_path, "05_middle", "B = 1"))
    assert one.cells[-1].id == two.cells[-1].id


@pytest.mark.parametrize("tool", ["tangle", "weave", "library_index"])
def test_check_finds_everything_up_to_date(tool):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_no_module_without_a_chapter():
    made = {c.module for c in manuscripts.chapters()}
    assert {p.stem for p in (ROOT / "gptlib").glob("*.py")} == made | {"__init__"}


def test_every_notebook_has_its_outputs():
    import nbformat

    for each in manuscripts.chapters():
        cells = [
            c
            for c in nbformat.read(each.notebook_path, as_version=4).cells
            if c.cell_type == "code" and c.source
        ]
        assert all(c.execution_count for c in cells), each.stem
        assert sum(bool(c.outputs) for c in cells) >= len(cells) // 4, (
            f"{each.stem}: outputs were stripped"
        )
