"""The commands of the README, and one clear line for each kind of bad input."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from gptlib.tokenizer import Tokenizer, train_bpe


SHAPE = [
    "--model.n-layer",
    "1",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "16",
    "--model.block-size",
    "16",
    "--model.vocab-size",
    "320",
    "--crops",
    "random",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, a tokenizer and a run of six steps in it."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"the {i % 7} ferries left at {i % 12} o'clock .\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "short.txt").write_text("too short")
    (folder / "bad.txt").write_bytes(b"bad \xff\n" * 100)
    Tokenizer.from_merges(train_bpe(lines, 300), "small").save(
        folder / "tokenizer.json"
    )
    done = pretrain(folder, "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, name, *arguments):
    env = os.environ | {"GPTLIB_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gptlib.workshop.command", name, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done


def pretrain(folder, *arguments, corpus="text.txt", tokenizer="tokenizer.json"):
    fixed = [
        "--preset",
        "demo",
        "--corpus",
        corpus,
        "--tokenizer",
        tokenizer,
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--eval-interval",
        "3",
        "--eval-sequences",
        "4",
    ]
    return command(
        folder,
        "pretrain",
        *fixed,
        *SHAPE,
        "--precision",
        "fp32",
        "--no-progress",
        *arguments,
    )


def one_line(done, *parts):
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("gptlib: ") and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in line, line


def test_a_finished_run_says_so(place):
    done = pretrain(place, "--out", "run")
    assert done.returncode == 0 and "finished" in done.stderr


def test_a_page_of_a_run(place):
    done = command(place, "page", "--run", "run", "--out", "page.html")
    assert done.returncode == 0, done.stderr
    assert "MB for" in done.stdout and "30,000,000" in done.stdout
    text = (place / "page.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and "gptWeights([" in text
    assert not list(place.glob("*.weights.js"))
    one_line(
        command(place, "page", "--run", "run", "--out", "p.html", "--bits", "5"),
        "bits is 5",
        "4, 6 or 8",
    )


@pytest.mark.slow
def test_a_run_too_large_for_a_page_is_refused(place):
    shape = {"n-embd": 64, "vocab-size": 470_000}  # 30,130,816 parameters
    large = [word for k, v in shape.items() for word in (f"--model.{k}", str(v))]
    small = [f"--{k}=1" for k in ("steps", "batch-size", "eval-interval")]
    done = pretrain(place, "--out", "large", *large, *small, "--eval-sequences=1")
    assert done.returncode == 0, done.stderr
    done = command(place, "page", "--run", "large", "--out", "large.html")
    one_line(done, "30,", "too many for a page (at most 30,000,000)", "MB")
    assert not list(place.glob("large.html*"))


def test_sampling_and_evaluation(place):
    sample = command(
        place,
        "sample",
        "--run",
        "run",
        "--prompt",
        "the 3",
        "--seed",
        "1",
        "--max-new-tokens",
        "5",
    )
    again = command(
        place,
        "sample",
        "--run",
        "run",
        "--prompt",
        "the 3",
        "--seed",
        "1",
        "--max-new-tokens",
        "5",
    )
    assert (
        sample.returncode == 0
        and sample.stdout.startswith("the 3")
        and sample.stdout == again.stdout
    )
    done = command(
        place,
        "evaluate",
        "--run",
        "run",
        "--corpus",
        "text.txt",
        "--out",
        "result.json",
    )
    assert "nats per token" in done.stdout and "bits per byte" in done.stdout, (
        done.stderr
    )
    assert json.loads((place / "result.json").read_text())["split"] == "validation"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"corpus": "nowhere"}, ["unknown corpus 'nowhere'", "tinywiki"]),
        ({"corpus": "bad.txt"}, ["not UTF-8", "iconv"]),
        ({"corpus": "short.txt"}, ["too few", "add text"]),
        ({"tokenizer": "nothing"}, ["nothing"]),
    ],
)
def test_bad_data(place, options, parts):
    one_line(pretrain(place, "--out", "other", **options), *parts)


def test_bad_configuration(place):
    one_line(
        command(place, "pretrain", "--preset", "huge", "--out", "x"),
        "unknown preset 'huge'",
        "demo",
    )
    one_line(
        pretrain(place, "--out", "run", "--seed", "7"),
        "seed = 1337, not 7",
        "another --out",
    )
    done = pretrain(
        place, "--out", "x", "--model.n-head", "3"
    )  # found while the options are read
    assert (
        done.returncode == 2 and "n_embd 16 is not divisible by n_head 3" in done.stderr
    )


def test_bad_sampling(place):
    for arguments, parts in (
        (["--temperature", "-1"], ["temperature is -1"]),
        (["--top-k", "0"], ["top_k is 0"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
    ):
        one_line(command(place, "sample", "--run", "run", *arguments), *parts)
    one_line(
        command(place, "sample", "--run", "missing"), "missing", "no run.json there"
    )


def test_altered_token_file(place):
    path = next((place / "runs" / "cache" / "tokens").glob("text-*/train.bin"))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-2])
        one_line(pretrain(place, "--out", "y"), "train.bin", "delete")
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        one_line(pretrain(place, "--out", "z"), "altered", "delete")
    finally:
        path.write_bytes(good)


def test_plan_writes_nothing_and_tells_time_and_memory(place):
    before = sorted(place.rglob("*"))
    done = pretrain(place, "--plan", "--out", "planned")
    assert done.returncode == 0, done.stderr
    for part in ("device", "memory", "GB measured", "tokens/s", "whole run", "minutes"):
        assert part in done.stdout
    assert sorted(place.rglob("*")) == before


def test_settings_are_checked_before_anything_is_read(place):
    for option in ("--log", "--precision"):
        done = pretrain(place, "--out", "typo", option, "typo")
        assert done.returncode and "unknown" in done.stderr and "'typo'" in done.stderr
    assert not (place / "typo").exists()


def test_evaluation_makes_the_folder_of_its_result(place):
    out = "results/new/one.json"
    done = command(
        place, "evaluate", "--run", "run", "--corpus", "text.txt", "--out", out
    )
    assert done.returncode == 0 and (place / out).exists(), done.stderr
    assert "one document, no interval" in done.stdout


@pytest.mark.parametrize(
    "name, value", [("max-new-tokens", "-3"), ("samples", "0"), ("seed", "9" * 25)]
)
def test_a_number_of_sample_out_of_range_is_one_line(place, name, value):
    arguments = ["sample", "--run", "run", f"--{name}", value]
    one_line(command(place, *arguments), name.replace("-", "_"), value)


def test_watch_needs_a_run(place):
    one_line(command(place, "watch", "--run", "missing"), "missing")


def test_help_is_short_quick_and_without_torch():
    code = "import sys, gptlib.workshop.command as c; sys.argv = ['gptlib', '--help']; "
    code += "c.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stdout.splitlines()[-1] == "False" and len(done.stdout.splitlines()) < 24
    )
    for name in (
        "pretrain",
        "sample",
        "evaluate",
        "export",
        "import",
        "benchmark",
        "probe",
    ):
        assert name in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["finetune", "--help"], ["sample", "--run", "run"]]
)
def test_nobody_reads_on_and_nothing_is_said(place, arguments):
    """As in `gptlib --help | head -1`, but the reader has gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    code = [sys.executable, "-m", "gptlib.workshop.command", *arguments]
    done = subprocess.run(code, cwd=place, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["watch", "--help"], ["--version"]])
def test_python_m_gptlib_is_the_command_line(tmp_path, arguments):
    ways = [
        subprocess.run(
            [sys.executable, "-m", name, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        for name in ("gptlib", "gptlib.workshop.command")
    ]
    assert ways[0].stdout == ways[1].stdout != ""
    assert [way.returncode for way in ways] == [0, 0]


def test_an_unknown_command_is_one_line(tmp_path):
    one_line(command(tmp_path, "trian"), "unknown command 'trian'", "pretrain, plan")


def test_help_shows_the_defaults_of_the_preset(tmp_path):
    for preset, rate in (("demo", "0.01"), ("tinytiny", "0.0006")):
        for given in (["--preset", preset], [f"--preset={preset}"]):
            shown = command(tmp_path, "pretrain", *given, "--help-settings").stdout
            assert f"--learning-rate {rate} " in shown
    one_line(command(tmp_path, "plan", "--preset", "no", "--help"), "'no'", "demo")


def test_help_on_each_command_is_one_screen_and_needs_no_torch(tmp_path):
    """Every option, its real default, at most 40 lines of 80 characters."""
    import dataclasses

    from gptlib.workshop import command as module

    assert {*module.COMMANDS, *module.SCREENS} == {*module.HELP}
    code = "import sys, gptlib.workshop.command as c; sys.argv = ['gptlib', {!r}, {!r}]"
    code += "; c.main(); print('torch' in sys.modules)"
    for topic, classes in module.HELP.items():
        asked = (topic, "--help")
        if topic in module.SCREENS:
            asked = ("pretrain", f"--help-{topic}")
        program = [sys.executable, "-c", code.format(*asked)]
        done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
        *lines, last = done.stdout.splitlines()
        assert last == "False" and len(lines) <= 40, done.stderr
        assert lines[0] == f"usage: gptlib {asked[0]} [OPTIONS]"
        assert all(len(line) <= 80 for line in lines)
        for path in classes:
            home, name = path.rsplit(".", 1)
            made = getattr(importlib.import_module(f"gptlib.{home}"), name)
            for field in dataclasses.fields(made):
                default = field.default
                if field.name == "model" or field.name not in made.__annotations__:
                    continue
                flag = field.name.replace("_", "-")
                flag = "no-" + flag if default is True else flag
                flag = "model." + flag if "Config" in name else flag
                flag = "--" + flag
                (line,) = (s for s in lines if s.startswith(f"  {flag} "))
                if default is dataclasses.MISSING:
                    assert line.endswith("(required)")
                elif not isinstance(default, bool | None) and default != "":
                    assert line.startswith(f"  {flag} {default}"), line


def test_sample_by_command_equals_sample_by_library(place):
    from gptlib import load_run

    options = [
        "--run",
        "run",
        "--prompt",
        "the 3",
        "--seed",
        "4",
        "--max-new-tokens",
        "20",
    ]
    printed = command(place, "sample", *options, "--samples", "2").stdout
    run = load_run(place / "run")
    texts = [run.sample("the 3", 20, seed=seed) for seed in (4, 5)]
    assert printed == "".join(text + "\n" for text in texts)
    assert run.sample(["the 3", "the 3"], 20, seed=4) == texts


def test_init_from_a_run_and_from_a_transformers_folder(place):
    done = command(place, "export", "--run", "run", "--out", "hf")
    assert done.returncode == 0, done.stderr
    assert pretrain(place, "--out", "second", "--init", "run").returncode == 0
    given = ["--out", "third", "--init", "hf"]
    one_line(
        pretrain(place, *given), "has bias = True, this one False; set --model.bias"
    )
    given += ["--model.bias", "--model.vocab-size", "290"]
    done = pretrain(place, *given, tokenizer="hf/tokenizer.json")
    one_line(done, "tokenizer.json")
    one_line(pretrain(place, "--out", "fifth", "--init", "./nowhere"), "no such folder")


def test_weights_are_evaluated_as_the_run_that_they_become(place):
    pytest.importorskip("transformers")
    assert command(place, "export", "--run", "run", "--out", "hf-e").returncode == 0
    made = command(place, "import", "--model", "./hf-e", "--out", "become")
    assert made.returncode == 0, made.stderr
    shown = [
        command(place, "evaluate", *given, "--corpus", "text.txt").stdout
        for given in (["--run", "become"], ["--weights", "./hf-e"])
    ]
    assert shown[0].splitlines()[2:] == shown[1].splitlines()[2:] and shown[0]


def test_every_protocol_in_one_table(place):
    given = ["--run", "run", "--corpus", "text.txt", "--out", "ways.json"]
    done = command(place, "evaluate", *given, "--all-protocols")
    stored = json.loads((place / "ways.json").read_text())
    lines = done.stdout.splitlines()
    assert len(lines) == len(stored) + 1 == 12, done.stderr
    assert all(line.startswith(name) for line, name in zip(lines[1:], stored))
    wrong = command(place, "evaluate", *given, "--layout", "lines")
    one_line(wrong, "layout is 'lines'", "rows")


def test_the_report_s_run_ends_beside_the_report(place):
    given = ["--preset", "tinytiny", "--corpus", "text.txt", "--steps", "2"]
    given += ["--tokenizer", "tokenizer.json", "--batch-size", "4", *SHAPE]
    given += ["--precision", "fp32", "--no-progress", "--out", "paper"]
    first = command(place, "pretrain", *given, "--max-steps", "1")
    assert first.returncode == 0 and first.stdout == "", first.stderr  # not at its end
    done = command(place, "pretrain", *given)
    head, train, validation, ours = done.stdout.splitlines()
    assert "text.txt, step 2" in head and "1,200 random crops" in train
    assert train.endswith(" 3.648") and validation.endswith(" 3.674")
    found = float(ours.split()[-2])
    shown = command(place, "evaluate", "--run", "paper", "--which", "last").stdout
    assert f"nats per token     {found:.3f}" in shown
    assert abs(float(validation.split()[-2]) - found) < 0.05


def test_lazy_names():
    import gptlib

    for names in gptlib.HOME.values():
        assert all(
            getattr(gptlib, name) is not None and name in dir(gptlib) for name in names
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gptlib.nothing
    code = (
        "import sys, gptlib; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_an_import_loads_nothing_that_only_commands_or_files_need():
    """Beyond torch every public name costs well under a tenth of a second."""
    code = """
import sys
import torch
import gptlib
before = set(sys.modules)
for names in gptlib.HOME.values():
    for name in names:
        getattr(gptlib, name)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - {"gptlib", *sys.stdlib_module_names}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["tiktoken", "tiktoken_ext"], done.stderr
