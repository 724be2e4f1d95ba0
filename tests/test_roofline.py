"""The counts of a training step's parts, and which part an operation belongs to."""

import functools
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from gptlib import GptlibError
from gptlib.gpt import GPT, GPTConfig
from gptlib.speed import fast_loss
from gptlib.training import (
    PRESETS,
    Precision,
    TrainState,
    WithLoss,
    fresh_model,
    optimizer_of,
    training_step,
)
from gptlib.workshop import benchmark, roofline
from gptlib.workshop.benchmark import BenchmarkOptions
from gptlib.workshop.devices import pick_device, use_large_pages
from gptlib.workshop.roofline import Part, limit_rows, limit_table, owner, parts_of


SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=203)
LARGE = replace(SMALL, vocab_size=9000)  # its loss is chunked


@pytest.mark.parametrize("config", [SMALL, LARGE, PRESETS["gpt2"].model])
def test_operations_are_those_of_the_model(config):
    """Six for each weight of a product; attention has half of its pairs."""
    with torch.device("meta"):
        model = GPT(config)
    tokens, steps = 3 * config.block_size, 2
    counted = {part.name: part.operations for part in parts_of(config, 3, steps)}
    attention = counted.pop("attention, forward") + counted.pop("attention, backward")
    norms = 6 * (2 * config.n_layer + 1) * config.n_embd  # the model counts them too
    pairs = 12 * config.n_layer * config.n_embd * config.block_size
    per_token = model.flops_per_token() - pairs - norms
    assert sum(counted.values()) == steps * tokens * per_token
    # 2 of 6 forward; backward 4, and the scores once more; half of all that
    assert attention == steps * tokens * pairs / 2 * 7 / 6
    assert counted["matrices, backward"] == 2 * counted["matrices, forward"]


def test_bytes_by_hand():
    moved = {part.name: part.moved for part in parts_of(SMALL, 3, 2, width=2)}
    N, C, V, L, T = 48, 32, 203, 2, 16
    weights = V * C + T * C + 12 * L * C * C
    assert moved["norms, GELU, additions"] == 2 * 2 * (42 * L + 5) * N * C
    assert moved["head and loss"] == 2 * 2 * 2 * N * V
    assert (
        moved["optimiser"] == 4 * weights * 13
    )  # 10 passes, 3 for a second micro-batch
    assert moved["matrices, forward"] == 0


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_each_product_has_its_owner(shape):
    """Four matrices to a block, three products each, and three of the head."""
    config = replace(PRESETS["tinytiny"], model=shape)
    model = fresh_model(config)
    state = TrainState(model, optimizer_of(model, config), Precision())
    module = WithLoss(model.train(), fast_loss(shape.vocab_size))
    x, y = torch.randint(shape.vocab_size, (2, 3, shape.block_size))
    with torch.profiler.profile(record_shapes=True) as profile:
        training_step(state, module, [(x, y)], config)
    owners = Counter()
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm"):
            owners[owner(event, shape.vocab_size)] += 1
        if event.name == "aten::_fused_adamw_":
            assert owner(event, shape.vocab_size) == "optimiser"
        if event.name == "aten::gelu":
            assert owner(event, shape.vocab_size) == "norms, GELU, additions"
    blocks = 4 * shape.n_layer
    assert owners["matrices, forward"] == blocks
    assert owners["matrices, backward"] == 2 * blocks
    assert owners["head and loss"] == 3


def test_rows_and_table(monkeypatch):
    times = iter([2e-3] * 13 + [1e-3] * 13)  # the second round is the quicker one
    product = functools.cache(lambda *shape: next(times))
    monkeypatch.setattr(roofline, "product_seconds", product)
    monkeypatch.setattr(roofline, "bytes_per_second", functools.cache(lambda: 1e9))
    config = replace(PRESETS["demo"], model=SMALL)
    rows = limit_rows(config, 3, 1, Precision(), rounds=2)
    least = {row["part"]: row["least_seconds"] for row in rows}
    assert least["matrices, forward"] == pytest.approx(4 * 2 * 1e-3)
    assert least["the whole step"] == pytest.approx(sum(list(least.values())[:-1]))
    assert all(row["seconds"] > 0 for row in rows)
    lines = limit_table([*rows[:1], rows[-1] | {"seconds": 0}]).splitlines()
    assert len(lines) == 3 and lines[2].endswith("-")
    assert Part("one", ((2, 3, 4, 5, 6),)).operations == 2 * 2 * 3 * 4 * 5 * 6


def test_other_models_and_shapes_are_refused_in_one_line():
    with pytest.raises(GptlibError, match="GPT-2's parts only"):
        parts_of(PRESETS["llama"].model, 1, 1)
    options = BenchmarkOptions(n_embd=192, vocab_size=1000)
    assert options.config.model == replace(
        PRESETS["tinytiny"].model, n_embd=192, vocab_size=1000
    )
    with pytest.raises(GptlibError, match="n_embd 190 is not divisible by n_head 4"):
        BenchmarkOptions(n_embd=190).config  # noqa: B018


def test_large_pages_leave_a_choice_alone(monkeypatch):
    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.setenv(name, "0")
    use_large_pages()
    assert os.environ[name] == "0"
    monkeypatch.delenv(name)
    pick_device("cpu")  # what every command does before its first tensor
    assert os.environ[name] == "1"


def test_the_limit_of_another_device_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("sys.argv", ["benchmark", "--limit"])
    with pytest.raises(SystemExit) as refused:
        benchmark.main()
    assert refused.value.code == "gptlib: --limit measures a CPU; give --device cpu"
    assert not capsys.readouterr().out
