"""Schedules, parameter groups and optimisers."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from gptlib.gpt import GPT, GPTConfig
from gptlib.objective import (
    OPTIMIZERS,
    SCHEDULES,
    CombinedOptimizer,
    bits_per_byte,
    cosine,
    make_adamw,
    make_muon,
    parameter_groups,
    perplexity,
    trapezoid,
)


def lengths(name, steps, warmup):
    """The lengths that the schedule of this name asks for, to end at `steps`."""
    known = {"steps": steps, "cooldown_steps": steps // 2, "decay_steps": steps}
    known["warmup_steps"] = warmup
    wanted = inspect.signature(SCHEDULES[name]).parameters
    return {key: n for key, n in known.items() if key in wanted}


PEAK = {"peak": 6e-4, "final": 6e-5, "warmup_steps": 800}
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50)
DECAY = {"weight_decay": 0.1, "betas": (0.9, 0.95)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_stays_between_and_ends(name):
    options = {"peak": 6e-4, "final": 6e-5} | lengths(name, 6000, warmup=800)
    rates = [SCHEDULES[name](step, **options) for step in range(7000)]
    first = options.get("warmup_steps", 1)
    assert rates[0] == pytest.approx(6e-4 / first), (
        "the first step must move the weights"
    )
    assert rates[first - 1] == pytest.approx(6e-4) and max(rates) == pytest.approx(6e-4)
    assert all(a < b for a, b in itertools.pairwise(rates[:first])), (
        "the warm-up climbs"
    )
    assert all(a >= b for a, b in itertools.pairwise(rates[first - 1 :])), (
        "then it never climbs"
    )
    assert rates[6000:] == pytest.approx([6e-5] * 1000)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 8e-7, "no jump"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(0, 10), (0, 1), (10, 10), (1, 2)])
def test_schedules_at_their_limits(name, shape):
    warmup, decay = shape
    options = {"peak": 1.0, "final": 0.0} | lengths(name, decay, warmup)
    rates = [SCHEDULES[name](t, **options) for t in range(20)]
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0 and rates[-1] == 0


def test_cosine_is_half_way_down_where_the_report_stopped():
    assert cosine(3400, **PEAK, decay_steps=6000) == pytest.approx((6e-4 + 6e-5) / 2)


def test_trapezoid_corners():
    options = {"peak": 1.0, "final": 0.0, "warmup_steps": 4}
    rates = [trapezoid(t, steps=20, cooldown_steps=8, **options) for t in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:13] == [1.0] * 9
    assert rates[13:] == [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]


def test_units():
    assert perplexity(math.log(17)) == pytest.approx(17)
    assert bits_per_byte(3.0, 2, 6) == pytest.approx(bits_per_byte(1.0, 6, 6))
    assert bits_per_byte(math.log(2), 8, 8) == pytest.approx(1.0)


def test_groups_hold_every_trained_parameter_once(model):
    model.wpe.weight.requires_grad_(False)
    decaying, spared = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    ids = [id(p) for group in (decaying, spared) for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in trained}
    assert all(p.dim() >= 2 for p in decaying["params"])
    assert [p.numel() for p in spared["params"]] == [16] * 5, "five norms, nothing else"


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_with_zero_gradient_decays_matrices_and_spares_vectors(model, make):
    optimizer = make(model, **DECAY)
    assert all(group["lr"] == 0 for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 0.95 if p.dim() >= 2 else 1.0
        assert torch.allclose(p, kept * before[name], atol=1e-6), name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_settings_reach_the_optimiser(model, make):
    optimizer = make(model, weight_decay=0.3, betas=(0.7, 0.8))
    groups = [group for group in optimizer.param_groups if "betas" in group]
    assert len(groups) == 2 and all(g["betas"] == (0.7, 0.8) for g in groups)
    assert all(g["eps"] == 1e-8 for g in groups)
    decays = sorted(group["weight_decay"] for group in optimizer.param_groups)
    assert decays == [0.0] + [0.3] * (len(decays) - 1)


def test_adamw_needs_a_rate(model):
    optimizer = make_adamw(model, **DECAY)
    before = model.wte.weight.detach().clone()
    tokens = torch.randint(50, (2, 12))
    model(tokens, tokens)[1].backward()
    optimizer.step()
    assert torch.equal(model.wte.weight, before)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    optimizer = make_muon(model, **DECAY)
    muon, adamw = (
        {id(p) for group in part.param_groups for p in group["params"]}
        for part in optimizer.parts
    )
    assert muon == {id(p) for p in model.h.parameters() if p.dim() == 2}
    assert not muon & adamw and muon | adamw == {id(p) for p in model.parameters()}


def test_muon_makes_every_direction_equal():
    torch.manual_seed(0)
    owner = nn.Module()
    owner.h = nn.Linear(48, 16, bias=False)
    nn.init.zeros_(owner.h.weight)
    optimizer = make_muon(owner, weight_decay=0.0, betas=(0.9, 0.95))
    owner.h.weight.grad = (
        torch.randn(16, 2) @ torch.randn(2, 48) + torch.randn(16, 48) / 10
    )
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    values = torch.linalg.svdvals(owner.h.weight.detach()) / (0.2 * math.sqrt(48))
    assert values.min() > 0.5 and values.max() < 1.3


def test_combined_state_comes_back(model):
    def step(net, optimizer, seed):
        torch.manual_seed(seed)
        tokens = torch.randint(50, (2, 12))
        optimizer.zero_grad()
        net(tokens, tokens.roll(-1, 1))[1].backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()

    optimizer = make_muon(model, **DECAY)
    step(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())  # as a file holds it
    twin = GPT(TINY)
    twin.load_state_dict(model.state_dict())
    restored = make_muon(twin, **DECAY)
    restored.load_state_dict(state)
    step(model, optimizer, 2)
    step(twin, restored, 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name)), name
    with pytest.raises(ValueError, match="zip"):
        CombinedOptimizer(optimizer.parts[0]).load_state_dict(optimizer.state_dict())
