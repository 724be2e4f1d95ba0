"""The training loop in memory: the step, its order, its settings, its configuration."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gptlib import GptlibError, objective, training
from gptlib.batches import Batches
from gptlib.gpt import GPTConfig
from gptlib.training import (
    PRESETS,
    Precision,
    TrainConfig,
    TrainingError,
    TrainState,
    WithLoss,
    World,
    fresh_model,
    optimizer_of,
    plain_loss,
    train,
    training_step,
    validation_loss,
)


ROOT = Path(__file__).resolve().parent.parent
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
SMALL = TrainConfig(
    model=SHAPE,
    steps=12,
    batch_size=8,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_fraction=0.25,
    decay_fraction=1.0,
)
IDS = (np.arange(4000) * 7 % 31).astype(np.uint16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads would wait for each other on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def begin(config=SMALL, precision=Precision()):  # noqa: B008
    model = fresh_model(config)
    return TrainState(model, optimizer_of(model, config), precision)


def batches(config=SMALL):
    return Batches(IDS, config.batch_size, config.model.block_size, config.seed)


def run(state, config=SMALL, *, micro_batch_size=4, until=None, loss_fn=plain_loss):
    rows = []
    stop = lambda row: rows.append(row) or row["step"] == until
    module = WithLoss(state.model, loss_fn)
    sizes = {"micro_batch_size": micro_batch_size}
    train(state, module, batches(config), config, on_step=stop, **sizes)
    return rows


def gradient(config, micro_batch_size, loss_fn=plain_loss):
    """What the optimiser sees at the first step, as one vector, and the row."""
    state, seen = begin(config), []
    spy = lambda: seen.append(
        torch.cat([p.grad.flatten() for p in state.model.parameters()])
    )
    state.optimizer.step = spy
    pairs = list(batches(config).micro_batches(0, micro_batch_size))
    row = training_step(state, WithLoss(state.model, loss_fn), pairs, config)
    return seen[0], row


def test_the_gradient_is_that_of_the_mean_loss_of_the_whole_batch():
    """Against autograd on one batch, so that a missing division cannot pass."""
    config = dataclasses.replace(SMALL, grad_clip=0.0)
    model = fresh_model(config)
    (x, y), *_ = batches(config).micro_batches(0, 8)
    loss = model(x, y)[1]
    loss.backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters()])
    for size in (8, 2, 1):
        found, row = gradient(config, size)
        assert torch.allclose(found, true, atol=1e-6), size
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert row["grad_norm"] == pytest.approx(true.norm().item(), rel=1e-5)


def test_clipping_shortens_the_true_gradient_and_logs_its_length():
    whole, row = gradient(dataclasses.replace(SMALL, grad_clip=0.0), 4)
    cut, same_row = gradient(dataclasses.replace(SMALL, grad_clip=0.01), 4)
    assert row["grad_norm"] == same_row["grad_norm"] > 0.01
    assert cut.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(cut / cut.norm(), whole / whole.norm(), atol=1e-5)


def test_grad_clip_0_is_off():
    """It once multiplied every gradient by 0."""
    off, row = gradient(dataclasses.replace(SMALL, grad_clip=0.0), 4)
    wide, _ = gradient(dataclasses.replace(SMALL, grad_clip=1e5), 4)
    assert torch.equal(off, wide) and row["grad_norm"] > 0
    state = begin(dataclasses.replace(SMALL, grad_clip=0.0))
    before = copy.deepcopy(state.model.state_dict())
    run(state, dataclasses.replace(SMALL, grad_clip=0.0), until=1)
    after = state.model.state_dict()
    assert not torch.equal(before["wte.weight"], after["wte.weight"])


class HalfOnTheCPU(Precision):
    """fp16's scaler on the CPU, where the arithmetic stays fp32."""

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def scaler(self):
        scale, growth = 2.0**10, 3
        return torch.amp.GradScaler(
            "cpu", init_scale=scale, growth_interval=growth, enabled=True
        )


def test_scaling_the_loss_changes_neither_steps_nor_logged_norms():
    plain, scaled = begin(), begin(precision=HalfOnTheCPU("fp16"))
    rows, scaled_rows = run(plain), run(scaled)
    for a, b in zip(rows, scaled_rows, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert [row["scale"] for row in scaled_rows][:7] == [2**10] * 3 + [2**11] * 3 + [
        2**12
    ]
    assert "scale" not in rows[0]


def test_overflows_are_skipped_counted_and_limited():
    state, factor = begin(precision=HalfOnTheCPU("fp16")), [1.0]
    overflow = lambda model, x, y: Overflow.apply(plain_loss(model, x, y), factor[0])
    pairs = list(batches().micro_batches(0, 8))
    step = lambda: training_step(state, WithLoss(state.model, overflow), pairs, SMALL)
    step()
    before, factor[0] = copy.deepcopy(state.model.state_dict()), math.inf
    row = step()
    assert row["grad_norm"] is None and json.dumps(row) and row["skipped"] == 1
    assert state.scaler.get_scale() == 2**9
    after = state.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    factor[0] = 1.0
    step()
    assert state.skipped == 1 and state.skipped_in_a_row == 0
    factor[0] = math.inf
    for _ in range(training.MAX_SKIPPED_IN_A_ROW):
        step()
    with pytest.raises(TrainingError, match="21 in a row"):
        step()


class Overflow(torch.autograd.Function):
    """The loss as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_number_that_is_none_stops_before_the_weights_change(bad):
    state = begin()
    run(state, until=5)
    before = copy.deepcopy(state.state_dict())
    poisoned = lambda model, x, y: plain_loss(model, x, y) * bad
    with pytest.raises(TrainingError, match="step 6: loss (inf|nan)") as caught:
        run(state, loss_fn=poisoned)
    assert f"crops begin at {batches().offsets(5)[0]}," in str(caught.value)
    assert state.step == 5
    for name, weight in state.model.state_dict().items():
        assert torch.equal(weight, before["model"][name])


def test_the_rate_of_each_step_reaches_every_group():
    for optimizer in ("adamw", "muon"):
        config = dataclasses.replace(SMALL, optimizer=optimizer)
        state, rates = begin(config), []
        real = state.optimizer.step
        state.optimizer.step = lambda state=state, real=real, rates=rates: (
            rates.append([g["lr"] for g in state.optimizer.param_groups]),
            real(),
        )
        rows = run(state, config)
        assert len(rates) == config.steps
        for step, (groups, row) in enumerate(zip(rates, rows, strict=True)):
            assert set(groups) == {config.rate(step)} == {row["learning_rate"]}


def test_gradients_do_not_carry_over_to_the_next_step():
    state = begin()
    run(state, until=1)
    assert all(p.grad is None for p in state.model.parameters())


def test_training_goes_on_where_a_copied_state_stood():
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SHAPE, dropout=0.2))
    straight = run(begin(config), config)
    first = begin(config)
    rows = run(first, config, until=5)
    saved = copy.deepcopy(first.state_dict())
    torch.manual_seed(99)  # what else the process drew in between
    second = begin(config)
    second.load_state_dict(saved)
    assert rows + run(second, config) == straight
    forgetful = begin(config)
    forgetful.load_state_dict(saved | {"optimizer": forgetful.optimizer.state_dict()})
    assert run(forgetful, config) != straight[5:]


def test_a_state_gives_back_every_part_of_it():
    """Also what a short run would not miss: scaler, best loss, skipped steps."""
    first = begin(precision=HalfOnTheCPU("fp16"))
    run(first, until=4)
    first.best, first.best_step, first.skipped, first.skipped_in_a_row = 1.5, 3, 7, 2
    saved = copy.deepcopy(first.state_dict())
    second = begin(precision=HalfOnTheCPU("fp16"))
    second.load_state_dict(saved)
    names = ("step", "best", "best_step", "skipped", "skipped_in_a_row")
    assert [getattr(second, name) for name in names] == [4, 1.5, 3, 7, 2]
    assert second.scaler.get_scale() == first.scaler.get_scale() == 2**11
    moments = [
        {name: value for p in s.optimizer.state.values() for name, value in p.items()}
        for s in (first, second)
    ]
    assert moments[0].keys() == moments[1].keys() >= {"exp_avg", "exp_avg_sq"}
    for name, value in moments[0].items():
        assert torch.equal(value, moments[1][name]), name
    assert run(first) == run(second)


def test_only_the_last_micro_batch_of_a_step_exchanges_gradients():
    lasts = []

    class Spy(World):
        def accumulate(self, module, last):
            lasts.append(last)
            return super().accumulate(module, last)

    state = begin()
    pairs = list(batches().micro_batches(0, 2))
    training_step(state, WithLoss(state.model, plain_loss), pairs, SMALL, world=Spy())
    assert lasts == [False, False, False, True]


def test_dropout_depends_on_the_place_alone():
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SHAPE, dropout=0.5))
    model = fresh_model(config)
    seen = {}
    for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        for again in range(2):
            training.seed_dropout(config, *place)
            out = model.drop(torch.ones(64)).tolist()
            assert again == 0 or seen[place] == out
            seen[place] = out
    assert len({tuple(out) for out in seen.values()}) == 4


def test_training_is_in_training_mode_and_evaluation_is_not():
    modes = []
    spy = lambda model, x, y: modes.append(model.training) or plain_loss(model, x, y)
    state = begin()
    state.model.eval()
    run(state, until=1, loss_fn=spy)
    assert modes == [True, True]
    module = WithLoss(state.model, spy)
    validation_loss(module, batches(), Precision(), 8)
    assert modes[2:] == [False] and state.model.training
    module.eval()
    validation_loss(module, batches(), Precision(), 8)
    assert not state.model.training


def test_evaluation_weighs_unequal_groups_and_draws_nothing():
    model = fresh_model(SMALL)
    ours = Batches(IDS, 10, 8, seed=1)
    x, y = next(ours.micro_batches(training.EVAL_STEP, 10))
    true = model(x, y)[1].item()
    state = torch.get_rng_state()
    for size in (10, 4, 3):
        found = validation_loss(WithLoss(model, plain_loss), ours, Precision(), size)
        assert found == pytest.approx(true, abs=1e-5), size
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())
    for step in range(100):
        assert not np.array_equal(ours.offsets(step), ours.offsets(training.EVAL_STEP))


def test_bf16_multiplies_in_16_bits_and_keeps_weights_in_32():
    seen, state = [], begin(precision=Precision("bf16"))

    def spy(model, x, y):
        seen.append(model.h[0].attn.c_attn(model.wte(x)).dtype)
        return plain_loss(model, x, y)

    run(state, until=1, loss_fn=spy)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    plain = run(begin(), until=1)[0]["loss"]
    half = run(begin(precision=Precision("bf16")), until=1)[0]["loss"]
    assert half == pytest.approx(plain, abs=0.02) and half != plain


def test_the_processes_share_the_batch_and_the_loss():
    """Each rank gets its own groups; `mean` is asked for the loss once a step."""
    asked = []

    class Two(World):
        def mean(self, value):
            asked.append(value.item())
            return value

    for rank in (0, 1):
        state, module = begin(), None
        module = WithLoss(state.model, plain_loss)
        world = Two(rank, 2)
        train(
            state,
            module,
            batches(),
            SMALL,
            micro_batch_size=2,
            world=world,
            on_step=lambda row: True,
        )
    pairs = list(batches().micro_batches(0, 2))
    model = fresh_model(SMALL)
    parts = [model(x, y)[1].item() for x, y in pairs]
    expected = [(parts[0] + parts[2]) / 2, (parts[1] + parts[3]) / 2]
    assert asked == pytest.approx(expected, abs=1e-6)


def test_micro_batches_are_made_equal():
    assert training.fit_micro_batch(8, 5) == 4
    assert training.fit_micro_batch(480, 12, 3) == 10
    assert run(begin(), micro_batch_size=3) == run(begin(), micro_batch_size=2)
    with pytest.raises(TrainingError, match="batch_size 8 is not a multiple of 3"):
        training.fit_micro_batch(8, 4, 3)


# The configuration


def test_the_defaults_are_the_reports_run():
    paper = PRESETS["tinytiny"]
    assert paper.spans() == {"warmup_steps": 800, "decay_steps": 6000}
    assert paper.tokens_per_step == 122_880
    assert paper.rate(0) == pytest.approx(6e-4 / 800) and paper.rate(799) == 6e-4
    assert paper.rate(3399) == pytest.approx(3.3e-4, rel=0.1)
    fast = PRESETS["tinytiny-fast"]
    assert fast.spans() == {"steps": 1700, "warmup_steps": 85, "cooldown_steps": 850}
    assert fast.rate(849) == fast.rate(850) == fast.learning_rate > fast.rate(900)


def test_a_schedule_gets_the_lengths_that_it_names(monkeypatch):
    """A new schedule is one function in one place."""
    halving = lambda step, *, peak, final, steps: peak * 0.5 ** (step / steps)
    monkeypatch.setitem(objective.SCHEDULES, "halving", halving)
    config = dataclasses.replace(SMALL, schedule="halving")
    assert config.spans() == {"steps": 12} and config.rate(12) == 0.5e-2


def test_configurations_survive_json():
    for config in PRESETS.values():
        stored = json.loads(json.dumps(dataclasses.asdict(config)))
        assert TrainConfig.from_dict(stored) == config


def test_records_of_older_versions_are_read():
    record = json.loads((ROOT / "ledger" / "books-cpu" / "run.json").read_text())
    old = TrainConfig.from_dict(record["config"])
    assert old.schedule == "cosine" and not old.zero_projections and old.init is None
    assert old.spans() == {"warmup_steps": 45, "decay_steps": 450}
    older = record["config"] | {"cooldown_fraction": 0.25, "optimizer": "muon"}
    assert TrainConfig.from_dict(older).schedule == "trapezoid"
    assert TrainConfig.from_dict(older).cooldown_fraction == 0.25
    none = record["config"] | {"cooldown_fraction": None}
    assert TrainConfig.from_dict(none) == old
    with pytest.raises(TrainingError, match="unknown setting momentum"):
        TrainConfig.from_dict(record["config"] | {"schedule": "cosine", "momentum": 1})


def test_every_number_has_its_range():
    numbers = {
        f.name for f in dataclasses.fields(TrainConfig) if f.type in ("int", "float")
    }
    assert numbers == training.LIMITS.keys()
    for name, (low, high) in training.LIMITS.items():
        for value in (low - 1, high * 2, math.nan, math.inf, None, "1"):
            with pytest.raises(GptlibError, match=f"{name} is"):
                dataclasses.replace(SMALL, **{name: value})
    with pytest.raises(
        TrainingError, match=r"steps is 2\.5; it must be a whole number"
    ):
        dataclasses.replace(SMALL, steps=2.5)
    with pytest.raises(
        TrainingError, match="unknown schedule 'steep'; there are cosine"
    ):
        dataclasses.replace(SMALL, schedule="steep")
    with pytest.raises(TrainingError, match="unknown optimizer 'sgd'"):
        dataclasses.replace(SMALL, optimizer="sgd")


def test_zero_projections_make_every_block_the_identity():
    plain = fresh_model(SMALL)
    model = fresh_model(dataclasses.replace(SMALL, zero_projections=True))
    x = torch.randn(2, 4, 16)
    for block in model.h:
        assert torch.equal(block(x), x)
    assert torch.equal(model.wte.weight, plain.wte.weight)
    assert not torch.equal(plain.h[0](x), x)


def test_a_model_is_a_function_of_its_configuration():
    torch.manual_seed(5)
    a = fresh_model(SMALL).state_dict()
    torch.manual_seed(6)
    b = fresh_model(SMALL).state_dict()
    other = fresh_model(dataclasses.replace(SMALL, seed=1)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], other["wte.weight"])


def test_the_lesson_needs_no_workshop():
    assert "workshop" not in inspect.getsource(training)
