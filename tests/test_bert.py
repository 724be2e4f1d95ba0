"""BERT: no mask, hidden tokens, blanks, parity with transformers, bad input."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine import model_of
from torch import nn
from torch.nn import functional as F

from gptlib.attention import influence
from gptlib.batches import Batches
from gptlib.bert import (
    KIND_WORDS,
    BertError,
    Classifier,
    EncoderConfig,
    FullAttention,
    LabelledBatches,
    MaskedBatches,
    blank_log_probs,
    class_loss,
    hide,
    kind_examples,
    mask_token,
    pseudo_log_probs,
)
from gptlib.finetuning import weighted_loss
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import generate
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import TrainConfig, TrainState, WithLoss, optimizer_of, train
from gptlib.workshop.bert_exchange import Bert, BertConfig, from_bert
from gptlib.workshop.tinywiki import KINDS, TinyWiki


MASK = 3
SHAPE = EncoderConfig(2, 2, 16, 12, False, 40, mask_token=MASK)
BERT = BertConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=40, mask_token=MASK
)


def some_tokens(rows: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 40, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


# the model


def test_every_position_reads_every_other():
    torch.manual_seed(0)
    attention = FullAttention(8, 2)
    reads = influence(lambda x: attention(x[None])[0], torch.randn(5, 8))
    assert (reads > 0).all()


def test_full_attention_is_its_definition():
    torch.manual_seed(0)
    attention, x = FullAttention(8, 2, bias=True), torch.randn(1, 5, 8)
    q, k, v = attention.c_attn(x)[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[:, part] @ k[:, part].T / math.sqrt(4)).softmax(-1)
        heads.append(weights @ v[:, part])
    naive = attention.c_proj(torch.cat(heads, 1))
    assert torch.allclose(attention(x)[0], naive, atol=1e-6)


def test_an_encoder_has_the_weights_of_a_gpt():
    plain = GPTConfig(
        **{f.name: getattr(SHAPE, f.name) for f in dataclasses.fields(GPTConfig)}
    )
    ours = {k: v.shape for k, v in GPT(SHAPE).state_dict().items()}
    assert ours == {k: v.shape for k, v in GPT(plain).state_dict().items()}


def test_padding_is_not_read():
    model, tokens = model_of(BERT, kind=Bert), some_tokens()
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, 5:] = False
    other = tokens.clone()
    other[1, 5:] = 7
    with torch.no_grad():
        a, b = (model.hidden(t, keep) for t in (tokens, other))
        short = model.hidden(tokens[1:, :5])
    assert torch.equal(a[keep], b[keep])
    assert torch.allclose(a[1:, :5], short, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_logits_equal_transformers(seed):
    transformers = pytest.importorskip("transformers")
    draws = np.random.default_rng(seed)
    n_head, T = int(draws.integers(1, 5)), int(draws.integers(3, 30))
    width = n_head * int(draws.integers(1, 5)) * 2
    torch.manual_seed(seed)
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=int(draws.integers(10, 90)),
            hidden_size=width,
            num_hidden_layers=int(draws.integers(1, 4)),
            num_attention_heads=n_head,
            intermediate_size=4 * width,
            max_position_embeddings=int(T + draws.integers(0, 9)),
            type_vocab_size=2,
        )
    ).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = from_bert(theirs, MASK)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, T))
    types, keep = torch.randint(0, 2, (3, T)), torch.ones(3, T, dtype=torch.bool)
    keep[1, T // 2 :] = False
    with torch.no_grad():
        plain = theirs(tokens).logits
        there = theirs(tokens, attention_mask=keep.long(), token_type_ids=types).logits
        assert (ours(tokens)[0] - plain).abs().max() < 1e-5
        here = ours.head(ours.hidden(tokens, keep, types))
    assert (here - there)[keep].abs().max() < 1e-5


def test_bert_begins_as_bert():
    torch.manual_seed(0)
    model = Bert(
        BertConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=500, mask_token=MASK)
    )
    for weight in (model.wtt.weight, model.dense.weight, model.wte.weight):
        assert abs(weight.std().item() - 0.02) < 0.004
    assert not model.bias.any() and model.ln_0.eps == model.h[0].ln_1.eps == 1e-12


# what is hidden


def test_what_is_hidden_and_how_often():
    tokens = torch.randint(
        4, 40, (400, 1000), generator=torch.Generator().manual_seed(1)
    )
    read, chosen = hide(tokens, MASK, 40, seed=5, step=6)
    n = chosen.sum().item()
    assert abs(n / tokens.numel() - 0.15) < 0.005
    hidden = (read == MASK) & chosen
    same = (read == tokens) & chosen
    assert torch.equal(read[~chosen], tokens[~chosen])
    assert abs(hidden.sum().item() / n - (0.8 + 0.1 / 40)) < 0.01
    assert abs(same.sum().item() / n - (0.1 + 0.1 / 40)) < 0.01
    put = read[chosen & ~hidden & ~same]
    assert set(put.tolist()) == set(range(40)) - {MASK}
    counts = torch.bincount(put, minlength=40)[4:].float()
    assert counts.std() / counts.mean() < 0.15


def test_hiding_is_a_function_of_seed_and_step():
    tokens = some_tokens(20, 12)
    a, b, c, d = (
        hide(tokens, MASK, 40, seed=s, step=t)[1]
        for s, t in ((1, 2), (1, 2), (1, 3), (2, 2))
    )
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)


def batches(n: int = 6) -> MaskedBatches:
    ids = np.random.default_rng(0).integers(4, 40, 400)
    return MaskedBatches(Batches(ids, n, 12, 1), MASK, 40)


def test_only_chosen_tokens_count():
    model, masked = model_of(SHAPE), batches()
    ((read, targets, weights),) = masked.micro_batches(0, 6)
    (tokens, _), *_ = masked.batches.micro_batches(0, 6)
    assert torch.equal(targets, tokens)
    chosen = weights != 0
    assert (
        torch.equal(read[~chosen], tokens[~chosen]) and 0 < chosen.float().mean() < 0.4
    )
    naive = F.cross_entropy(model(read)[0][chosen], tokens[chosen])
    assert torch.allclose(
        weighted_loss(model, read, targets, weights), naive, atol=1e-5
    )
    changed = torch.where(chosen, targets, (targets + 1) % 40)
    assert torch.equal(
        weighted_loss(model, read, targets, weights),
        weighted_loss(model, read, changed, weights),
    )


@pytest.mark.parametrize("size, world", [(6, 1), (2, 1), (1, 1), (3, 2), (1, 3)])
def test_a_step_is_the_same_in_micro_batches(size, world):
    model, masked = model_of(SHAPE), batches()
    whole = weighted_loss(model, *next(masked.micro_batches(3, 6)))
    parts = [
        weighted_loss(model, *batch)
        for rank in range(world)
        for batch in masked.micro_batches(3, size, rank, world)
    ]
    assert len(parts) == 6 // size
    assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_an_encoder_learns_from_the_right():
    """Every second token is drawn anew, and the one before it is the same."""
    ids = np.random.default_rng(0).integers(4, 40, 3000).repeat(2)
    shape = EncoderConfig(2, 2, 32, 12, False, 40, mask_token=MASK)
    config = TrainConfig(
        model=shape,
        steps=250,
        batch_size=32,
        optimizer="muon",
        schedule="trapezoid",
        learning_rate=0.01,
        final_learning_rate=0.0,
        warmup_fraction=0.05,
    )
    torch.manual_seed(0)
    model = GPT(shape)
    state = TrainState(model, optimizer_of(model, config))
    rows = []
    train(
        state,
        WithLoss(model, weighted_loss),
        MaskedBatches(Batches(ids, 32, 12, 1), MASK, 40),
        config,
        micro_batch_size=32,
        on_step=lambda row: rows.append(row["loss"]),
    )
    assert rows[0] > 3.5 and np.mean(rows[-10:]) < 2.2


# blanks


def test_pseudo_log_probs_hide_one_token_each():
    model, ids = model_of(SHAPE), some_tokens(1)[0].tolist()
    found = pseudo_log_probs(model, ids)
    for i, token in enumerate(ids):
        read = torch.tensor([ids[:i] + [MASK] + ids[i + 1 :]])
        with torch.no_grad():
            there = model(read)[0][0, i].log_softmax(-1)[token]
        assert abs(found[i] - there) < 1e-5


def test_a_blank_is_told_from_left_to_right():
    model, (left, right) = model_of(SHAPE), some_tokens(2, 3).tolist()
    blanks = [(left, [5, 6], right), (left, [7], right), (left, [], right)]
    found = blank_log_probs(model, blanks)

    def log_prob(ids, place, token):
        with torch.no_grad():
            return model(torch.tensor([ids]))[0][0, place].log_softmax(-1)[token]

    first = log_prob([*left, MASK, MASK, *right], 3, 5)
    second = log_prob([*left, 5, MASK, *right], 4, 6)
    one = log_prob([*left, MASK, *right], 3, 7)
    assert torch.allclose(
        found, torch.stack([first + second, one, torch.tensor(0.0)]), atol=1e-5
    )


def test_a_blank_is_refused_if_it_does_not_fit():
    with pytest.raises(BertError, match="^.*12.*$"):
        blank_log_probs(model_of(SHAPE), [([5] * 11, [6, 7], [])])
    short = blank_log_probs(
        model_of(SHAPE), [([5] * 8, [6], [7] * 3), ([5] * 8, [6], [7] * 9)]
    )
    assert torch.equal(short[0], short[1])  # the right is cut


# classes


def test_a_classifier_reads_one_place():
    model = model_of(SHAPE)
    tokens = some_tokens()
    for place in (0, -1):
        classifier = Classifier(model, 7, place)
        loss = class_loss(classifier, tokens, torch.tensor([1, 2]))
        assert abs(loss.item() - math.log(7)) < 1e-6
        nn.init.normal_(classifier.out.weight)
        there = classifier.out(model.hidden(tokens)[:, place])
        assert torch.equal(classifier(tokens), there) and there.shape == (2, 7)


def test_labelled_batches_cover_a_step_once():
    data = LabelledBatches(torch.arange(50)[:, None], torch.arange(50), 8, 0)
    whole = torch.cat([labels for _, labels in data.micro_batches(4, 8)])
    parts = [
        labels for rank in (0, 1) for _, labels in data.micro_batches(4, 2, rank, 2)
    ]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    assert all(torch.equal(t[:, 0], y) for t, y in data.micro_batches(4, 4))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "".join(a.text for a in TinyWiki(0).articles("train", 20_000))
    return Tokenizer.from_merges(train_bpe([text], 300), "small")


def test_kinds_hide_their_names(tokenizer):
    tokens, labels = kind_examples(tokenizer, "validation", 30)
    assert tokens.shape == (30, 16) and set(labels.tolist()) <= set(range(len(KINDS)))
    hidden = mask_token(tokenizer)
    for number, row in enumerate(tokens.tolist()):
        article = TinyWiki(0).article("validation", number)
        text = tokenizer.decode([t for t in row[1:] if t != hidden])
        words = {word.lower() for word in text.split()[:-1]}
        assert not words & (KIND_WORDS | set(article.title.lower().split()))
        assert KINDS[labels[number]] == article.subject.kind
    assert (tokens == hidden).any(1).float().mean() > 0.6
    left_out, _ = kind_examples(tokenizer, "validation", 30, show=False)
    assert not (left_out == hidden).any()


# what is refused


def test_bad_input_is_refused_in_one_line():
    model, long = model_of(BERT, kind=Bert), some_tokens(1, 13)
    none = torch.zeros(1, 8, dtype=torch.bool)
    attempts = {
        "mask_token is 40": lambda: EncoderConfig(
            2, 2, 16, 12, False, 40, mask_token=40
        ),
        "mask_token is -1": lambda: EncoderConfig(
            2, 2, 16, 12, False, 40, mask_token=-1
        ),
        "share is 0": lambda: hide(long, MASK, 40, seed=0, step=0, share=0.0),
        "parts are": lambda: hide(long, MASK, 40, seed=0, step=0, parts=(0.9, 0.2)),
        "13 tokens": lambda: model(long),
        "all padding": lambda: model.states(some_tokens(1), none),
        "no cache": lambda: generate(model_of(SHAPE), some_tokens(1, 4), 3),
    }
    for said, attempt in attempts.items():
        with pytest.raises(BertError) as error:
            attempt()
        assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_the_byte_is_refused(tokenizer):
    ranks = {b: i for i, b in enumerate(b for b in tokenizer.ranks if b != b"\xfb")}

    class Other:
        name = "other"

    Other.ranks = ranks
    with pytest.raises(BertError, match="0xFB"):
        mask_token(Other)


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "relu"}, {"intermediate_size": 40}, {"tie_word_embeddings": False}],
)
def test_another_bert_is_refused(change):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32}
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**shape | change))
    with pytest.raises(BertError, match=next(iter(change))):
        from_bert(theirs)
