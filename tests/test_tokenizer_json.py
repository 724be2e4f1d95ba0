"""Tokenizers of transformers: the same ids on odd text; other kinds refused by name."""

import json
import random

import pytest

from gptlib.tokenizer import Tokenizer, TokenizerError, load_tokenizer, train_bpe
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    from_tokenizer_json,
    to_fast_tokenizer,
)


TEXT = (
    "Alice was friends with Bob . Alice went to visit her friend Bob , and Bob 's friend Al . "
    * 3
)
TOKENIZER = Tokenizer.from_merges(train_bpe([TEXT], 290), "own")


def change_tokenizer(folder, change) -> Tokenizer:
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(stored)
    (folder / "changed.json").write_text(json.dumps(stored), encoding="utf-8")
    return from_tokenizer_json(folder / "changed.json", "changed")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["model"].update(type="WordPiece"), "a WordPiece tokenizer"),
        (lambda t: t["model"].update(type="Unigram"), "a Unigram tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), r"does not split text as GPT-2 does \(pre_tokenizer Metaspace\)"),
        (lambda t: t.update(pre_tokenizer=None), "does not split text as GPT-2 does"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "does not split text as GPT-2 does"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "does not split text as GPT-2 does"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "does not split text as GPT-2 does"),
        (lambda t: t["model"]["vocab"].update({"▁the": 500}), "no byte-level letter"),
        (lambda t: t["model"]["merges"].reverse(), "ids do not count the merges"),
        (lambda t: t["model"]["vocab"].pop("!"), "ids do not count the merges"),
        (lambda t: t["added_tokens"].clear(), "ids do not count the merges"),
        (lambda t: t["added_tokens"][0].update(id=9), r"<\|endoftext\|> has id 9, not 289"),
    ],
)  # fmt: skip
def test_other_kinds_of_tokenizer_are_refused(tmp_path, change, message):
    to_fast_tokenizer(TOKENIZER, 32).save_pretrained(tmp_path)
    assert change_tokenizer(tmp_path, lambda t: None).hash == TOKENIZER.hash
    old_spelling = lambda t: t["model"].update(
        merges=[" ".join(pair) for pair in t["model"]["merges"]]
    )
    assert change_tokenizer(tmp_path, old_spelling).hash == TOKENIZER.hash
    with pytest.raises(ExchangeError, match=message):
        change_tokenizer(tmp_path, change)


def check_equal(tokenizer: Tokenizer, seed: int) -> None:
    rng, fast = random.Random(seed), to_fast_tokenizer(tokenizer, 64)
    letters = " \n\t'’aeSé語👍\u0301\u200d\u00a0½٣_.-@ABCs!"
    texts = [
        "",
        " ",
        "a  b   c \n\n ",
        "it's 'LL we'll",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "a" * 500,
        "\x00\x85\x1c x",
    ]
    texts += [
        rng.randbytes(rng.randrange(200)).decode("utf-8", "replace") for _ in range(200)
    ]
    texts += ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(300)]
    texts += ["before<|endoftext|>after"]
    for text in texts:
        ids = fast(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text), text
        assert fast.decode(ids) == text


def test_own_tokenizer_equals_tiktoken_on_odd_text():
    check_equal(TOKENIZER, 1)


def test_gpt2_tokenizer_equals_tiktoken_on_odd_text():
    try:
        check_equal(load_tokenizer("gpt2", timeout=3), 2)
    except TokenizerError as error:
        pytest.skip(f"no GPT-2 vocabulary: {error}")
