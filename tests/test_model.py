"""The model against Table 1, against transformers, and against its own mask."""

import dataclasses
import math

import pytest
import torch
from engine import model_of

from gptlib.gpt import GPT, GPTConfig


TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50)


def test_table_1():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.n_parameters() == 26_398_080
    assert model.n_parameters(include_positions=True) == 26_398_080 + 98_304
    assert model.flops_per_token() == 163_107_072


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_logits_equal_transformers(bias, activation):
    transformers = pytest.importorskip("transformers")
    from gptlib.exchange import gpt2_config, to_gpt2_weights

    config = dataclasses.replace(TINY, bias=bias, activation=activation)
    model = model_of(config, std=0.5)  # the two GELUs then differ by 8e-4
    theirs = transformers.GPT2LMHeadModel(gpt2_config(model.config, 50, 49)).eval()
    theirs.load_state_dict(
        to_gpt2_weights(model, 50) | {"lm_head.weight": model.wte.weight}
    )
    tokens = torch.randint(50, (3, 12))
    with torch.no_grad():
        gap = (model(tokens)[0] - theirs(tokens).logits).abs().max().item()
    assert gap < 2e-5


def test_no_logit_depends_on_a_later_token():
    torch.manual_seed(0)
    model = GPT(TINY).double().eval()
    x = model.wte(torch.randint(50, (1, 12))).detach().requires_grad_()
    hidden = x + model.wpe.weight
    for block in model.h:
        hidden = block(hidden)
    logits = model.head(model.ln_f(hidden))
    for t in range(12):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        assert reached[: t + 1].all(), f"position {t} does not see all of its past"
        assert not reached[t + 1 :].any(), f"position {t} sees the future"


def test_initial_loss_is_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, vocab_size=5000))
    tokens = torch.randint(5000, (8, 12))
    assert abs(model(tokens, torch.randint(5000, (8, 12)))[1].item() - 8.517) < 0.1


def test_every_parameter_begins_as_in_gpt2():
    """Matrices N(0, 0.02), projections divided by sqrt(2 n_layer), norms 1, biases 0."""
    torch.manual_seed(0)
    shape = {"n_layer": 8, "n_embd": 64, "vocab_size": 500, "block_size": 64}
    model = GPT(dataclasses.replace(TINY, bias=True, **shape))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            value = float(".ln_" in f".{name}" and name.endswith("weight"))
            assert torch.equal(p, torch.full_like(p, value)), name
            continue
        std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.06), name
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_the_gradient_is_the_slope_of_the_loss():
    """By differences, along a random direction of each parameter; the tied table too."""
    model = model_of(dataclasses.replace(TINY, bias=True)).double()
    tokens, targets = torch.randint(50, (2, 3, 12))

    def loss():  # `forward` rounds the logits to fp32, too coarse for differences
        logits = model(tokens)[0].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten())

    model(tokens, targets)[1].backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            p += 1e-5 * direction
            above = loss()
            p -= 2e-5 * direction
            below = loss()
            p += 1e-5 * direction
        slope = ((above - below) / 2e-5).item()
        found = (p.grad * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-6), name


def test_what_enters_the_blocks_is_dropped_in_training():
    model = GPT(dataclasses.replace(TINY, n_embd=256, dropout=0.5))
    model.h = torch.nn.ModuleList()
    model.ln_f = torch.nn.Identity()
    tokens = torch.zeros(4, 12, dtype=torch.int64)
    torch.manual_seed(0)
    share = (model.hidden(tokens) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.02)
    expected = (model.wte.weight[0] + model.wpe.weight).expand(4, 12, 256)
    assert torch.equal(model.eval().hidden(tokens), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 17}, "17 is not divisible by n_head 2"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"n_layer": 0}, "n_layer is 0"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_too_many_tokens():
    with pytest.raises(
        ValueError, match="13 tokens are more than the block_size of 12"
    ):
        GPT(TINY)(torch.zeros(1, 13, dtype=torch.int64))
