"""Attention, heads and block against loops written from the definition.

Each reference is plain Python over positions and heads, so it shares no code with what
it checks: neither the fused kernel, nor the reshapes, nor the mask.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gptlib import GptlibError
from gptlib.attention import Head, attention_weights, causal_attention, influence
from gptlib.block import MLP, Block
from gptlib.multi_head import CausalSelfAttention


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda s: torch.randn(*s, generator=generator, dtype=torch.float64)
    return [make(shape) for shape in shapes]


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter unlike its default and unlike the others, in fp64."""
    torch.manual_seed(0)
    for p in module.double().parameters():
        nn.init.normal_(p, std=0.5)
    return module.eval()


def weights_by_loop(q, k):
    """(T, S): for each query the softmax of its scores with the keys it may read."""
    T, S, q, k = len(q), len(k), q.detach(), k.detach()
    found = torch.zeros(T, S, dtype=q.dtype)
    for t in range(T):
        seen = S - T + t + 1
        scores = [float(q[t] @ k[s]) / math.sqrt(len(q[t])) for s in range(seen)]
        total = sum(map(math.exp, scores))
        for s, score in enumerate(scores):
            found[t, s] = math.exp(score) / total
    return found


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 6), (3, 7)])
def test_attention_is_its_definition(T, S):
    """Also for the last T of S positions, as with a cache."""
    q, k, v = tensors((T, 4), (S, 4), (S, 3))
    expected = weights_by_loop(q, k)
    assert torch.allclose(attention_weights(q, k), expected)
    assert torch.allclose(causal_attention(q, k, v), expected @ v)
    batched = [t.expand(2, 3, *t.shape) for t in (q, k, v)]
    assert torch.allclose(attention_weights(*batched[:2])[1, 2], expected)
    assert torch.allclose(causal_attention(*batched)[1, 2], expected @ v)


def test_a_head_projects_then_attends():
    head = randomise(Head(6, 4))
    (x,) = tensors((5, 6))
    q, k, v = (x @ part.weight.T for part in (head.query, head.key, head.value))
    assert torch.allclose(head(x[None])[0], weights_by_loop(q, k) @ v)


def test_dropout_takes_weights_away_and_keeps_their_mean():
    torch.manual_seed(0)
    q, k = tensors((8, 4), (8, 4))
    v = torch.eye(8, dtype=torch.float64)  # so that the output is the weights
    q, k, v = (t.expand(400, 8, -1) for t in (q, k, v))
    found = causal_attention(q, k, v, dropout=0.5)
    past = torch.ones(8, 8).tril().bool()
    assert 0.45 < (found[:, past] == 0).double().mean() < 0.55
    true = attention_weights(q[0], k[0])
    assert torch.allclose(found.mean(0), true, atol=0.1)
    kept = found[0] != 0
    assert torch.allclose(found[0][kept], 2 * true[kept])


def test_influence_is_the_largest_slope():
    (x,) = tensors((4, 3))
    matrix = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    found = influence(lambda x: torch.cumsum(x, 0) @ matrix.T, x)
    assert torch.equal(found, 3 * torch.ones(4, 4, dtype=torch.float64).tril())


@pytest.mark.parametrize("bias", [False, True])
def test_heads_equal_a_loop_over_heads(bias):
    attention = randomise(CausalSelfAttention(6, 3, bias=bias))
    (x,) = tensors((2, 5, 6))
    state = attention.state_dict()
    zero = torch.zeros(18, dtype=torch.float64)
    for row, found in zip(x, attention(x)):
        projected = row @ state["c_attn.weight"].T + state.get("c_attn.bias", zero)
        heads = []
        for h in range(3):  # head h reads columns 2h and 2h + 1 of each third
            q, k, v = (projected[:, 6 * i + 2 * h :][:, :2] for i in range(3))
            heads.append(weights_by_loop(q, k) @ v)
        expected = torch.cat(heads, dim=1) @ state["c_proj.weight"].T
        assert torch.allclose(found, expected + state.get("c_proj.bias", zero[:6]))


def test_a_cache_gets_the_new_keys_and_gives_all():
    attention = randomise(CausalSelfAttention(6, 3))
    (x,) = tensors((2, 5, 6))

    class Cache:
        parts = ([], [])

        def update(self, k, v):
            assert k.shape == v.shape == (2, 3, k.shape[2], 2)
            self.parts[0].append(k)
            self.parts[1].append(v)
            return tuple(torch.cat(part, dim=2) for part in self.parts)

    cache = Cache()
    pieces = [attention(x[:, a:b], cache) for a, b in ((0, 2), (2, 3), (3, 5))]
    assert torch.allclose(torch.cat(pieces, dim=1), attention(x))


def test_width_must_divide_into_heads():
    with pytest.raises(GptlibError, match="n_embd 8 is not divisible by n_head 3"):
        CausalSelfAttention(8, 3)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        ("gelu", lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))),
        (
            "gelu_tanh",
            lambda z: (
                0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            ),
        ),
    ],
)
def test_the_mlp_is_its_formula(activation, slope):
    mlp = randomise(MLP(4, bias=True, activation=activation))
    (x,) = tensors((3, 4))
    inside = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    assert inside.shape == (3, 16)
    inside = inside.detach().apply_(lambda z: z * slope(z))
    assert torch.allclose(mlp(x), inside @ mlp.c_proj.weight.T + mlp.c_proj.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_block_normalises_first_and_adds_to_the_stream(bias):
    block = randomise(Block(6, 3, bias=bias))
    (x,) = tensors((2, 5, 6))

    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        return x * layer.weight + (layer.bias if bias else 0)

    between = x + block.attn(norm(x, block.ln_1))
    assert torch.allclose(block(x), between + block.mlp(norm(between, block.ln_2)))


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_dropout_in_training_and_none_in_evaluation(part):
    """In every place where GPT-2 has one: weights, output of attention, of the MLP."""
    torch.manual_seed(0)
    make = {
        "attention": lambda p: CausalSelfAttention(64, 2, dropout=p),
        "mlp": lambda p: MLP(64, dropout=p),
    }[part]
    module, x = make(0.5).train(), torch.randn(1, 20, 64)
    found = module(x)
    assert 0.4 < (found == 0).float().mean() < 0.6, "the output is not dropped"
    assert not torch.equal(found, module(x))
    plain = make(0.0).train()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain(x), plain(x)) and (plain(x) != 0).all()
    assert torch.equal(module.eval()(x), plain(x))
    if part == "attention":
        module.train().resid_dropout.eval()
        assert not torch.equal(module(x), plain(x)), "the weights are not dropped"
