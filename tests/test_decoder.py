"""The decoder of named parts: each part alone, together, and in all of the machinery."""

import dataclasses
import math
from itertools import product

import pytest
import torch
from engine import model_of

from gptlib import GptlibError
from gptlib.attention import influence
from gptlib.decoder import (
    DecoderConfig,
    SwiGLU,
    alibi_bias,
    alibi_slopes,
    all_fields,
    halves_from_neighbours,
    model_config,
    neighbours_from_halves,
    rotary_table,
    rotate,
)
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import KVCache, generate
from gptlib.speed import FastLoss, sampling_copy
from gptlib.training import plain_loss


SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 64}
LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 2}
BLOOM = {
    "bias": True,
    "activation": "gelu_tanh",
    "positions": "alibi",
    "norm_embedding": True,
}
PARTS = {
    "rms": {"norm": "rms"},
    "rotary": {"positions": "rotary"},
    "scaled": {"positions": "rotary", "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original": 8},
    "alibi": {"positions": "alibi"},
    "swiglu": {"mlp": "swiglu"},
    "one key head": {"n_kv_head": 1},
    "head size": {"head_size": 10, "positions": "rotary"},
    "qk norm": {"qk_norm": True, "qkv_bias": True},
    "untied": {"tied_head": False},
    "llama": LLAMA,
    "bloom": BLOOM,
}  # fmt: skip
TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))


def decoder_of(**parts) -> GPT:
    return model_of(DecoderConfig(**SHAPE, **parts))


def each_part():
    return pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


def test_without_other_parts_it_is_gpt2_to_the_byte():
    models = []
    for config in (GPTConfig(**SHAPE), DecoderConfig(**SHAPE)):
        torch.manual_seed(0)
        models.append(GPT(config))
    plain, decoder = (m.state_dict() for m in models)
    assert list(plain) == list(decoder)
    assert all(torch.equal(plain[name], decoder[name]) for name in plain)
    assert torch.equal(models[0](TOKENS)[0], models[1](TOKENS)[0])
    assert type(model_config(dataclasses.asdict(models[1].config))) is GPTConfig
    assert all_fields(models[0].config) == dataclasses.asdict(models[1].config)
    assert "norm" not in repr(GPTConfig())


@each_part()
def test_a_configuration_comes_back_from_its_fields(parts):
    config = DecoderConfig(**SHAPE, **parts)
    assert model_config(dataclasses.asdict(config)) == config


@each_part()
def test_no_logit_depends_on_a_later_token_and_all_on_every_earlier(parts):
    model = decoder_of(**parts).double()

    def logits_of(x):
        for block in model.h:
            x = block(x[None])[0]
        return model.head(model.ln_f(x))

    slopes = influence(logits_of, model.wte(TOKENS[0]).detach())
    assert slopes.triu(1).abs().max() == 0
    assert (slopes.tril()[torch.ones(24, 24).tril().bool()] > 0).all()


@each_part()
def test_cached_equals_uncached_in_any_pieces_and_beyond_the_block(parts):
    model = decoder_of(**parts)
    whole, cache, pieces = model.hidden(TOKENS), KVCache(model), []
    for a, b in ((0, 5), (5, 6), (6, 20), (20, 24)):
        pieces.append(model.hidden(TOKENS[:, a:b], cache))
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4)
    both = [generate(model, TOKENS[:, :6], 40, temperature=0, use_cache=c) for c in (True, False)]  # fmt: skip
    assert torch.equal(*both)


@each_part()
def test_fast_losses_and_the_sampling_copy_equal_the_plain_ones(parts):
    model, targets = decoder_of(**parts), TOKENS.roll(-1, 1)
    plain = torch.autograd.grad(plain_loss(model, TOKENS, targets), list(model.parameters()))  # fmt: skip
    for compiled in (False, True) if parts == LLAMA else (False,):  # a minute each
        loss = FastLoss(chunked=True, compiled=compiled)(model, TOKENS, targets)
        found = torch.autograd.grad(loss, list(model.parameters()))
        for a, b in zip(plain, found, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * max(1, a.abs().max().item()))
    copy = sampling_copy(model)
    with torch.no_grad():
        assert torch.allclose(copy(TOKENS[:1, :1])[0], model(TOKENS[:1, :1])[0], atol=1e-4)  # fmt: skip


def test_rotary_scores_depend_on_distances_only():
    cos, sin = rotary_table(24, 8, 10_000.0, "none", 1.0, 8192)
    q, k = torch.randn(2, 8)
    scores = rotate(q.expand(24, 8), cos, sin) @ rotate(k.expand(24, 8), cos, sin).T
    for distance in range(24):
        line = scores.diagonal(-distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-4)
    assert torch.allclose(rotate(q, cos, sin).norm(dim=-1), q.norm().expand(24))


@torch.no_grad()
def test_values_stay_as_they_are():
    """Of equal tokens all values are equal, and so is every average of them."""
    attention = decoder_of(positions="rotary").h[0].attn
    out = attention(torch.randn(1, 1, 32).expand(1, 24, 32))
    assert torch.allclose(out, out[:, :1].expand_as(out), atol=1e-4)


def test_a_cached_key_has_its_own_angle():
    """With one layer, adding the same number to all positions changes no score."""
    model = decoder_of(positions="rotary")
    attention, x = model.h[0].attn, torch.randn(1, 6, 32)
    whole = attention(x)
    cache = KVCache(model).layers[0]
    parts = [attention(x[:, i : i + 1], cache) for i in range(6)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("n_head, head_size", [(1, 2), (2, 8), (3, 4)])
def test_the_layouts_are_inverse_and_rotate_alike(n_head, head_size):
    rows = n_head * head_size
    weight, x = torch.randn(rows, 5), torch.randn(7, 5)
    halves = halves_from_neighbours(weight, n_head)
    assert torch.equal(neighbours_from_halves(halves, n_head), weight)
    cos, sin = rotary_table(7, head_size, 100.0, "none", 1.0, 8192)
    theirs = (x @ weight.T).unflatten(-1, (n_head, head_size)).transpose(0, 1)
    a, b = theirs[..., 0::2], theirs[..., 1::2]
    right = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)  # (nh, T, hs/2, 2)
    ours = (x @ halves.T).unflatten(-1, (n_head, head_size)).transpose(0, 1)
    found = rotate(ours, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2)
    assert torch.allclose(found, right, atol=1e-5)


def test_scaled_angles():
    from gptlib.decoder import rotary_speeds

    plain = rotary_speeds(64, 10_000.0, "none", 1.0, 8192)
    assert torch.equal(rotary_speeds(64, 10_000.0, "linear", 4.0, 8192), plain / 4)
    ratio = plain / rotary_speeds(64, 10_000.0, "llama3", 8.0, 256)
    turns = 256 * plain / (2 * math.pi)
    assert torch.allclose(ratio[turns >= 4], torch.ones_like(ratio[turns >= 4]))
    assert torch.allclose(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], 8.0))
    assert (ratio.diff() >= 0).all()


def test_alibi_slopes_and_bias():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = alibi_slopes(12)  # the eight of 8 heads, then every second of 16 heads
    assert twelve[:8].tolist() == alibi_slopes(8).tolist()
    assert torch.allclose(twelve[8:], alibi_slopes(16)[::2][:4])
    bias = alibi_bias(torch.tensor([0.5]), 2, 4)[0]
    assert bias.tolist() == [[-1.0, -0.5, 0.0, -math.inf], [-1.5, -1.0, -0.5, 0.0]]


def test_grouped_heads_equal_heads_with_repeated_rows():
    grouped = decoder_of(n_kv_head=2)
    full = GPT(DecoderConfig(**SHAPE))
    state = dict(grouped.state_dict())
    for name in list(state):
        if ".c_attn." in name:
            q, k, v = state[name].split([32, 16, 16])
            k, v = (z.view(2, 8, -1).repeat_interleave(2, 0).reshape(32, -1) for z in (k, v))  # fmt: skip
            state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    assert torch.allclose(full.eval()(TOKENS)[0], grouped(TOKENS)[0], atol=1e-5)
    cache = KVCache(grouped)
    grouped.hidden(TOKENS, cache)
    assert cache.layers[0].k.shape == (2, 2, 24, 8)


def test_swiglu_and_rms_are_their_formulas():
    mlp, x = SwiGLU(6, 4), torch.randn(3, 6)
    gate, up = mlp.c_fc.weight.split(4)
    z = x @ gate.T
    right = (z / (1 + (-z).exp()) * (x @ up.T)) @ mlp.c_proj.weight.T
    assert torch.allclose(mlp(x), right, atol=1e-6)
    model = decoder_of(norm="rms")
    gain = model.ln_f.weight
    x = torch.randn(2, 32)
    right = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    assert torch.allclose(model.ln_f(x), right, atol=1e-6)


def test_counts_of_parameters_and_operations():
    rotary, learned = (
        GPT(DecoderConfig(**SHAPE, positions=p)) for p in ("rotary", "learned")
    )
    assert rotary.n_parameters() == learned.n_parameters()
    assert rotary.n_parameters(include_positions=True) == rotary.n_parameters()
    untied = GPT(DecoderConfig(**SHAPE, tied_head=False))
    assert untied.n_parameters() == learned.n_parameters() + 64 * 32
    assert untied.flops_per_token() == learned.flops_per_token()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": "batch"}, "unknown norm 'batch'; choose layer, rms"),
        ({"positions": "rope"}, "unknown positions 'rope'; choose learned, rotary, alibi"),
        ({"mlp": "geglu"}, "unknown mlp 'geglu'"),
        ({"rope_scaling": "yarn"}, "unknown rope_scaling 'yarn'"),
        ({"n_kv_head": 3}, "n_head 4 is no multiple of n_kv_head 3"),
        ({"n_kv_head": 0}, "n_kv_head is 0; it must be at least 1"),
        ({"head_size": 5, "positions": "rotary"}, "head size 5 is odd"),
        ({"n_inner": 64}, "only mlp swiglu has a free inner width"),
        ({"rope_base": 0.0}, "rope_base is 0.0; it must be above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan; it must be above 0"),
        ({"n_layer": 0}, "n_layer is 0"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_one_line(change, message):
    with pytest.raises(GptlibError, match=message) as error:
        DecoderConfig(**SHAPE | change)
    assert "\n" not in str(error.value)


GRID = list(
    product(
        ("layer", "rms"), ("learned", "rotary", "alibi"), ("gelu", "swiglu"), (None, 2)
    )
)


@pytest.mark.parametrize("norm, positions, mlp, n_kv_head", GRID)
def test_every_choice_learns_a_sentence_in_the_trainings_step(
    norm, positions, mlp, n_kv_head
):
    """A tested grid: gradients reach every weight, and the loss falls."""
    from gptlib.training import (
        TrainConfig,
        TrainState,
        WithLoss,
        fresh_model,
        optimizer_of,
        training_step,
    )

    parts = {"norm": norm, "positions": positions, "mlp": mlp, "n_kv_head": n_kv_head}
    config = TrainConfig(model_config(SHAPE | parts), optimizer="muon", steps=20, batch_size=2, learning_rate=0.02, warmup_fraction=0.0)  # fmt: skip
    model = fresh_model(config)
    state = TrainState(model, optimizer_of(model, config))
    module, batch = WithLoss(model, FastLoss(chunked=True, compiled=False)), (TOKENS, TOKENS.roll(-1, 1))  # fmt: skip
    losses = [training_step(state, module, [batch], config)["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    before = GPT(config.model).state_dict()
    assert before.keys() == model.state_dict().keys()
