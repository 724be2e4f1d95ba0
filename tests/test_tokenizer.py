"""The tokenizer: many random texts, damaged files, no network."""

import json
import os
import pickle
import random
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken

from gptlib.corpus import Corpus, Piece, load_corpus
from gptlib.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    Tokenizer,
    TokenizerError,
    encode_text,
    encode_word,
    load_tokenizer,
    merge_pair,
    padded_vocab_size,
    ranks_of,
    split_words,
    train_bpe,
)


ODD = [
    "",
    " ",
    "\n\n  \n",
    "a  b   c\t\td",
    "women 's 17 @-@ year @-@ old 's",
    "it's we'll they've I'm you're he'd don't 'S 'LL",
    "naïve façade Ærøskøbing",
    "数学 데이터 مرحبا שלום हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈é e\u0301",
    "\u00a0\u2003\u3000x\u200b\ufeff",
    "\x00\x01\x7f\x85 \x1c\x1d\x1e\x1f x",
    "½ ² Ⅷ ٣٤ 1234567890",
    f"before{END_OF_TEXT}after",
    "a" * 300,
    "\U0010ffff\U00010000",
]


# Characters whose class no edition of Unicode disputes: the regex engines differ.
OLD_CHARACTERS = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs")
]


def random_text(rng: random.Random, length: int) -> str:
    """Mostly a small alphabet, so that pairs repeat; now and then any character."""
    common = "aaabbn  's1.\n\tésλ語👍"
    return "".join(
        rng.choice(OLD_CHARACTERS if rng.random() < 0.1 else common)
        for _ in range(length)
    )


def train_slowly(texts: list[str], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """The definition, word for word: recount everything before each merge."""
    words = [[bytes([b]) for b in word] for text in texts for word in split_words(text)]
    merges = []
    while len(merges) < vocab_size - 257:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        words = [merge_pair(word, best) for word in words]
    return merges


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return load_tokenizer("bpe-2048")


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary: TIKTOKEN_CACHE_DIR is not set")
    return load_tokenizer("gpt2")


def test_the_trainer_equals_its_definition():
    rng = random.Random(0)
    for _ in range(150):
        texts = [
            random_text(rng, rng.randrange(150)) for _ in range(rng.randrange(1, 4))
        ]
        size = 257 + rng.randrange(40)
        assert train_bpe(texts, size) == train_slowly(texts, size), texts


def test_a_tokens_bytes_have_one_derivation():
    rng = random.Random(1)
    for _ in range(150):
        merges = train_bpe(["".join(rng.choices("aaab", k=200))], 300)
        assert len(ranks_of(merges)) == 256 + len(merges)


def test_the_trainer_does_not_depend_on_the_order_of_texts():
    texts = [random_text(random.Random(seed), 300) for seed in range(5)]
    assert train_bpe(texts, 320) == train_bpe(reversed(texts), 320)


def test_the_trainer_stops_when_nothing_repeats():
    assert train_bpe(["abc"], 1000) == []
    assert train_bpe([], 1000) == []
    with pytest.raises(TokenizerError, match="256 is too small"):
        train_bpe(["abc"], 256)


@pytest.mark.parametrize("text", ODD)
def test_own_encoder_equals_tiktoken_on_odd_text(own, text):
    ids = own.encode(text)
    assert ids == encode_text(text, own.ranks) == own.encoding.encode_ordinary(text)
    assert own.decode(ids) == text
    assert own.end_of_text not in ids


def test_own_encoder_equals_tiktoken_on_random_text(own):
    rng = random.Random(2)
    for _ in range(400):
        text = random_text(rng, rng.randrange(200))
        ids = own.encode(text)
        assert ids == encode_text(text, own.ranks), repr(text)
        assert own.decode(ids) == text


def test_own_encoder_equals_tiktoken_on_random_bytes(own):
    """Any bytes can be tokenised word by word, UTF-8 or not."""
    rng = random.Random(3)
    alphabet = b"aenth \xc3\xa9\xff\x00"
    for _ in range(1000):
        word = bytes(rng.choices(alphabet, k=rng.randrange(1, 60))) + rng.randbytes(
            rng.randrange(5)
        )
        ids = encode_word(word, own.ranks)
        assert ids == own.encoding._core_bpe.encode_single_piece(word)
        assert own.decode_bytes(ids) == word


def test_random_vocabularies_agree_with_tiktoken():
    rng = random.Random(4)
    for _ in range(40):
        tokenizer = Tokenizer.from_merges(
            train_bpe([random_text(rng, 400)], 300), "random"
        )
        text = random_text(rng, 300)
        assert tokenizer.encode(text) == encode_text(text, tokenizer.ranks)


def test_all_of_tinywiki(own):
    from gptlib.workshop.tinywiki import TinyWiki

    text = "".join(article.text for article in TinyWiki(seed=0).articles("validation"))
    words = split_words(text)
    ids = {word: encode_word(word, own.ranks) for word in set(words)}
    assert b"".join(words) == text.encode()
    assert own.encode(text) == [token for word in words for token in ids[word]]
    assert own.n_vocab == 2048 and own.end_of_text == 2047


def test_training_looks_at_a_merges_words_only(monkeypatch):
    """The work, counted: pairs looked at, against all words at every merge."""
    from gptlib.tokenizer import PairTable

    looked_at = 0
    count = PairTable.count

    def counting(self, i, sign):
        nonlocal looked_at
        pairs = count(self, i, sign)
        looked_at += len(pairs)
        return pairs

    monkeypatch.setattr(PairTable, "count", counting)
    text = " ".join(random_text(random.Random(seed), 2000) for seed in range(5))
    merges = train_bpe([text], 257 + 200)
    every_word_at_every_merge = 200 * sum(len(w) for w in set(split_words(text))) / 2
    assert len(merges) == 200 and looked_at < every_word_at_every_merge / 5


def test_bpe_is_trained_on_the_corpus_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "own.txt"
    path.write_text("zyzzyva xyst zyzzyva\n" * 50)
    trained = load_tokenizer("bpe-262", str(path))
    assert b"zy" in trained.ranks and b"th" not in trained.ranks
    assert load_tokenizer("bpe-262", load_corpus(str(path))).hash == trained.hash
    path.write_text("quokka quoll quokka\n" * 50)
    assert b"zy" not in load_tokenizer("bpe-262", str(path)).ranks
    with pytest.raises(TokenizerError, match="supports only bpe-2.*a larger corpus"):
        load_tokenizer("bpe-2048", str(path))


def test_a_trained_tokenizer_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    read = []
    readers = {"train": lambda: read.append(1) or iter([Piece("banana bandana " * 50)])}
    hashes = {load_tokenizer("bpe-260", Corpus("c", readers)).hash for _ in range(3)}
    assert len(hashes) == 1 and len(read) == 1


def test_bpe_reads_the_beginning_of_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("gptlib.tokenizer.TRAIN_CHARACTERS", 100)
    read = []

    def reader():
        for n in range(1000):
            read.append(n)
            yield Piece("banana bandana ")

    load_tokenizer("bpe-260", Corpus("endless", {"train": reader}))
    assert len(read) < 10


def test_a_prompt_of_characters_never_seen_is_bytes(own):
    prompt = "語ꙮ\U0001f9a5" * 3
    ids = own.encode(prompt)
    assert own.decode(ids) == prompt and len(ids) == len(prompt.encode())
    assert max(ids) < 256


def test_arrays_and_special_tokens(own):
    array = own.encode_array("The river.")
    assert array.dtype == np.uint16 and array.tolist() == own.encode("The river.")
    assert own.decode(array) == "The river."
    assert own.decode([own.end_of_text]) == END_OF_TEXT
    assert own.decode([]) == "" and own.encode("") == []
    large = Tokenizer(
        "large", {n.to_bytes(3, "big"): n + 256 for n in range(70000)} | ranks_of([])
    )
    assert large.encode_array("ab").dtype == np.uint32


def test_partial_characters_become_replacement_marks(own):
    ids = [own.ranks[bytes([byte])] for byte in "é".encode()]
    assert own.decode(ids) == "é"
    assert own.decode(ids[:1]) == "\ufffd"
    assert own.decode_bytes(ids[:1]) == b"\xc3"


@pytest.mark.parametrize("bad", [2048, 2111, 50300, -1])
def test_ids_of_no_token(own, bad):
    with pytest.raises(
        TokenizerError, match=f"id {bad} is not in the vocabulary of bpe-2048"
    ):
        own.decode([5, bad])


def test_text_that_cannot_be_encoded(own, capfd):
    with pytest.raises(TokenizerError, match="half of a character"):
        own.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="encode the text in pieces") as caught:
        own.encode("a" + " " * 1_000_000 + "b")
    assert "\n" not in str(caught.value)


def test_padding():
    assert padded_vocab_size(50257) == 50304
    assert padded_vocab_size(2048) == 2048 and padded_vocab_size(2049) == 2112
    assert padded_vocab_size(50257, 128) == 50304 and padded_vocab_size(7, 1) == 7


def test_save_and_load(own, tmp_path):
    path = tmp_path / "deeper" / "tokenizer.json"
    own.save(path)
    loaded = Tokenizer.load(path)
    assert loaded == own and loaded.hash == own.hash and hash(loaded) == hash(own)
    assert load_tokenizer(path).encode("a river") == own.encode("a river")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    every_byte = Tokenizer.from_merges([(b"\xff", b"\x00")], "bytes")
    every_byte.save(path)
    assert Tokenizer.load(path) == every_byte


def test_a_failed_save_leaves_the_old_file(own, tmp_path):
    path = tmp_path / "tokenizer.json"
    own.save(path)
    with pytest.raises(TokenizerError, match="gaps"):
        Tokenizer("holes", {b"a": 0, b"b": 2}).save(path)
    assert Tokenizer.load(path) == own and len(list(tmp_path.iterdir())) == 1


def test_the_hash_sees_what_decides_ids(own):
    assert Tokenizer("other name", own.ranks).hash == own.hash
    assert Tokenizer("own", own.ranks, r"\S+|\s+").hash != own.hash
    merges = [(b"a", b"b"), (b"b", b"c")]
    assert (
        Tokenizer.from_merges(merges, "x").hash
        != Tokenizer.from_merges(merges[::-1], "x").hash
    )


def change_token(stored: dict) -> None:
    stored["tokens"][300] += "x"


def swap_tokens(stored: dict) -> None:
    stored["tokens"][300:302] = stored["tokens"][301:299:-1]


def change_pattern(stored: dict) -> None:
    stored["pattern"] += "|x"


def change_special(stored: dict) -> None:
    stored["special"][END_OF_TEXT] = 5


def repeat_token(stored: dict) -> None:
    stored["tokens"][300] = stored["tokens"][299]


@pytest.mark.parametrize(
    "alter", [change_token, swap_tokens, change_pattern, change_special, repeat_token]
)
def test_altered_files(own, tmp_path, alter):
    path = tmp_path / "tokenizer.json"
    own.save(path)
    stored = json.loads(path.read_text())
    alter(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(
        TokenizerError, match="altered.*delete it and train it anew"
    ) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 1000, -1, -2, -3])
def test_truncated_files(own, tmp_path, keep):
    path = tmp_path / "tokenizer.json"
    own.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TokenizerError, match="cut off"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"tokens": [1]}', "null", '"text"', "\ud7ff\u0100"]
)
def test_files_of_something_else(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match="no tokenizer file"):
        Tokenizer.load(path)


def test_unknown_names(tmp_path):
    for name in (
        "gpt-5",
        "bpe-",
        "bpe-2048x",
        str(tmp_path / "missing.json"),
        str(tmp_path),
    ):
        with pytest.raises(
            TokenizerError, match="unknown tokenizer .* choose gpt2, bpe-2048"
        ):
            load_tokenizer(name)
    with pytest.raises(TokenizerError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "missing.json")
    with pytest.raises(TokenizerError, match="vocab_size 12 is too small"):
        load_tokenizer("bpe-12")


def test_a_larger_vocabulary_begins_with_the_smaller_one(own):
    larger = load_tokenizer("bpe-2100")
    assert larger.n_vocab == 2100
    assert list(larger.ranks)[:2047] == list(own.ranks)


def test_threads_and_pickles(own):
    texts = [f"river {n} of the plain" for n in range(200)]
    copy = pickle.loads(pickle.dumps(own))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.encode, texts)) == list(map(own.encode, texts))


def offline(tmp_path, code: str) -> subprocess.CompletedProcess:
    """Run code with no cached vocabulary and only a dead proxy to ask for one."""
    dead = "http://127.0.0.1:9"
    environment = os.environ | {
        "TIKTOKEN_CACHE_DIR": str(tmp_path),
        "NO_PROXY": "",
        "no_proxy": "",
    }
    environment |= dict.fromkeys(
        ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), dead
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_gpt2_without_a_network(tmp_path):
    done = offline(
        tmp_path,
        "from gptlib.tokenizer import TokenizerError, load_tokenizer\n"
        "try: load_tokenizer('gpt2', timeout=5)\n"
        "except TokenizerError as error: print(error)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpt2: its vocabulary could not be fetched"), (
        done.stdout
    )
    assert "TIKTOKEN_CACHE_DIR" in done.stdout and "bpe-2048" in done.stdout
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


def test_gpt2_on_a_network_that_never_answers(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answer.wait(60))
    with pytest.raises(TokenizerError, match="in 0.2 seconds; set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2", timeout=0.2)
    assert not answer.is_set(), "it waited for the network"
    answer.set()


def test_gpt2_vocabulary(gpt2):
    assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([gpt2.end_of_text]) == END_OF_TEXT
    assert tiktoken.get_encoding("gpt2")._pat_str == GPT2_PATTERN


def test_gpt2_equals_tiktokens_own(gpt2):
    theirs = tiktoken.get_encoding("gpt2")
    rng = random.Random(5)
    for text in ODD + [random_text(rng, rng.randrange(200)) for _ in range(300)]:
        ids = gpt2.encode(text)
        assert ids == theirs.encode_ordinary(text) == encode_text(text, gpt2.ranks), (
            repr(text)
        )
        assert gpt2.decode(ids) == text
    for _ in range(500):
        word = rng.randbytes(rng.randrange(1, 40))
        assert encode_word(word, gpt2.ranks) == theirs._core_bpe.encode_single_piece(
            word
        )


def test_gpt2_padded_ids(gpt2):
    for token in range(gpt2.n_vocab, padded_vocab_size(gpt2.n_vocab)):
        with pytest.raises(TokenizerError, match="first n_vocab logits"):
            gpt2.decode([token])
