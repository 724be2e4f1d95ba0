"""Sampling: what holds for any weights, on small random models."""

import subprocess
import sys

import pytest
import torch
from engine import BYTES

from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import (
    KVCache,
    draw,
    generate,
    next_token_probs,
    sample_text,
    sample_texts,
    stream,
    stream_text,
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
        counts = draw(probs, seeded()).flatten().bincount(minlength=8)
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


def test_temperature_0_is_greedy(model):
    greedy = generate(model, prompts(), 20, temperature=0)
    assert torch.equal(greedy, generate(model, prompts(), 20, top_k=1))
    assert torch.equal(
        greedy, generate(model, prompts(), 20, temperature=0, generator=seeded())
    )
    tie = next_token_probs(torch.zeros(1, 4), temperature=0)
    assert (tie > 0).sum() == 1 and tie.sum() == 1


def test_a_row_that_stopped_repeats_its_stop_and_the_others_go_on(model):
    tokens, free = prompts(4, 5), {"generator": seeded(2)}
    plain = generate(model, tokens, 60, **free)
    stop = [int(plain[0, 8]), int(plain[1, 20])]
    ended = generate(model, tokens, 60, stop=stop, generator=seeded(2))
    for row, whole in zip(ended, plain):
        hits = [i for i, t in enumerate(whole[5:].tolist()) if t in stop]
        end = 5 + hits[0] + 1 if hits else 65
        assert torch.equal(row[:end], whole[:end])
        assert (row[end:] == row[end - 1]).all() if end < len(row) else True
    alone = generate(
        model, tokens[:1], 60, stop=[int(plain[0, 5])], generator=[seeded(2)]
    )
    assert alone.shape[1] <= 65


def test_generation_ends_when_all_rows_have_stopped(model):
    every = list(range(64))
    assert generate(model, prompts(), 60, stop=every).shape == (3, 6)


def test_a_generator_for_each_row_makes_rows_independent(model):
    tokens = prompts()
    together = generate(model, tokens, 30, generator=[seeded(i) for i in range(3)])
    for i, row in enumerate(tokens):
        alone = generate(model, row[None], 30, generator=seeded(i))
        assert torch.equal(together[i], alone[0])


def test_dropout_is_off_and_the_mode_comes_back():
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, dropout=0.5
    )
    model = GPT(config).train()
    texts = [generate(model, prompts(), 20, temperature=0) for _ in range(2)]
    assert torch.equal(*texts) and model.training
    assert torch.equal(texts[0], generate(model.eval(), prompts(), 20, temperature=0))
    assert not model.training


# Text

PROMPTS = ["", "a", "two words", "é", "b", "longer than the block of sixteen", "snow ❄"]


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return GPT(
        GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=320)
    ).eval()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"temperature": 1.3, "top_p": 0.9}]
)
def test_several_prompts_at_once_equal_one_by_one(reader, settings):
    together = sample_texts(reader, BYTES, PROMPTS, 40, seed=3, **settings)
    alone = [
        sample_text(reader, BYTES, prompt, 40, seed=3 + i, **settings)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS))


def test_padding_is_never_drawn_and_the_text_ends_at_the_mark(reader):
    texts = sample_texts(reader, BYTES, ["x"] * 50, 300, seed=0, temperature=50.0)
    assert len({len(text) for text in texts}) > 10, "they end where the mark was drawn"
    pieces = list(stream_text(reader, BYTES, "x", 300, seed=0, temperature=50.0))
    assert pieces[0] == "x" and "".join(pieces) == texts[0]


def test_a_character_of_several_tokens_comes_whole():
    class Snow(GPT):
        def hidden(self, tokens, cache=None):
            if cache is not None:
                super().hidden(tokens, cache)
            following = dict(zip("❄".encode(), "❄".encode()[1:] + "❄".encode()[:1]))
            nxt = tokens.clone().apply_(lambda t: following.get(t, "❄".encode()[0]))
            return 50.0 * torch.nn.functional.one_hot(nxt, 264).float()

        def head(self, hidden):
            return hidden

    model = Snow(GPTConfig(1, 1, 8, 16, False, 264))
    pieces = list(stream_text(model, BYTES, "x", 7, temperature=0))
    assert "".join(pieces) == "x❄❄\ufffd" and pieces.count("❄") == 2


def test_a_seed_repeats_and_none_does_not(reader):
    assert sample_text(reader, BYTES, "a", 30, seed=1) == sample_text(
        reader, BYTES, "a", 30, seed=1
    )
    assert sample_text(reader, BYTES, "a", 30) != sample_text(reader, BYTES, "a", 30)


def test_importing_sampling_loads_neither_engine_nor_corpora():
    code = "import gptlib.sampling, sys; print([m for m in sys.modules if m.startswith('gptlib')]"
    code += " + [m for m in ('tyro', 'datasets', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for name in ("gptlib.training", "workshop.run", "tyro", "datasets"):
        assert name not in done.stdout, done.stdout
