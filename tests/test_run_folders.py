# ruff: noqa: F811 (fixtures are arguments)
"""The folder of a run: whose it is, what is refused, what is read out of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import (
    assert_same,
    assert_same_run,
    config,  # noqa: F401
    damage,
    finish,
    last_state,
    options,
    rows,
    start,
    without_dropout,
)

from gptlib import GptlibError
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.workshop import runs
from gptlib.workshop.checkpoints import CheckpointError, Checkpoints
from gptlib.workshop.files import write_whole
from gptlib.workshop.run_folders import RunError, load_run
from gptlib.workshop.runs import run_training


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.1}, r"learning_rate = 0\.003, not 0\.1"),
        ({"warmup_fraction": 0.5}, "warmup_steps = 4, not 20"),
        ({"schedule": "trapezoid"}, "cooldown_steps = None, not 20"),
        ({"batch_size": 4}, "batch_size = 8, not 4"),
        ({"seed": 1}, "seed = 1337, not 1"),
    ],
)
def test_another_run_is_refused_before_the_corpus_is_read(
    config,
    tmp_path,
    monkeypatch,
    changes,
    words,
):
    run_training(config, options(tmp_path / "run", max_steps=1))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(
        runs, "load_corpus", lambda name: pytest.fail("read the corpus")
    )
    with pytest.raises(
        RunError, match=f"holds a run with {words}; choose another --out"
    ):
        run_training(dataclasses.replace(config, **changes), options(tmp_path / "run"))
    with pytest.raises(RunError, match=r"model\.dropout = 0\.1, not 0\.0"):
        run_training(without_dropout(config), options(tmp_path / "run"))
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert before == after


def test_a_fraction_that_no_schedule_reads_may_change(config, tmp_path):
    run_training(config, options(tmp_path / "run", max_steps=1))
    changed = dataclasses.replace(config, cooldown_fraction=0.9)
    assert run_training(changed, options(tmp_path / "run", max_steps=1)).step == 2


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    """A lock was once written into it before it was refused."""
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(RunError, match="is not empty and holds no run; choose"):
            run_training(config, options(out))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_text_that_has_changed_is_named(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(config.corpus).read_text())
    config = dataclasses.replace(config, corpus=str(text))
    run_training(config, options(tmp_path / "run", max_steps=2))
    text.write_text(text.read_text() + "one more line\n" * 20)
    with pytest.raises(
        RunError, match=r"another text under the name .*split .*differs"
    ):
        run_training(config, options(tmp_path / "run"))


def test_code_that_has_changed_is_named(config, tmp_path, capfd, monkeypatch):
    run_training(config, options(tmp_path / "run", max_steps=2))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["code"]["files"]) == 16 and "commit" in record["code"]
    assert record["machine"]["device_name"] and record["machine"]["precision"] == "fp32"
    other = record["code"] | {"files": "another"}
    monkeypatch.setattr(runs.devices, "describe_code", lambda: other)
    assert "gptlib's code" not in capfd.readouterr().err
    run_training(config, options(tmp_path / "run", max_steps=2))
    said = f"gptlib's code {record['code']['files']} -> another"
    assert said in capfd.readouterr().err


def test_a_run_keeps_its_own_tokenizer(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer.load(config.tokenizer).save(path)
    config = dataclasses.replace(config, tokenizer=str(path))
    run_training(config, options(tmp_path / "run", max_steps=2))
    path.unlink()
    assert run_training(config, options(tmp_path / "run", max_steps=2)).step == 4
    Tokenizer.from_merges(train_bpe(["other words"], 260), "x").save(
        tmp_path / "run" / "tokenizer.json"
    )
    for act in (load_run, lambda out: run_training(config, options(out))):
        with pytest.raises(RunError, match=r"tokenizer\.json is not the tokenizer"):
            act(tmp_path / "run")


def test_the_best_or_the_last_is_loaded_without_the_optimiser(config, tmp_path):
    out = tmp_path / "run"
    run_training(config, options(out, save_minutes=0, keep=3))
    values = [(r["validation_loss"], r["step"]) for r in rows(out, "validation_loss")]
    best, saved = min(values)[1], Checkpoints(out / "checkpoints")
    assert saved.best() == best and set(saved.steps()) == {38, 39, 40, best}
    for path in (out / "checkpoints").glob("step-*[0-9].pt"):
        path.unlink()
    assert load_run(out).step == best and load_run(out, "last").step == 40
    weights = load_run(out, "last").model.state_dict()
    assert_same(dict(weights), dict(saved.load(40, model_only=True)["model"]))
    damage(saved.path(40, "model.pt"), "flipped")
    assert load_run(out, "last").step == 39


def test_what_is_no_run_is_named(config, tmp_path):
    with pytest.raises(RunError, match=r"no run\.json there; give the --out folder"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="which is 'first'; it must be best or last"):
        load_run(tmp_path, "first")
    run_training(config, options(tmp_path / "run", max_steps=1))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_run(tmp_path / "run")
    run_training(config, options(tmp_path / "one", max_steps=1))
    for path in (tmp_path / "one" / "checkpoints").glob("*.model.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        load_run(tmp_path / "one")
    for text in ("{", "[]", '{"config": {}}', '{"config": {"model": {"depth": 1}}}'):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run\.json: damaged or unreadable"):
            load_run(tmp_path / "run")


def test_a_run_speaks(config, tmp_path):
    run = run_training(config, options(tmp_path / "run"))
    text = run.sample("sun", 20, seed=1)
    assert text.startswith("sun") and len(text) > 3
    assert (
        text == "".join(run.stream("sun", 20, seed=1)) == run.sample("sun", 20, seed=1)
    )
    several = run.sample(["sun", "moon star"], 5, temperature=0)
    assert several == [run.sample(p, 5, temperature=0) for p in ("sun", "moon star")]


def test_a_run_of_an_older_version_goes_on(config, tmp_path):
    """One file a checkpoint, another configuration in `run.json`, no code in it."""
    config = dataclasses.replace(
        config, optimizer="muon", schedule="trapezoid", zero_projections=True
    )
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "old"
    run_training(config, options(out, max_steps=13))
    state, folder = last_state(out), out / "checkpoints"
    for path in folder.iterdir():
        path.unlink()
    old = folder / "step-00000013.pt"
    digest = write_whole(old, lambda file: torch.save(state, file))
    (folder / "step-00000013.sha256").write_text(f"{digest}  step-00000013.pt\n")
    record = json.loads((out / "run.json").read_text())
    for key in ("schedule", "init"):
        del record["config"][key]
    del record["code"], record["held_out"]
    (out / "run.json").write_text(json.dumps(record))
    assert load_run(out).step == 13
    run_training(config, options(out))
    assert_same_run(tmp_path / "straight", out)


def test_weights_that_do_not_fit_are_named(config, tmp_path):
    run_training(config, options(tmp_path / "first", max_steps=1))
    begin = dataclasses.replace(config, init=str(tmp_path / "first"))
    wide = dataclasses.replace(
        begin, model=dataclasses.replace(config.model, n_embd=64)
    )
    words = "its model has n_embd = 32, this one 64; set --model.n-embd 32"
    with pytest.raises(RunError, match=words):
        run_training(wide, options(tmp_path / "second"))
    path = tmp_path / "other.json"
    Tokenizer.from_merges(train_bpe(["sun moon star"], 262), "other").save(path)
    other = dataclasses.replace(begin, tokenizer=str(path))
    with pytest.raises(RunError, match="its tokenizer is another one; use --tokenizer"):
        run_training(other, options(tmp_path / "second"))
    missing = dataclasses.replace(begin, init=str(tmp_path / "nothing"))
    with pytest.raises(RunError, match=r"nothing: no run\.json there"):
        run_training(missing, options(tmp_path / "second"))
    for path in (tmp_path / "first" / "checkpoints").glob("*.pt"):
        damage(path, "flipped")
    with pytest.raises(GptlibError, match="none of 1 checkpoints is whole"):
        run_training(begin, options(tmp_path / "second"))
    assert not (tmp_path / "second" / "run.json").exists()


def test_a_new_process_reads_what_another_wrote(config, tmp_path):
    finish(start(without_dropout(config, steps=3), tmp_path / "run"))
    code = "from gptlib.workshop.run_folders import load_run\n"
    code += f"print(load_run({str(tmp_path / 'run')!r}).step)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr
