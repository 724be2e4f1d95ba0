"""The commands of the README, and one clear line for each kind of bad input."""

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


def command(folder, module, *arguments):
    env = os.environ | {"GPTLIB_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"gptlib.{module}", *arguments],
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
        "pretraining",
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


def test_sampling_and_evaluation(place):
    sample = command(
        place,
        "sampling",
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
        "sampling",
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
        "evaluation",
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
        ({"corpus": "short.txt"}, ["too few", "block"]),
        ({"tokenizer": "nothing"}, ["nothing"]),
    ],
)
def test_bad_data(place, options, parts):
    one_line(pretrain(place, "--out", "other", **options), *parts)


def test_bad_configuration(place):
    one_line(
        command(place, "pretraining", "--preset", "huge", "--out", "x"),
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
        (["--temperature", "0"], ["temperature is 0"]),
        (["--top-k", "0"], ["top_k is 0"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
    ):
        one_line(command(place, "sampling", "--run", "run", *arguments), *parts)
    one_line(
        command(place, "sampling", "--run", "missing"), "missing", "no run.json there"
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
        place, "evaluation", "--run", "run", "--corpus", "text.txt", "--out", out
    )
    assert done.returncode == 0 and (place / out).exists(), done.stderr
    assert "one document, no interval" in done.stdout


def test_watch_needs_a_run(place):
    one_line(command(place, "training", "watch", "missing"), "missing")
