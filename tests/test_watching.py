"""What a run writes for others to see, signals, and the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from gptlib import GptlibError
from gptlib.training import TrainConfig
from gptlib.workshop import watching
from gptlib.workshop.watching import (
    Journal,
    RowWriter,
    StopRequest,
    WatchError,
    cut_rows,
    errors_in_one_line,
    make_logger,
    plot_run,
    read_rows,
    say,
    status_line,
    watch,
)


posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture
def run(tmp_path):
    """A folder with the files of a run at step 20 of 100."""
    plan = {"config": {"steps": 100}}
    (tmp_path / "run.json").write_text(json.dumps(plan))
    metrics, timings = (
        RowWriter(tmp_path / f"{n}.jsonl") for n in ("metrics", "timings")
    )
    metrics.write({"step": 0, "validation_loss": 7.5})
    for step in (10, 20):
        metrics.write({"step": step, "loss": 5.0 - step / 10})
        timings.write(
            {"step": step, "seconds_per_step": 90.0, "tokens_per_second": 1234}
        )
    timings.write({"step": 20, "save_seconds": 1.0})
    metrics.close(), timings.close()
    return tmp_path


def test_the_status_says_how_far_a_run_is(run):
    expected = (
        "step 20 of 100, loss 3.000, validation 7.500, 1,234 tokens/s, 2.0 h left"
    )
    assert status_line(run) == expected
    (run / "metrics.jsonl").unlink(), (run / "timings.jsonl").unlink()
    assert status_line(run) == "step 0 of 100"


def test_watching_prints_a_line_a_look(run, capsys):
    watch(run, every=0, rounds=2)
    assert capsys.readouterr().out.splitlines() == [status_line(run)] * 2
    with pytest.raises(GptlibError, match=r"no run\.json there; give the --out folder"):
        watch(run / "nothing")


def test_in_a_notebook_the_line_is_not_erased(run, monkeypatch, capsys):
    """The cell was cleared after the line had been printed, and it went too."""
    plt = pytest.importorskip("matplotlib.pyplot")
    display = pytest.importorskip("IPython.display")
    events, line = [], status_line(run)
    monkeypatch.setattr(watching, "in_notebook", lambda: True)
    monkeypatch.setattr(
        watching, "status_line", lambda run: events.append("line") or line
    )
    monkeypatch.setattr(display, "clear_output", lambda wait: events.append("clear"))
    monkeypatch.setattr(plt, "show", lambda: events.append("show"))
    watch(run, every=0, rounds=2)
    assert events == ["clear", "line", "show"] * 2
    plt.close("all")


def test_the_command_watches(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["watch", "--run", str(run), "--rounds", "1"])
    watching.main()
    assert capsys.readouterr().out.strip() == status_line(run)
    monkeypatch.setattr(
        sys, "argv", ["watch", "--run", str(run / "no"), "--rounds", "1"]
    )
    with pytest.raises(SystemExit, match="gptlib: .*no run.json there"):
        watching.main()


@pytest.mark.parametrize("bad", [{"every": -1}, {"every": float("nan")}, {"rounds": 0}])
def test_how_often_to_look_has_a_range(run, bad):
    (name, value) = next(iter(bad.items()))
    with pytest.raises(WatchError, match=f"{name} is {value}"):
        watch(run, **{"every": 0, "rounds": 1} | bad)


def test_the_curves_are_drawn_from_the_files(run):
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = plot_run(run, floor=0.5)
    training, validation, floor = (line.get_xydata().tolist() for line in ax.lines)
    assert training == [[10, 4], [20, 3]] and validation == [[0, 7.5]]
    assert [y for _, y in floor] == [0.5, 0.5]
    plt.close("all")


def test_rows_end_where_a_kill_or_a_power_cut_spoiled_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + b"\0" * 9 + b"\n{}\n" + b'{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    cut_rows(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert read_rows(tmp_path / "none") == []


@posix
def test_a_full_disk_is_named_with_the_cure(tmp_path):
    code = """
import resource, sys
from gptlib.workshop.watching import RowWriter, errors_in_one_line
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
writer = RowWriter("rows.jsonl")
with errors_in_one_line():
    for step in range(9):
        writer.write({"step": step})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "rows.jsonl cannot be written (File too large)" in done.stderr
    assert "make room" in done.stderr


def test_a_bug_keeps_its_traceback():
    for error in (ValueError("a bug"), KeyError("x"), OSError("y"), ImportError("z")):
        with pytest.raises(type(error)), errors_in_one_line():
            raise error
    with pytest.raises(SystemExit, match="gptlib: mend it"), errors_in_one_line():
        raise GptlibError("mend it")


def test_nobody_left_to_read_is_no_error(monkeypatch):
    class Broken:
        def write(self, text=""):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Broken())
    say("into the void")


@posix
def test_the_first_signal_is_noted_and_the_second_acts(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is before, "a second one acts as usual"
    assert "stopping after this step" in capfd.readouterr().err
    heard = []
    thread = threading.Thread(target=lambda: heard.append(StopRequest().__enter__()))
    thread.start(), thread.join()
    assert heard[0].before == {}, "other threads hear no signals"


def test_a_journal_keeps_exact_and_measured_apart(tmp_path):
    config = TrainConfig()
    journal = Journal(tmp_path, config, 0, progress=False, ideal_seconds=1.0)
    journal.step({"step": 1, "loss": 3.0}, seconds=4.0, peak_bytes=5)
    journal.evaluation(1, 2.5)
    journal.saved(1, 0.5)
    journal.sync(), journal.close()
    exact = [{"step": 1, "loss": 3.0}, {"step": 1, "validation_loss": 2.5}]
    assert read_rows(tmp_path / "metrics.jsonl") == exact
    measured = {"step": 1, "seconds_per_step": 4.0, "tokens_per_second": 30720.0}
    measured |= {"peak_bytes": 5, "mfu": 0.25}
    saved = {"step": 1, "save_seconds": 0.5}
    assert read_rows(tmp_path / "timings.jsonl") == [measured, saved]


def test_an_unknown_or_missing_logger_is_named(tmp_path, monkeypatch):
    with pytest.raises(GptlibError, match="unknown logger 'x'; there are none, tensor"):
        make_logger("x", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(GptlibError, match="install it with: pip install wandb"):
        make_logger("wandb", tmp_path, {})
