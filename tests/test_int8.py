"""Weights of 8 bits: how far they move, what a copy shares, where it steps aside."""

import pytest
import torch
from engine import model_of
from torch import nn

import gptlib.workshop.int8 as int8
from gptlib.decoder import DecoderConfig
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import generate
from gptlib.workshop.int8 import Int8Linear, int8_copy


SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 300}
DEFAULT = GPTConfig(**SHAPE)


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(48, 80, bias=bias)
    layer.weight.data *= torch.logspace(-3, 1, 80)[:, None]  # rows of all sizes
    return layer


@torch.no_grad()
def test_no_weight_moves_by_more_than_half_a_scale_of_its_row():
    layer = linear()
    found = torch.cat([Int8Linear(layer)(one[None]) for one in torch.eye(48)]).T
    half = layer.weight.abs().amax(1, keepdim=True) / 127 / 2
    moved = (found - layer.weight).abs()
    assert (moved <= 1.01 * half).all()
    assert (moved.amax(1) > 0.5 * half[:, 0]).float().mean() > 0.9  # it is 8 bits


@torch.no_grad()
def test_the_bias_is_added_in_full():
    layer, zero = linear(bias=True), torch.zeros(1, 48)
    assert torch.equal(Int8Linear(layer)(zero)[0], layer.bias)


def test_a_row_of_zeros_stays_zero():
    layer = nn.Linear(8, 3, bias=False)
    layer.weight.data[1] = 0
    out = Int8Linear(layer)(torch.randn(2, 5, 8))
    assert out.shape == (2, 5, 3) and (out[..., 1] == 0).all()
    assert torch.isfinite(out).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "parts",
    [{}, {"bias": True}, {"tied_head": False}, {"mlp": "swiglu", "positions": "rotary"}],
    ids=str,
)  # fmt: skip
def test_a_copy_gives_nearly_the_models_logits(parts):
    model = model_of(DecoderConfig(**SHAPE, **parts), std=0.2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    copy, tokens = int8_copy(model), torch.arange(20)[None]
    right, found = model(tokens)[0], copy(tokens)[0]
    assert 0 < (found - right).std() < 0.1 * right.std()
    assert not any(isinstance(m, nn.Linear) for m in copy.modules())
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in before.items())
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_writes_with_and_without_a_cache():
    copy = int8_copy(model_of(DEFAULT, std=0.2))
    texts = [
        generate(copy, torch.zeros(1, 1, dtype=torch.int64), 12, temperature=0, use_cache=on)
        for on in (True, False)
    ]  # fmt: skip
    assert texts[0].shape == texts[1].shape == (1, 13)
    assert torch.equal(texts[0][:, :2], texts[1][:, :2])


def test_another_device_keeps_its_model(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE))
    assert int8_copy(model) is model
    said = "arithmetic of 8 bits is not used for sampling: it needs a CPU"
    assert f"{said}, the model is on meta" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken, reason",
    [
        (lambda self, x: 2 * x[..., :48] + 3, "wrong by up to"),
        (lambda self, x: torch.full((1, 48), float("nan")), "wrong by up to nan"),
        (lambda self, x: 1 / 0, "division by zero"),
    ],
    ids=["wrong", "nan", "no engine"],
)
def test_a_machine_that_cannot_keeps_its_model(broken, reason, monkeypatch, capsys):
    monkeypatch.setattr(int8.Int8Linear, "forward", broken)
    model = model_of(DEFAULT, std=0.2)
    assert int8_copy(model) is model
    said = capsys.readouterr().err
    line = f"arithmetic of 8 bits is not used for sampling: {reason}"
    assert line in said and said.count("\n") == 1


@pytest.mark.parametrize("works", [True, False])
def test_the_users_random_numbers_are_left_alone(works, monkeypatch):
    if not works:
        monkeypatch.setattr(int8.Int8Linear, "forward", lambda self, x: x)
    model = model_of(DEFAULT, std=0.2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert (int8_copy(model) is model) != works
    assert torch.equal(torch.rand(3), expected)
