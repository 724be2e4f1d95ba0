"""Evaluation where a notebook cell cannot look: many protocols, damaged weights, the real split, the command line."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine import BYTES, SMALL, WIKITEXT, model_of

from gptlib.evaluation import (
    Evaluation,
    evaluate,
    mean_of_windows,
    read_evaluation,
    token_losses,
    windows,
)
from gptlib.gpt import GPT, GPTConfig
from gptlib.workshop.token_files import TokenSplit, load_tokens


def split_of(texts: list[str], **record) -> TokenSplit:
    ids = [BYTES.end_of_text]
    for text in texts:
        ids += [*BYTES.encode(text), BYTES.end_of_text]
    return TokenSplit(
        np.array(ids, np.uint16), {"documents": len(texts), **record}, BYTES.end_of_text
    )


def test_windows_cover_every_target_exactly_once():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        n, context = int(rng.integers(0, 200)), int(rng.integers(1, 40))
        stride = int(rng.integers(1, context + 1))
        scored = []
        for start, stop, first in windows(n, context, stride):
            assert 0 <= start < stop <= n - 1 and stop - start <= context
            assert start < first <= stop + 1
            assert (
                start == 0 or first - start >= context - stride + 1
            )  # tokens before the first scored
            scored += range(first, stop + 1)
        assert scored == list(range(1, n)), (n, context, stride)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_stride_out_of_range_is_named(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}"):
        list(windows(20, 8, stride))
    with pytest.raises(ValueError, match=f"stride is {stride}"):
        token_losses(model_of(), np.arange(20), context=8, stride=stride)


@pytest.mark.parametrize("context", [0, -3, 17])
def test_context_out_of_range_is_named(context):
    with pytest.raises(ValueError, match=f"context is {context}"):
        token_losses(model_of(), np.arange(20), context=context)


@pytest.mark.parametrize(
    "context, stride", [(16, 1), (16, 16), (16, 5), (7, 7), (7, 2), (1, 1)]
)
def test_losses_equal_a_loop_over_tokens(context, stride):
    model = model_of()
    ids = np.random.default_rng(1).integers(0, 264, 67)
    expected = np.full(66, np.nan)
    for start, stop, first in windows(67, context, stride):
        for target in range(first, stop + 1):
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[start:target])[None])[0][
                    0, -1
                ].double()
            expected[target - 1] = -logits.log_softmax(-1)[ids[target]].item()
    assert (
        np.abs(
            token_losses(model, ids, context=context, stride=stride) - expected
        ).max()
        < 1e-4
    )


@pytest.mark.parametrize("stride", [None, 5])
def test_batch_size_does_not_matter(stride):
    model, split = (
        model_of(),
        split_of(["some text or other", "a second one", "x" * 300]),
    )
    results = [
        evaluate(
            model, split, BYTES, corpus="own", stride=stride, batch_size=size
        ).nats_per_token
        for size in (1, 2, 3, 7, 1000)
    ]
    assert max(results) - min(results) < 1e-6


def test_training_mode_and_dropout_are_handled():
    model = model_of(dataclasses.replace(SMALL, dropout=0.5)).train()
    ids = np.arange(60)
    assert np.array_equal(token_losses(model, ids), token_losses(model, ids))
    assert model.training


def test_each_document_gets_its_own_losses_and_units():
    model, texts = model_of(), ["Alice met Bob .\n", "é", "two\nlines\n\n"]
    split = split_of(texts)
    found = evaluate(model, split, BYTES, corpus="own", step=7)
    losses = token_losses(model, split.ids)
    lengths = [len(text.encode()) for text in texts]
    assert found.tokens == tuple(lengths) and found.text_bytes == sum(lengths)
    assert found.words == 4 + 1 + 2 + 4  # words, and line ends
    start = 0
    for nats, length in zip(found.nats, lengths, strict=True):
        assert nats == pytest.approx(losses[start : start + length].sum())
        start += length + 1  # its mark is not scored
    total = sum(found.nats)
    assert found.perplexity == pytest.approx(math.exp(total / sum(lengths)))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / sum(lengths))
    assert found.word_perplexity == pytest.approx(math.exp(total / found.words))
    assert found.floor is None and found.step == 7
    assert len(found.blocks) == len(losses) // 16
    assert np.mean(found.blocks) == pytest.approx(
        losses[: len(losses) // 16 * 16].mean()
    )


def test_line_ends_come_from_the_record_or_the_text():
    model, texts = model_of(), ["a b\n", "c\n"]
    for record, lines in [({}, 2), ({"lines": 5}, 5)]:
        found = evaluate(model, split_of(texts, **record), BYTES, corpus="own")
        assert found.words == 3 + lines
    part = evaluate(
        model, split_of(texts, lines=5), BYTES, corpus="own", max_documents=1
    )
    assert part.words == 2 + 1 and part.tokens == (4,)


def test_separate_documents_do_not_see_each_other():
    model, texts = model_of(), ["some text", "é", "", "some text"]
    together = evaluate(model, split_of(texts), BYTES, corpus="own")
    apart = evaluate(model, split_of(texts), BYTES, corpus="own", separate=True)
    alone = [
        evaluate(model, split_of([t]), BYTES, corpus="own").nats[0] for t in texts if t
    ]
    assert apart.nats == pytest.approx((*alone[:2], 0.0, alone[2]), abs=1e-5)
    assert apart.nats[0] == pytest.approx(apart.nats[3], abs=1e-5)
    assert together.nats[0] == pytest.approx(apart.nats[0], abs=1e-5)
    assert abs(together.nats[3] - apart.nats[3]) > 1e-3
    assert apart.tokens == together.tokens and "apart" in str(apart)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_an_empty_split_is_refused(texts):
    with pytest.raises(ValueError, match="own, split test: no text"):
        evaluate(model_of(), split_of(texts), BYTES, corpus="own", name="test")
    nothing = TokenSplit(np.zeros(0, np.uint16), {}, BYTES.end_of_text)
    with pytest.raises(ValueError, match="no text"):
        evaluate(model_of(), nothing, BYTES, corpus="own")


def test_an_empty_document_among_others_costs_nothing():
    found = evaluate(model_of(), split_of(["abc", "", "de"]), BYTES, corpus="own")
    assert (
        found.tokens == (3, 0, 2)
        and found.nats[1] == 0
        and math.isfinite(found.interval()[1])
    )


def test_weights_that_are_not_finite_are_named():
    model = model_of()
    model.h[1].mlp.c_fc.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite; the weights of step 12"):
        evaluate(model, split_of(["some text"]), BYTES, corpus="own", step=12)


def test_interval_contains_the_mean_and_is_seeded():
    rng = np.random.default_rng(0)
    tokens = tuple(int(t) for t in rng.integers(50, 500, 40))
    nats = tuple(float(t * rng.normal(3, 0.3)) for t in tokens)
    found = Evaluation("c", "s", 8, 8, 1, nats, tokens, 1000, 100)
    low, high = found.interval()
    assert low < found.nats_per_token < high and (low, high) == found.interval()
    assert 0.5 < (high - low) / (2 * 1.96 * 0.3 / math.sqrt(40)) < 2


def test_an_evaluation_survives_its_file(tmp_path):
    found = evaluate(model_of(), split_of(["some text", "more"]), BYTES, corpus="own")
    path = tmp_path / "evaluation-own.json"
    path.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
    assert read_evaluation(path) == found
    for damage in ("{", "[]", '{"corpus": "x"}'):
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(ValueError, match="not an evaluation"):
            read_evaluation(path)


# Ways of counting


def test_padding_is_counted_and_only_if_asked():
    model, split = model_of(), split_of(["some text", "x" * 40])
    alone = evaluate(model, split, BYTES, corpus="own", separate=True)
    padded = evaluate(model, split, BYTES, corpus="own", padded=True)
    assert alone.tokens == (9, 40) and padded.tokens == (16, 48)  # the context is 16
    ids = np.concatenate([split.ids[:11], [BYTES.end_of_text] * 6])
    assert padded.nats[0] == pytest.approx(token_losses(model, ids).sum())
    assert padded.words == alone.words


def test_the_mean_of_windows_weighs_the_short_one_as_much():
    assert mean_of_windows(np.array([1.0, 1, 1, 5]), 3, 3).tolist() == [3.0] * 4
    losses = np.arange(10.0)  # windows of 4, 2, 2 and 2
    assert mean_of_windows(losses, 4, 2)[0] == np.mean([1.5, 4.5, 6.5, 8.5])
    model, split = model_of(), split_of(["some text or other"])
    plain = evaluate(model, split, BYTES, corpus="own")
    means = evaluate(model, split, BYTES, corpus="own", window_means=True)
    assert means.tokens == plain.tokens and means.nats != plain.nats


# The real validation split


def test_counts_of_the_real_validation_split(wikitext):
    gpt2, pieces = wikitext
    assert len(gpt2.encode("".join(piece.text for piece in pieces))) == 247_137
    assert sum(len(piece.text.split()) for piece in pieces) == 213_886
    assert sum(piece.lines for piece in pieces) == 3_760
    assert sum(len(piece.text.encode()) for piece in pieces) == 1_139_711


def test_protocol_on_the_real_validation_split(wikitext):
    gpt2, pieces = wikitext
    split = load_tokens(WIKITEXT, gpt2).split("validation")
    tiny = GPT(GPTConfig(1, 1, 4, 256, False, 50304))
    with torch.no_grad():
        tiny.wte.weight.zero_()  # every token equally likely: the result is known, and quick to get
    part = evaluate(tiny, split, gpt2, corpus=WIKITEXT, max_documents=3)
    assert part.nats_per_token == pytest.approx(math.log(50304), rel=1e-5)
    marks = np.flatnonzero(split.ids == split.end_of_text)
    assert (
        len(marks) == 61 and len(split) - len(marks) == 247_137
    )  # 60 articles, every token scored
    assert part.tokens == tuple(int(b - a - 1) for a, b in zip(marks[:3], marks[1:4]))
    assert [piece.starts for piece in pieces] == [True] * 60


# The command line


def cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptlib.evaluation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = cli("--run", str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "no run.json there" in lines[0]


@pytest.mark.parametrize("given", [[], ["--run", "here", "--weights", "gpt2"]])
def test_a_run_or_weights(given):
    done = cli(*given)
    assert done.returncode == 1 and "either --run FOLDER or --weights" in done.stderr
