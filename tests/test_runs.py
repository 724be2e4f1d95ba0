# ruff: noqa: F811 (fixtures are arguments)
"""Runs against kills, signals, full disks and changed folders; beginnings, branches."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import statistics
from pathlib import Path

import pytest
import torch
from engine import (
    assert_same,
    assert_same_run,
    child,
    config,  # noqa: F401
    damage,
    finish,
    finished,
    last_state,
    leg,
    losses,
    options,
    posix,
    rows,
    said_by_children,
    start,
    wait_until,
    without_dropout,
)

from gptlib import GptlibError, speed, training
from gptlib.batches import Batches
from gptlib.tokenizer import Tokenizer
from gptlib.training import TrainConfig, TrainingError, fit_micro_batch, plain_loss
from gptlib.workshop import runs
from gptlib.workshop.checkpoints import CheckpointError
from gptlib.workshop.distribution import Processes
from gptlib.workshop.files import lock
from gptlib.workshop.run_folders import RunError, load_run
from gptlib.workshop.runs import branch_run, run_training
from gptlib.workshop.token_files import load_tokens


pytestmark = pytest.mark.filterwarnings("ignore")
FAST = {"optimizer": "muon", "schedule": "trapezoid", "zero_projections": True}


# Resuming is exact


@posix
def test_twenty_kills_leave_no_trace(config, tmp_path):
    """Each at a moment of its own: before a forward pass, a row, an fsync, a rename."""
    config = dataclasses.replace(config, steps=60)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert finished(child(leg, config, options(straight, save_minutes=0))) == 0
    moments = random.Random(1)
    for _ in range(20):
        at = moments.randint(1, 45)
        process = child(leg, config, options(killed, save_minutes=0), kill_at=at)
        assert finished(process) == -signal.SIGKILL
    assert finished(child(leg, config, options(killed, save_minutes=0))) == 0
    assert_same_run(straight, killed)
    assert not list(killed.rglob("*.tmp-*")), "a kill left files that nobody removed"


@pytest.mark.parametrize("changes", [{}, FAST], ids=["plain", "fast"])
def test_resuming_with_dropout_is_exact(config, tmp_path, changes):
    config = dataclasses.replace(config, **changes)
    run_training(config, options(tmp_path / "straight"))
    for _ in range(3):
        run_training(config, options(tmp_path / "legs", max_steps=9))
    run_training(config, options(tmp_path / "legs"))
    assert_same_run(tmp_path / "straight", tmp_path / "legs")


def test_resuming_with_a_scaler_is_exact(config, tmp_path, monkeypatch):
    """fp16 on the CPU, which the library refuses, to see the scaler's state saved."""

    class Half(training.Precision):
        def scaler(self):
            scale, growth = 2.0**24, 7
            return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)

    monkeypatch.setattr(runs.devices, "pick_precision", lambda *_: Half("fp16"))
    run_training(config, options(tmp_path / "straight"))
    for _ in range(3):
        run_training(config, options(tmp_path / "legs", max_steps=9))
    run_training(config, options(tmp_path / "legs"))
    assert_same_run(tmp_path / "straight", tmp_path / "legs")
    scales = {row["scale"] for row in rows(tmp_path / "legs")}
    assert len(scales) > 2, "the scale should have moved"
    skipped = [row for row in rows(tmp_path / "legs") if row["grad_norm"] is None]
    assert last_state(tmp_path / "legs")["skipped"] == len(skipped) > 0


def test_a_kill_in_the_first_moment_leaves_a_folder_to_begin_in(config, tmp_path):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "killed"
    out.mkdir()
    (out / "lock").touch()
    (out / "run.json.tmp-123").write_text("{")
    Tokenizer.load(config.tokenizer).save(out / "tokenizer.json")
    run_training(config, options(out))
    assert_same_run(tmp_path / "straight", out)
    assert not list(out.glob("*.tmp-*"))


def test_rows_spoiled_by_a_power_cut_are_written_again(config, tmp_path):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "cut"
    run_training(config, options(out, max_steps=13))
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 14, "loss": 3.0}\n' + b"\0" * 100 + b"\n\xff\xfe")
    run_training(config, options(out))
    assert_same_run(tmp_path / "straight", out)


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    config,
    tmp_path,
    how,
    capfd,
):
    run_training(config, options(tmp_path / "straight"))
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=13))
    run_training(config, options(out, max_steps=2))
    damage(out / "checkpoints" / "step-00000015.model.pt", how)
    run_training(config, options(out))
    said = capfd.readouterr().err
    assert "step-00000015.model.pt: damaged" in said and "from step 13" in said
    assert_same_run(tmp_path / "straight", out)
    assert (out / "checkpoints" / "unreadable" / "step-00000015.model.pt").exists()
    (out / "checkpoints" / "best").unlink()
    for path in (out / "checkpoints").glob("*.pt"):
        damage(path, how)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        run_training(config, options(out))
    with pytest.raises(GptlibError, match="none of 2 checkpoints is whole"):
        load_run(out)


# What may not change the numbers


def test_evaluating_saving_and_logging_change_no_step(config, tmp_path):
    run_training(config, options(tmp_path / "seldom"))
    often = dataclasses.replace(config, eval_interval=3, eval_sequences=5)
    changes = {"save_minutes": 0, "keep": 1, "progress": True}
    run_training(often, options(tmp_path / "often", **changes))
    assert losses(tmp_path / "seldom") == losses(tmp_path / "often")
    models = [last_state(tmp_path / name)["model"] for name in ("seldom", "often")]
    assert_same(*models)


def test_a_run_goes_on_with_another_interval_of_evaluation(config, tmp_path, capfd):
    run_training(config, options(tmp_path / "straight"))
    run_training(config, options(tmp_path / "run", max_steps=15))
    changed = dataclasses.replace(config, eval_interval=5, eval_sequences=6)
    run_training(changed, options(tmp_path / "run", log="none", keep=3))
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")
    evaluated = [row["step"] for row in rows(tmp_path / "run", "validation_loss")]
    assert evaluated == [0, 10, 20, 25, 30, 35, 40]
    assert load_run(tmp_path / "run").config == changed
    assert "changed machine" not in capfd.readouterr().err
    values = {
        row["step"]: row["validation_loss"]
        for row in rows(tmp_path / "run", "validation_loss")
    }
    best = min(value for step, value in values.items() if step > 15)
    assert last_state(tmp_path / "run")["best"] == best, "measured on other crops"


def test_micro_batches_change_only_the_rounding(config, tmp_path, capfd):
    config = without_dropout(config, steps=15)
    for size in (8, 4, 1):
        run_training(config, options(tmp_path / str(size), micro_batch_size=size))
    for size in ("4", "1"):
        expected = losses(tmp_path / "8")
        assert losses(tmp_path / size) == pytest.approx(expected, abs=1e-5)
    run_training(config, options(tmp_path / "5", micro_batch_size=5, max_steps=2))
    assert losses(tmp_path / "5") == losses(tmp_path / "4")[:2], "5 should become 4"
    run_training(config, options(tmp_path / "5", micro_batch_size=2, max_steps=1))
    assert "micro_batch_size 4 -> 2" in capfd.readouterr().err
    assert fit_micro_batch(8, 5) == 4 and fit_micro_batch(480, 12, 3) == 10
    with pytest.raises(TrainingError, match="batch_size 8 is not a multiple"):
        fit_micro_batch(8, 4, 3)


def test_the_logged_loss_is_that_of_the_whole_batch(config, tmp_path):
    plain = without_dropout(config, steps=1)
    run = run_training(plain, options(tmp_path / "run", micro_batch_size=1))
    ids = load_tokens(plain.corpus, run.tokenizer).split("train").ids
    model = training.fresh_model(plain)
    x, y = next(Batches(ids, 8, 16, plain.seed).micro_batches(0, 8))
    expected = [model(x, y)[1].item()]
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)


def test_the_validation_loss_is_that_of_the_validation_split(config, tmp_path):
    plain = without_dropout(config, steps=1)
    run = run_training(plain, options(tmp_path / "run"))
    ids = load_tokens(plain.corpus, run.tokenizer).split("validation").ids
    ours = Batches(ids, plain.eval_sequences, 16, plain.seed)
    x, y = next(ours.micro_batches(training.EVAL_STEP, plain.eval_sequences))
    expected = [m(x, y)[1].item() for m in (training.fresh_model(plain), run.model)]
    found = [r["validation_loss"] for r in rows(tmp_path / "run", "validation_loss")]
    assert found == pytest.approx(expected, abs=1e-5)


# Stopping


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_leg_with_everything_saved(config, tmp_path, number):
    out = tmp_path / "run"
    asked = {"signal_at": (number, 30)}
    assert finished(child(leg, config, options(out), **asked)) == 0
    state = last_state(out)
    assert 3 < state["step"] == rows(out)[-1]["step"] < config.steps
    assert f"stopped at step {state['step']} of 40" in said_by_children(out)
    for name in ("run", "straight"):
        assert finished(child(leg, config, options(tmp_path / name))) == 0
    assert_same_run(tmp_path / "straight", out)


def signalled_twice(config, run_options):
    """A run that gets a signal in each of the first two forward passes of step 1."""
    torch.set_num_threads(1)
    seen = run_options.out.with_suffix(".seen")

    def loss_fn(model, x, y):
        if model.training:
            with seen.open("a") as file:
                file.write("signal\n")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_loss(model, x, y)

    run_training(config, run_options, loss_fn=loss_fn)


@posix
def test_a_second_signal_leaves_at_once(config, tmp_path):
    out = tmp_path / "run"
    process = child(signalled_twice, config, options(out, micro_batch_size=1))
    assert finished(process) == -signal.SIGTERM
    assert (tmp_path / "run.seen").read_text().count("signal") == 2
    assert not rows(out), "no step was finished"


@posix
def test_nobody_left_to_read_is_no_reason_to_lose_steps(config, tmp_path):
    """Ctrl-C in `... 2>&1 | tee log` ends tee as well."""
    config = dataclasses.replace(config, steps=10**6, eval_interval=10**6)
    out = tmp_path / "run"
    process = start(config, out, save_minutes=60, progress=True)
    wait_until(lambda: len(rows(out)) >= 3, process)
    process.stderr.close()  # from here on every write to it raises BrokenPipeError
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 0
    assert last_state(out)["step"] == rows(out)[-1]["step"] >= 3


def test_limits_end_a_leg(config, tmp_path):
    assert run_training(config, options(tmp_path / "steps", max_steps=5)).step == 5
    assert run_training(config, options(tmp_path / "steps", max_steps=5)).step == 10
    assert run_training(config, options(tmp_path / "minutes", max_minutes=0)).step == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"max_minutes": math.nan}, "max_minutes is nan"),
        ({"save_minutes": -1}, "save_minutes is -1"),
        ({"log": "paper"}, "unknown log 'paper'; there are none"),
        ({"precision": "int8"}, "unknown precision 'int8'; there are auto"),
    ],
)
def test_options_have_ranges(tmp_path, changes, words):
    with pytest.raises(GptlibError, match=words):
        options(tmp_path, **changes)


def test_running_out_of_memory_names_the_cure(config, tmp_path):
    def loss_fn(model, x, y):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(GptlibError, match="halve --micro-batch-size"):
        run_training(config, options(tmp_path / "run"), loss_fn=loss_fn)

    def bug(model, x, y):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes") as caught:
        run_training(config, options(tmp_path / "run"), loss_fn=bug)
    assert not isinstance(caught.value, GptlibError), "a bug keeps its traceback"


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    calls = iter(range(10_000))

    def poisoned(model, x, y):  # two micro-batches a step: the 12th is in step 6
        bad = model.training and next(calls) == 11
        return plain_loss(model, x, y) * (math.inf if bad else 1)

    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="step 6: loss inf"):
        run_training(config, options(out, save_minutes=0), loss_fn=poisoned)
    assert last_state(out)["step"] == 5
    run_training(config, options(out))
    run_training(config, options(tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", out)

    def blind(model, x, y):
        return plain_loss(model, x, y) * (1 if model.training else math.nan)

    with pytest.raises(RunError, match="step 0: validation loss nan"):
        run_training(config, options(tmp_path / "blind"), loss_fn=blind)


@posix
def test_a_full_disk_ends_the_run_with_the_older_checkpoint_whole(config, tmp_path):
    """The kernel refuses to write past 20 kB of a file, as a full disk would."""
    out = tmp_path / "run"
    assert finished(child(leg, config, options(tmp_path / "straight"))) == 0
    assert finished(child(leg, config, options(out, max_steps=7))) == 0
    assert finished(child(leg, config, options(out), file_limit=20_000)) == 1
    said = said_by_children(out)
    assert "could not be saved" in said and "Traceback" not in said
    assert last_state(out)["step"] == 7 and not list(out.rglob("*.tmp-*"))
    assert finished(child(leg, config, options(out))) == 0
    assert_same_run(tmp_path / "straight", out)


@posix
def test_a_full_disk_between_checkpoints_is_named(config, tmp_path):
    """Rows are written at every step, so they are what meets a full disk first."""
    out = tmp_path / "run"
    run_training(config, options(out, max_steps=2))
    later = options(out, save_minutes=60)
    assert finished(child(leg, config, later, file_limit=700)) == 1
    said = said_by_children(out)
    assert "Traceback" not in said and "make room" in said
    assert "s.jsonl cannot be written (File too large)" in said
    run_training(config, options(out))
    run_training(config, options(tmp_path / "straight"))
    assert_same_run(tmp_path / "straight", out)


# One folder, one run, one writer


def test_a_finished_run_is_neither_trained_nor_read_again(
    config, tmp_path, capfd, monkeypatch
):
    config = dataclasses.replace(config, steps=3)
    with monkeypatch.context() as patch:  # the model is returned from memory
        patch.setattr(runs, "load_run", lambda *_: pytest.fail("read back from disk"))
        first = run_training(config, options(tmp_path / "run"))
    assert first.step == 3 and not first.model.training
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "checkpoints" / "step-00000003.pt").unlink()  # the optimiser's
    monkeypatch.setattr(
        runs, "load_corpus", lambda name: pytest.fail("read the corpus")
    )
    again = run_training(config, options(tmp_path / "run"))
    assert again.step == 3 and "is finished: 3 steps" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert_same(first.model.state_dict(), again.model.state_dict())


@posix
def test_two_processes_cannot_write_one_folder(config, tmp_path):
    out = tmp_path / "run"
    first = child(leg, config, options(out), pause=0.05)
    wait_until(lambda: rows(out))
    assert finished(child(leg, config, options(out))) == 1
    assert f"is in use by process {first.pid}" in said_by_children(out)
    first.kill()
    first.join()
    with lock(out / "lock", wait=False):
        pass  # the lock died with its process


def test_a_run_that_is_refused_leaves_nothing_behind(config, tmp_path):
    with pytest.raises(GptlibError, match="unknown corpus 'nowhere'"):
        run_training(
            dataclasses.replace(config, corpus="nowhere"), options(tmp_path / "run")
        )
    (tmp_path / "mine").mkdir()
    with pytest.raises(GptlibError, match="unknown corpus 'nowhere'"):
        run_training(
            dataclasses.replace(config, corpus="nowhere"), options(tmp_path / "mine")
        )
    assert not (tmp_path / "run").exists() and (tmp_path / "mine").exists()
    run_training(config, options(tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run" / "lock.pid").exists()


def test_the_precision_is_settled_once(config, tmp_path, monkeypatch, capsys):
    names, real = [], runs.devices.pick_precision
    spy = lambda device, name: names.append(name) or real(device, name)
    monkeypatch.setattr(runs.devices, "pick_precision", spy)
    run_training(config, options(tmp_path / "run", max_steps=1, precision="bf16"))
    run_training(config, options(tmp_path / "run", max_steps=1, precision="auto"))
    assert names == ["bf16", "bf16"]
    assert "bf16 (as the run began)" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(config, tmp_path):
    n = Tokenizer.load(config.tokenizer).n_vocab
    model = dataclasses.replace(config.model, vocab_size=n - 1)
    words = f"has {n} ids, .* {n - 1}; raise --model.vocab-size"
    with pytest.raises(RunError, match=words):
        run_training(
            dataclasses.replace(config, model=model), options(tmp_path / "run")
        )
    assert not (tmp_path / "run" / "run.json").exists()


def test_windows_that_all_begin_at_one_place_are_refused(config, tmp_path):
    """A text file is one document; such a run once learned its first window by heart."""
    text = "".join(f"{n} is half of {2 * n}.\n" for n in range(3000))
    (tmp_path / "my.txt").write_text(text)
    config = dataclasses.replace(
        config, corpus=str(tmp_path / "my.txt"), crops="documents"
    )
    with pytest.raises(RunError, match="fewer than the .*; give --crops random"):
        run_training(config, options(tmp_path / "run"))
    random = dataclasses.replace(config, crops="random")
    assert run_training(random, options(tmp_path / "run", max_steps=1)).step == 1


# Beginning from weights


def test_a_run_can_begin_from_the_weights_of_another(config, tmp_path):
    """`take_up` always began with a fresh model."""
    first = run_training(config, options(tmp_path / "first"))
    source = str(tmp_path / "first")
    config = dataclasses.replace(config, init=source, seed=7, steps=20)
    second = run_training(config, options(tmp_path / "second", max_steps=4))
    start = rows(tmp_path / "second", "validation_loss")[0]["validation_loss"]
    best = min(
        r["validation_loss"] for r in rows(tmp_path / "first", "validation_loss")
    )
    assert start == pytest.approx(best, abs=0.05), "it did not begin from the weights"
    rates = [row["learning_rate"] for row in rows(tmp_path / "second")]
    assert rates == [config.rate(step) for step in range(4)], "the schedule from 0"
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    loaded = load_run(tmp_path / "first")
    assert record["init_hash"] == runs.weights_hash(loaded.model)
    assert record["config"]["init"] == source
    torch.testing.assert_close(first.step, 40), second.step == 4
    run_training(config, options(tmp_path / "straight"))
    (tmp_path / "first").rename(tmp_path / "moved")  # not needed any more
    run_training(config, options(tmp_path / "second"))
    assert_same_run(tmp_path / "straight", tmp_path / "second")


def test_what_init_names_can_be_opened_by_somebody_else(config, tmp_path):
    source = run_training(config, options(tmp_path / "first", max_steps=3))
    asked = []
    config = dataclasses.replace(config, init="somewhere/else")
    opened = lambda name: asked.append(name) or source
    run_training(config, options(tmp_path / "run", max_steps=1), open_init=opened)
    assert asked == ["somewhere/else"]


def test_what_init_names_is_opened_before_the_corpus_is_read(config, tmp_path):
    config = dataclasses.replace(config, init=str(tmp_path / "nothing"))
    read = []
    with pytest.raises(RunError, match=r"no run\.json there"):
        run_training(config, options(tmp_path / "run"), open_data=read.append)
    assert not read


def test_a_wrong_shape_is_refused_before_the_corpus_is_read(config, tmp_path):
    source = run_training(config, options(tmp_path / "first", max_steps=1))
    model = dataclasses.replace(config.model, n_layer=3)
    config = dataclasses.replace(config, model=model, init=str(source.path))
    refuse = lambda *_: pytest.fail("the corpus was read")
    with pytest.raises(RunError, match="n_layer = 2, this one 3; set --model.n-layer"):
        run_training(config, options(tmp_path / "run"), open_data=refuse)


# Branches


def test_a_branch_equals_the_run_planned_for_its_length(config, tmp_path):
    config = dataclasses.replace(config, **FAST, cooldown_fraction=0.4)
    run_training(config, options(tmp_path / "long", max_steps=18))
    branch = branch_run(tmp_path / "long", tmp_path / "short")
    assert branch.steps == 30 and branch.spans()["cooldown_steps"] == 12
    assert branch.spans()["warmup_steps"] == config.spans()["warmup_steps"] == 4
    run_training(branch, options(tmp_path / "short"))
    run_training(branch, options(tmp_path / "planned"))
    assert losses(tmp_path / "short") == losses(tmp_path / "planned")
    record = json.loads((tmp_path / "short" / "run.json").read_text())
    assert record["parent"] == {"path": str(tmp_path / "long"), "step": 18}
    models = [last_state(tmp_path / name)["model"] for name in ("short", "planned")]
    assert_same(*models)
    assert branch_run(tmp_path / "long", tmp_path / "short") == branch
    run_training(config, options(tmp_path / "long"))  # the parent can go on as well
    with pytest.raises(RunError, match="stands at step 40 of a trapezoid"):
        branch_run(tmp_path / "long", tmp_path / "late")
    with pytest.raises(RunError, match="no branch of"):
        branch_run(tmp_path / "long", tmp_path / "planned")


def test_the_ledgers_branches_end_within_the_spread_of_seeds():
    path = Path(__file__).parents[1] / "ledger" / "branching" / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gaps = [row["branch"] - row["planned"] for row in rows]
    spread = statistics.stdev(row["planned"] for row in rows)
    assert [row["seed"] for row in rows] == [1, 2, 3]
    assert round(statistics.mean(gaps), 3) == 0.002 and round(spread, 3) == 0.014


def test_only_a_trapezoid_branches(config, tmp_path):
    run_training(config, options(tmp_path / "cosine", max_steps=18))
    with pytest.raises(RunError, match="step 18 of a cosine; only a trapezoid can"):
        branch_run(tmp_path / "cosine", tmp_path / "branch")
    with pytest.raises(RunError, match=r"no run\.json there"):
        branch_run(tmp_path / "nothing", tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


# With what others hand in


@posix
def test_resuming_with_compiled_parts_is_exact(config, tmp_path):
    """Each leg is a process of its own, which compiles and checks everything anew."""
    small = speed.small_like(config.model)
    if speed.compiled_hidden(torch.device("cpu"), small) is training.GPT.hidden:
        pytest.skip("no compiler here that can be trusted")
    config, program = dataclasses.replace(config, steps=10), {"loss": "compiled"}
    straight, legs = tmp_path / "straight", tmp_path / "legs"
    finish(start(config, straight, program=program))
    finish(start(config, legs, program=program, max_steps=4))
    finish(start(config, legs, program=program))
    assert_same_run(straight, legs)


def test_another_loss_is_named(config, tmp_path, capfd):
    for chunked in (True, False):
        loss = speed.FastLoss(chunked=chunked, compiled=False)
        run_training(config, options(tmp_path / "run", max_steps=2), loss_fn=loss)
    said = capfd.readouterr().err
    assert "loss FastLoss(chunked=True" in said and "not bit for bit" in said


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_dashboard_changes_no_step_and_survives_a_second_leg(
    config,
    tmp_path,
    name,
    monkeypatch,
):
    pytest.importorskip(name, reason=f"{name} is not installed; it is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(config, steps=10)
    run_training(config, options(tmp_path / "none"))
    run_training(config, options(tmp_path / "run", log=name, max_steps=6))
    identity = tmp_path / "run" / "wandb-id"
    before = identity.read_text() if name == "wandb" else None
    run_training(config, options(tmp_path / "run", log=name))
    assert_same_run(tmp_path / "none", tmp_path / "run")
    assert any((tmp_path / "run" / name).rglob("*"))
    assert name != "wandb" or identity.read_text() == before


def test_the_small_run_is_trained_once(config, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path))
    short = dataclasses.replace(without_dropout(config), steps=8, batch_size=4)
    monkeypatch.setitem(runs.PRESETS, "demo", short)
    first = runs.small_run()
    assert first.step == 4 and first.path.parent == tmp_path / "cache" / "small_runs"
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "load_corpus", lambda _: pytest.fail("read the corpus"))
    again = runs.small_run()
    assert again.path == first.path
    assert_same(first.model.state_dict(), again.model.state_dict())
    monkeypatch.setattr(runs.devices, "describe_code", lambda: {"files": "another"})
    with pytest.raises(pytest.fail.Exception):
        runs.small_run()


def test_every_preset_is_a_configuration():
    assert all(isinstance(c, TrainConfig) for c in training.PRESETS.values())


def test_the_first_process_decides_which_checkpoint_is_taken(config, tmp_path):
    """On a shared disk the others may see another one as the newest."""

    class Second(Processes):
        def from_main(self, number):
            return 2

    out = options(tmp_path / "run", save_minutes=0, max_steps=3, keep=3)
    run_training(config, out)
    hooks = plain_loss, load_run, runs.open_corpus
    second = runs.Leg(config, out, Second(rank=1), *hooks)
    assert second.state.step == 2 and second.journal is None
    first = runs.Leg(config, out, Processes(), *hooks)
    first.journal.close()
    assert first.state.step == 3


def test_a_record_that_cannot_be_written_is_named(config, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_whole", full)
    with pytest.raises(RunError, match="cannot be written .No space left.*make room"):
        run_training(config, options(tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(GptlibError, match="cannot be written"):
        run_training(config, options(tmp_path / "file" / "run"))
