"""Text as numbers: a byte-level BPE tokenizer.

Tangled from book/chapters/02_tokenizer.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import math
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import tiktoken

from gptlib import GptlibError
from gptlib.corpus import Corpus, load_corpus
from gptlib.workshop.files import cache_dir, lock, write_whole


Pair = tuple[bytes, bytes]


def merge_pair(word: list[bytes], pair: Pair) -> list[bytes]:
    """The word with every occurrence of `pair`, from the left, joined to one token."""
    merged: list[bytes] = []
    i = 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if found else word[i])
        i += 2 if found else 1
    return merged


GPT2_ALTERNATIVES = (
    r"'(?:[sdmt]|ll|ve|re)",  # English endings after an apostrophe
    r" ?\p{L}++",  # letters, with at most one space before them
    r" ?\p{N}++",  # digits and other numbers, likewise
    r" ?[^\s\p{L}\p{N}]++",  # everything else that can be seen, likewise
    r"\s++$",  # white space at the end of the text
    r"\s+(?!\S)",  # white space before a word, without its last character ...
    r"\s",  # ... which is left for the word, or stands alone
)
GPT2_PATTERN = "|".join(GPT2_ALTERNATIVES)


def split_words(text: str, pattern: str = GPT2_PATTERN) -> list[bytes]:
    """Cut text into the UTF-8 bytes of "words" that no token crosses; loses nothing."""
    import regex  # needed here alone

    return [word.encode() for word in regex.findall(pattern, text)]


def ranks_of(merges: Iterable[Pair]) -> dict[bytes, int]:
    """Token -> id: the 256 bytes in byte order, then the merges as learned."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    return {token: rank for rank, token in enumerate(tokens)}


def encode_word(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of one word: join the neighbours of lowest rank, leftmost first, to the end.

    Takes time quadratic in the length of the word.
    """
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        joined = [left + right for left, right in zip(parts, parts[1:])]
        best = min(joined, key=lambda token: ranks.get(token, math.inf))
        if best not in ranks:
            break
        i = joined.index(best)
        parts[i : i + 2] = [best]
    return [ranks[part] for part in parts]


def encode_text(
    text: str, ranks: Mapping[bytes, int], *, pattern: str = GPT2_PATTERN
) -> list[int]:
    """Ids of a text in plain Python; equal to `Tokenizer.encode`, and much slower."""
    return [i for word in split_words(text, pattern) for i in encode_word(word, ranks)]


def padded_vocab_size(n_vocab: int, multiple: int = 64) -> int:
    """The next multiple at or above `n_vocab`: 50,257 -> 50,304."""
    return -(-n_vocab // multiple) * multiple


class TokenizerError(GptlibError):
    """A tokenizer that cannot be had, or input it cannot take."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, pattern: str = GPT2_PATTERN
) -> list[Pair]:
    """Learn merges for a vocabulary of 256 bytes, the merges, and end-of-text.

    Each step joins the pair that occurs most often within words; of equals, the one
    whose (left, right) bytes sort first. Stops early when no pair occurs twice.
    Sennrich et al. (2016), section 3.2, on bytes as in Radford et al. (2019).
    """
    if vocab_size < 257:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: 256 bytes and end-of-text need 257"
        )
    table = PairTable(Counter(w for text in texts for w in split_words(text, pattern)))
    merges: list[Pair] = []
    while len(merges) < vocab_size - 257 and (pair := table.most_frequent()):
        table.merge(pair)
        merges.append(pair)
    return merges


class PairTable:
    """The pairs of neighbouring tokens in counted words, kept right through merges."""

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.words = [[bytes([byte]) for byte in word] for word in word_counts]
        self.weights = list(word_counts.values())
        self.counts: Counter[Pair] = Counter()
        self.where: dict[Pair, set[int]] = defaultdict(set)  # word numbers
        self.heap: list[tuple[int, Pair]] = []
        self.push(pair for i in range(len(self.words)) for pair in self.count(i, +1))

    def count(self, i: int, sign: int) -> list[Pair]:
        """Add (+1) or take away (-1) the pairs of word i; returns them."""
        pairs = list(zip(self.words[i], self.words[i][1:]))
        for pair in pairs:
            self.counts[pair] += sign * self.weights[i]
            if sign > 0:
                self.where[pair].add(i)
        return pairs

    def push(self, pairs: Iterable[Pair]) -> None:
        """Put the present counts of pairs on the heap; older entries stay, outdated."""
        for pair in set(pairs):
            if self.counts[pair] > 1:
                heapq.heappush(self.heap, (-self.counts[pair], pair))

    def most_frequent(self) -> Pair | None:
        """The pair of highest count, of equals the smallest; None if none is twice."""
        while self.heap:
            negated, pair = heapq.heappop(self.heap)
            if self.counts[pair] == -negated:  # else the count has changed since
                return pair
        return None

    def merge(self, pair: Pair) -> None:
        """Join the pair everywhere; only words that hold it are looked at."""
        changed: list[Pair] = []
        for i in self.where.pop(pair):
            changed += self.count(i, -1)
            self.words[i] = merge_pair(self.words[i], pair)
            changed += self.count(i, +1)
        self.push(changed)


END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back: `ranks` numbers the tokens from 0, then end-of-text."""

    name: str
    ranks: dict[bytes, int] = field(repr=False, hash=False)
    pattern: str = field(default=GPT2_PATTERN, repr=False)

    @classmethod
    def from_merges(cls, merges: Iterable[Pair], name: str, **options) -> Self:
        """A tokenizer from the merges that `train_bpe` learned."""
        return cls(name, ranks_of(merges), **options)

    @property
    def end_of_text(self) -> int:
        """Id of the token that stands between documents."""
        return len(self.ranks)

    @property
    def start_of_text(self) -> int:
        """Id that a model reads first: here the same mark."""
        return self.end_of_text

    @property
    def n_vocab(self) -> int:
        """Number of ids that mean something, end-of-text included."""
        return len(self.ranks) + 1

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's object for the same vocabulary."""
        return tiktoken.Encoding(
            self.name,
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text. `END_OF_TEXT` in it is ordinary text, not the mark."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an array, (n,) uint16, or uint32 for more than 65,536 ids."""
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text, {text[error.start]!r}, is half "
                "of a character; use text.encode('utf-8', 'replace').decode()"
            ) from None
        except ValueError as error:
            raise TokenizerError(
                f"the split pattern gave up on {len(text):,} characters ({error}), as "
                "it does on very long white space; encode the text in pieces"
            ) from None
        return ids.astype(np.uint16 if self.n_vocab <= 2**16 else np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids (a sequence, array or tensor)."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise TokenizerError(
                    f"id {i} is not in the vocabulary of {self.name} (0 to "
                    f"{self.end_of_text}); draw from the first n_vocab logits only"
                )
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _content(self) -> dict:
        """All that decides the ids. Tokens as Latin-1: one character for each byte."""
        tokens = sorted(self.ranks, key=self.ranks.__getitem__)
        if [self.ranks[token] for token in tokens] != list(range(len(tokens))):
            raise TokenizerError(
                f"{self.name}: ranks have gaps; number the tokens from 0 upwards"
            )
        return {
            "pattern": self.pattern,
            "special": {END_OF_TEXT: self.end_of_text},
            "tokens": [token.decode("latin-1") for token in tokens],
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the ids: pattern, tokens, end-of-text."""
        text = json.dumps(self._content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON file, hash included; it appears whole or not at all."""
        stored = {"name": self.name, "hash": self.hash, **self._content}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), json.dumps(stored, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote. Raises TokenizerError if it is missing or altered."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            tokens = [token.encode("latin-1") for token in stored["tokens"]]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            tokenizer = cls(stored["name"], ranks, stored["pattern"])
            intact = tokenizer.hash == stored["hash"]
            intact &= stored["special"] == {END_OF_TEXT: tokenizer.end_of_text}
        except FileNotFoundError:
            raise TokenizerError(
                f"{path}: no such tokenizer file; make one with save()"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise TokenizerError(
                f"{path}: cut off, altered, or no tokenizer file; copy it again from "
                "where it was made, or delete it and train it anew"
            )
        return tokenizer


def load_tokenizer(
    name: str | os.PathLike,
    corpus: Corpus | str | None = None,
    *,
    timeout: float = 8.0,
) -> Tokenizer:
    """`gpt2`, `bpe-N`, or the path of a saved tokenizer.

    corpus: what `bpe-N` is trained on, once, and then cached; TinyWiki if not given.
    timeout: seconds to wait for GPT-2's vocabulary where it must be fetched. Raises
    TokenizerError for a name that is none of these, and for GPT-2 without a network.
    """
    name = str(name)
    if name == "gpt2":
        return _gpt2(timeout)
    if size := re.fullmatch(r"bpe-(\d+)", name):
        if not isinstance(corpus, Corpus):
            corpus = load_corpus(corpus or "tinywiki")
        return _trained(name, int(size[1]), corpus)
    if Path(name).is_file():
        return Tokenizer.load(name)
    raise TokenizerError(
        f"unknown tokenizer {name!r}: choose gpt2, bpe-2048 (or another bpe-N, N ids), "
        "or the path of a saved tokenizer.json"
    )


def _gpt2(timeout: float) -> Tokenizer:
    """GPT-2's vocabulary, by tiktoken, in a thread: its download has no time limit."""
    found: list[tiktoken.Encoding] = []

    def fetch() -> None:
        with contextlib.suppress(Exception):
            found.append(tiktoken.get_encoding("gpt2"))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        raise TokenizerError(
            f"gpt2: its vocabulary could not be fetched in {timeout:g} seconds; set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or use the book's bpe-2048"
        )
    return Tokenizer("gpt2", found[0]._mergeable_ranks)


TRAIN_CHARACTERS = 20_000_000  # of a larger corpus, `bpe-N` reads the beginning


def _trained(name: str, vocab_size: int, corpus: Corpus) -> Tokenizer:
    """`bpe-N` of a corpus, from the cache or trained now."""
    path = cache_dir() / "tokenizers" / f"{name}-{corpus.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            merges = train_bpe(_beginning(corpus, TRAIN_CHARACTERS), vocab_size)
            if len(merges) < vocab_size - 257:
                raise TokenizerError(
                    f"{name}: the text of {corpus.name} supports only "
                    f"bpe-{len(merges) + 257}; choose that, or a larger corpus"
                )
            Tokenizer.from_merges(merges, name).save(path)
    return Tokenizer.load(path)


def _beginning(corpus: Corpus, characters: int) -> Iterator[str]:
    """Training text, piece by piece, until so many characters are reached."""
    for piece in corpus.pieces("train"):
        if characters <= 0:
            return
        yield piece.text
        characters -= len(piece.text)
