"""JupyterLab in a real browser: a reader opens, runs, answers, saves and comes back.

All of it happens in a copy of the tree.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import Browser, chromium


ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not chromium() or not importlib.util.find_spec("websocket"),
        reason="no Chromium, or no websocket-client",
    ),
]
NOT_COPIED = (".git", ".venv", "_build", "runs", "lab", "__pycache__", ".*_cache")
TOOLS = "tangle weave format lab"  # those that write chapters or notebooks
ANSWER = "# MY OWN ANSWER\nprint(6 * 7)"
PANEL = "jupyterapp.shell.currentWidget"
CELLS = f"[...{PANEL}.content.widgets]"
CODE = f"{CELLS}.filter(c => c.model.type == 'code' && c.model.sharedModel.source)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    copy = tmp_path_factory.mktemp("reader") / "book"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    tool(copy, "lab")
    settings = copy.parent / "CONFIG/labconfig/default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tools/jupyterlab.json", settings)  # as the Makefile does
    return copy


def environment(tree):
    own = {f"JUPYTER_{k}_DIR": str(tree.parent / k) for k in ("CONFIG", "DATA")}
    own |= {f"JUPYTERLAB_{k}_DIR": str(tree.parent / k) for k in ("SETTINGS",)}
    own["JUPYTERLAB_WORKSPACES_DIR"] = str(tree.parent / "WORKSPACES")
    own["JUPYTER_RUNTIME_DIR"] = str(tree.parent / "RUNTIME")
    own |= {"PYTHONPATH": str(tree), "GPTLIB_RUNS": str(tree / "runs")}
    return os.environ | own


def tool(tree, name):
    command = [sys.executable, tree / "tools" / f"{name}.py"]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), capture_output=True, text=True
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture(scope="module")
def address(tree):
    """The server that `make lab` starts, at the root of the repository."""
    recipe = re.search(
        r"^\t\$\(BIN\)/jupyter lab (.*)$", (tree / "Makefile").read_text(), re.M
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --port={port} --IdentityProvider.token="
    options += " --LabApp.expose_app_in_browser=True"
    command = [sys.executable, "-m", "jupyterlab", *shlex.split(recipe[1])]
    with (tree.parent / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *options.split()],
            cwd=tree, env=environment(tree), stdout=log, stderr=log,
        )  # fmt: skip
    place, end = f"http://127.0.0.1:{port}/", time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(place + "api/status").close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < end, (
                tree.parent / "log"
            ).read_text()
            time.sleep(0.2)
    yield place
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def lab(address):
    """The browser at the page that the server itself leads to."""
    tab = Browser()
    tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
    tab.open(address)
    yield tab
    tab.close()


def wait(tab, expression, seconds=40):
    end = time.monotonic() + seconds
    while True:
        try:
            if value := tab.js(expression):
                return value
        except RuntimeError as error:
            value = error
        assert time.monotonic() < end, f"{expression}: {value}"
        time.sleep(0.1)


def open_notebook(tab, path):
    tab.js(
        f"jupyterapp.commands.execute('docmanager:open', {{path: '{path}'}}).then(() => 1)"
    )
    wait(tab, f"{PANEL}.context.path == '{path}' && {PANEL}.context.isReady")
    wait(tab, f"{PANEL}.context.sessionContext.isReady")


def test_start_page_opens(lab):
    wait(
        lab, f"{PANEL}.context.path == 'lab/00_start.ipynb' && {PANEL}.context.isReady"
    )
    titles = "[...document.querySelectorAll('.jp-Notebook h1')].map(h => h.innerText)"
    assert "How GPT works" in wait(lab, titles)[0]
    time.sleep(2)  # time to ask
    asked = "[...document.querySelectorAll('.jp-toast-message')].map(m => m.innerText)"
    assert lab.js(asked) == []


def test_repository_root_lists_files_and_opens_a_notebook(lab, address):
    with urllib.request.urlopen(address + "api/contents") as answer:
        names = {item["name"] for item in json.load(answer)["content"]}
    assert {"notebooks", "lab", "README.md"} <= names
    open_notebook(lab, "notebooks/05_multi_head.ipynb")
    stored = nbformat.read(ROOT / "notebooks/05_multi_head.ipynb", as_version=4)
    assert lab.js(f"{CELLS}.length") == len(stored.cells)
    assert lab.js("document.querySelectorAll('.jp-Dialog').length") == 0


def test_chapter_runs_and_an_answer_stays(lab, tree):
    path, name = tree / "lab/04_attention.ipynb", "lab/04_attention.ipynb"
    open_notebook(lab, name)
    lab.js(
        "jupyterapp.commands.execute('notebook:clear-all-cell-outputs').then(() => 1)"
    )
    assert lab.js(f"{CODE}.length > 10 && !{CODE}.some(c => c.model.executionCount)")
    lab.js("jupyterapp.commands.execute('notebook:restart-run-all'); 1")
    wait(
        lab,
        "(b => b && (b.click(), 1))(document.querySelector('.jp-Dialog .jp-mod-accept'))",
    )
    kernel = f"{PANEL}.context.sessionContext.session.kernel.status"
    wait(
        lab,
        f"{CODE}.every(c => c.model.executionCount) && {kernel} == 'idle'",
        seconds=240,
    )
    counts = lab.js(f"{CODE}.map(c => c.model.executionCount)")
    assert counts == list(range(1, len(counts) + 1)), "in a fresh kernel, to the end"
    lab.js(f"{PANEL}.content.activeCellIndex = {CELLS}.length - 1")
    lab.js("jupyterapp.commands.execute('notebook:insert-cell-below').then(() => 1)")
    lab.js(
        f"{PANEL}.content.activeCell.model.sharedModel.setSource({json.dumps(ANSWER)})"
    )
    lab.js("jupyterapp.commands.execute('notebook:run-cell').then(() => 1)")
    wait(lab, f"{PANEL}.content.activeCell.model.outputs.length")
    lab.js("jupyterapp.commands.execute('docmanager:save').then(() => 1)")
    saved = nbformat.read(path, as_version=4)
    assert (
        saved.cells[-1].source == ANSWER and saved.cells[-1].outputs[0].text == "42\n"
    )
    code = [c for c in saved.cells if c.cell_type == "code"]
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    before = path.read_bytes()
    for again in range(2):
        for each in TOOLS.split():
            tool(tree, each)
            assert path.read_bytes() == before, (again, each)
