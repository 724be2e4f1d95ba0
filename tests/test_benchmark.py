"""The benchmark's arithmetic and its options. Nothing here is timed."""

import json
import subprocess
import sys

import pytest
import torch

from gptlib import GptlibError, speed
from gptlib.training import PRESETS
from gptlib.workshop import benchmark
from gptlib.workshop.benchmark import VARIANTS, BenchmarkOptions, medians, table


def result(variant, rate, **more):
    row = {"variant": variant, "precision": "fp32", "tokens_per_second": rate}
    return row | {"peak_bytes": 10**9, "mfu": None} | more


def test_table_and_options():
    rows = [
        result("plain-fp32", 500.0),
        result("final", 1250.0),
        result("no-cache", 20.0),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and " 2.50 " in lines[2] and " 1.00 " in lines[4]
    with pytest.raises(GptlibError, match="unknown preset 'nano'; there are demo"):
        BenchmarkOptions(preset="nano")
    with pytest.raises(
        GptlibError, match="unknown variant 'best'; there are plain-fp32"
    ):
        BenchmarkOptions(only="best")
    with pytest.raises(GptlibError, match="rounds is 0"):
        BenchmarkOptions(rounds=0)


def test_medians_of_alternating_rounds(monkeypatch):
    rates = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    order = []

    def measure(name, options):
        order.append(name)
        return result(name, next(rates), mfu=0.5)

    monkeypatch.setattr(benchmark, "measure", measure)
    found = medians(["final", "cache"], BenchmarkOptions(rounds=3))
    assert order == ["final", "cache"] * 3
    assert [row["tokens_per_second"] for row in found] == [2.0, 20.0]


@pytest.mark.parametrize("preset", ["demo", "tinytiny"])
def test_the_final_variant_is_what_ships(monkeypatch, preset):
    """It calls the very loss that `pretrain` asks for."""
    asked = []

    def fast_loss(vocab_size, device_type="cpu"):
        asked.append((vocab_size, device_type))
        return lambda model, tokens, targets: targets

    monkeypatch.setattr(benchmark, "fast_loss", fast_loss)
    config = PRESETS[preset].model
    model = type("M", (), {"config": config})()
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    assert VARIANTS["final"].loss_fn(model, tokens, tokens) is tokens
    assert asked == [(config.vocab_size, "cpu")]
    assert speed.fast_loss(config.vocab_size).chunked == (preset == "tinytiny")


def test_command_prints_the_promised_json():
    command = [sys.executable, "-m", "gptlib.workshop.benchmark", "--preset", "demo"]
    command += ["--only", "final", "--json", "--rounds", "1", "--steps", "1"]
    command += ["--micro-batch-size", "2", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"tokens_per_second", "peak_bytes"}
    assert found["tokens_per_second"] > 0 and found["peak_bytes"] > 10**8
