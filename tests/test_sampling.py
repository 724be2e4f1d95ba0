"""Sampling: what holds for any weights, on small random models."""

import pytest
import torch

from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import (
    KVCache,
    draw,
    generate,
    next_token_probs,
    stream,
    window_start,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    ).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(rows=3, length=5):
    return torch.randint(64, (rows, length), generator=seeded(1))


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {}, {"temperature": 1.2, "top_k": 20}, {"top_p": 0.9}]
)
@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_cached_equals_uncached_beyond_the_block(model, settings, length):
    tokens = prompts(3, length)
    with_cache, without = (
        generate(model, tokens, 60, use_cache=use, generator=seeded(3), **settings)
        for use in (True, False)
    )
    assert with_cache.shape == (3, length + 60)
    assert torch.equal(with_cache[:, :length], tokens)
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_whole_text(model):
    text = generate(model, prompts(), 11, top_k=1)
    predicted = model(text[:, :-1])[0].argmax(-1)
    assert torch.equal(predicted[:, 4:], text[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 12, [12], [5, 1, 4, 2], [1, 11]])
def test_cache_in_any_pieces(model, cuts):
    tokens, cache = prompts(2, 12), KVCache(model)
    pieces = [model.hidden(part, cache) for part in tokens.split(cuts, dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model.hidden(tokens), atol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="17 tokens"):
        model.hidden(tokens[:, :5], cache)


def test_rows_of_a_batch_do_not_see_each_other(model):
    tokens = prompts()
    together = generate(model, tokens, 30, top_k=1)
    alone = torch.cat([generate(model, row[None], 30, top_k=1) for row in tokens])
    assert torch.equal(together, alone)


def test_window_start():
    for block in (1, 2, 3, 16, 256):
        last = 0
        for length in range(1, 4 * block + 2):
            start = window_start(length, block)
            assert start >= last and 1 <= length - start <= block
            assert start == 0 or length > block
            last = start
    jumps = {window_start(n, 256) for n in range(1, 1025)}
    assert len(jumps) == 7, "once in half a block"


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]])
    n = 20_000
    for tau in (0.7, 1.0, 1.2):
        expected = n * (logits[0] / tau).softmax(-1)
        probs = next_token_probs(logits, temperature=tau).expand(n, -1)
        counts = (
            torch.multinomial(probs, 1, generator=seeded())
            .flatten()
            .bincount(minlength=8)
        )
        assert (
            (counts - expected) ** 2 / expected
        ).sum() < 24.3  # 7 degrees of freedom, 1 in 1,000


@torch.no_grad()
def test_tokens_that_generate_draws_follow_the_softmax(model):
    n = 6_400
    expected = n * model(torch.tensor([[7]]))[0][0, -1].softmax(-1)
    drawn = generate(model, torch.full((n, 1), 7), 1, generator=seeded())[:, 1]
    counts = drawn.bincount(minlength=64)
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 103.4  # 63 degrees of freedom, 1 in 1,000


def test_top_k_and_top_p():
    logits = torch.randn(5, 300, generator=seeded())
    full = logits.softmax(-1)
    for k in (1, 2, 299, 300, 1000):
        probs = next_token_probs(logits, top_k=k)
        assert torch.equal((probs > 0).sum(-1), torch.full((5,), min(k, 300)))
        kept = probs > 0
        assert (
            full.masked_fill(~kept, 2).amin(-1) >= full.masked_fill(kept, -1).amax(-1)
        ).all()
        assert torch.allclose(probs.sum(-1), torch.ones(5))
    for p in (1e-9, 0.3, 0.9, 1.0):
        probs = next_token_probs(logits, top_p=p)
        kept = probs > 0
        mass = (full * kept).sum(-1)
        smallest = full.masked_fill(~kept, 2).amin(-1)
        assert (mass >= p - 1e-5).all(), "the nucleus holds at least p"
        assert (mass - smallest < p).all(), "and no token more than it needs"
        assert torch.allclose(probs.sum(-1), torch.ones(5))
    both = next_token_probs(logits, top_k=10, top_p=0.5)
    assert ((both > 0).sum(-1) <= 10).all()
    ratio = both[0].topk(2).values
    best = full[0].topk(2).values
    assert torch.allclose(ratio[0] / ratio[1], best[0] / best[1]), (
        "ratios of the kept stay"
    )


def test_a_tie_leaves_greedy_one_token():
    tie = torch.zeros(1, 4)
    assert (next_token_probs(tie, top_k=1) > 0).sum() == 1
    assert (next_token_probs(tie, top_p=1e-9) > 0).sum() == 1


def test_padded_ids_are_never_drawn(model):
    tokens = torch.zeros(200, 1, dtype=torch.int64)
    assert generate(model, tokens, 5, generator=seeded())[:, 1:].max() >= 57
    for settings in ({}, {"top_k": 60}, {"top_p": 0.99}, {"temperature": 100.0}):
        drawn = generate(model, tokens, 5, n_vocab=57, generator=seeded(), **settings)
        assert drawn[:, 1:].max() < 57


def test_stream_is_lazy_and_equal_to_generate(model):
    whole = generate(model, prompts(), 8, generator=seeded())
    draws = stream(model, prompts(), 10**9, generator=seeded())
    parts = [next(draws) for _ in range(8)]
    assert torch.equal(torch.stack(parts, dim=1), whole[:, 5:])


def test_nothing_global_is_drawn_from_or_changed(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, prompts(), 3, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_draw_follows_the_probabilities_and_never_takes_a_zero():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]])
    n = 20_000
    counts = draw(probs.expand(n, -1), seeded()).flatten().bincount(minlength=7)
    kept = probs[0] > 0
    assert (counts[~kept] == 0).all()
    expected = n * probs[0, kept]
    assert (
        (counts[kept] - expected) ** 2 / expected
    ).sum() < 16.3  # 3 degrees of freedom
    assert (
        draw(2 * probs.expand(n, -1), seeded()).flatten().bincount(minlength=7)
        == counts
    ).all()


def test_draw_at_both_ends(monkeypatch):
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    for dart, token in ((0.0, 1), (0.25, 2), (1 - 2**-53, 2), (1.0, 2)):
        monkeypatch.setattr(
            torch,
            "rand",
            lambda *a, d=dart, **k: torch.tensor([[d]], dtype=torch.float64),
        )
        assert draw(probs).item() == token


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
    ],
)
def test_bad_settings(model, settings, word):
    with pytest.raises(ValueError, match=word):
        generate(model, prompts(), 1, **settings)


@pytest.mark.parametrize(
    "tokens, word",
    [
        (torch.tensor([[3, 64]]), "token id 64"),
        (torch.tensor([[-1, 3]]), "token id -1"),
        (torch.zeros(1, 0, dtype=torch.int64), "shape"),
        (torch.zeros(4, dtype=torch.int64), "shape"),
    ],
)
def test_bad_tokens(model, tokens, word):
    with pytest.raises(ValueError, match=word):
        generate(model, tokens, 1)
