"""Text as numbers: a byte-level BPE tokenizer.

Tangled from book/chapters/02_tokenizer.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import queue
import re
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import regex
import tiktoken

from gptlib.corpus import cache_dir
from gptlib.workshop.tinywiki import TinyWiki, fingerprint


GPT2_ALTERNATIVES = (
    r"'(?:[sdmt]|ll|ve|re)",  # English endings after an apostrophe
    r" ?\p{L}++",  # letters, with at most one space before them
    r" ?\p{N}++",  # digits and other numbers, likewise
    r" ?[^\s\p{L}\p{N}]++",  # everything else that can be seen, likewise
    r"\s++$",  # white space at the end of the text
    r"\s+(?!\S)",  # a run of white space, without its last character ...
    r"\s",  # ... which is left for the word that follows, or stands alone
)
GPT2_PATTERN = "|".join(GPT2_ALTERNATIVES)


def split_words(text: str, pattern: str = GPT2_PATTERN) -> list[bytes]:
    """Cut text into the UTF-8 bytes of "words" that no token may cross. Nothing is lost."""
    return [word.encode() for word in regex.findall(pattern, text)]


Pair = tuple[bytes, bytes]


def merge_pair(word: list[bytes], pair: Pair) -> list[bytes]:
    """The word with every occurrence of `pair`, from the left, joined into one token."""
    left, right = pair
    merged: list[bytes] = []
    i = 0
    while i < len(word):
        if word[i] == left and i + 1 < len(word) and word[i + 1] == right:
            merged.append(left + right)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class PairTable:
    """The pairs of neighbouring tokens in counted words, kept right while pairs are merged."""

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.words = [[bytes([byte]) for byte in word] for word in word_counts]
        self.weights = list(word_counts.values())
        self.counts: Counter[Pair] = Counter()
        self.where: dict[Pair, set[int]] = defaultdict(
            set
        )  # words that hold a pair, or once did
        self.heap: list[tuple[int, Pair]] = []
        changed = [
            pair for index in range(len(self.words)) for pair in self.count(index, +1)
        ]
        self.push(set(changed))

    def count(self, index: int, sign: int) -> list[Pair]:
        """Add (+1) or take away (-1) the pairs of one word; returns them."""
        word = self.words[index]
        pairs = list(zip(word, word[1:]))
        for pair in pairs:
            self.counts[pair] += sign * self.weights[index]
            if sign > 0:
                self.where[pair].add(index)
        return pairs

    def push(self, pairs: set[Pair]) -> None:
        for pair in pairs:
            if self.counts[pair] > 1:
                heapq.heappush(self.heap, (-self.counts[pair], pair))

    def most_frequent(self) -> Pair | None:
        """The pair with the highest count, of equals the smallest; None if no pair occurs twice."""
        while self.heap:
            negated, pair = heapq.heappop(self.heap)
            if (
                self.counts[pair] == -negated
            ):  # else an old entry: the count has changed since
                return pair
        return None

    def merge(self, pair: Pair) -> None:
        """Join the pair wherever it stands; only the words that hold it are looked at."""
        changed: set[Pair] = set()
        for index in self.where.pop(pair):
            changed.update(self.count(index, -1))
            self.words[index] = merge_pair(self.words[index], pair)
            changed.update(self.count(index, +1))
        self.push(changed)


END_OF_TEXT = "<|endoftext|>"


class TokenizerError(ValueError):
    """A tokenizer that cannot be had, or input it cannot take; the message names the cure."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, pattern: str = GPT2_PATTERN
) -> list[Pair]:
    """Learn merges for a vocabulary of `vocab_size` ids: 256 bytes, the merges, end-of-text.

    Each step joins the pair that occurs most often within words; of equals, the one whose
    (left, right) bytes sort first. Stops early when no pair occurs twice. Sennrich et al. (2016),
    section 3.2, on bytes as in Radford et al. (2019), section 2.2.
    """
    if vocab_size < 257:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: 256 bytes and end-of-text need 257 ids"
        )
    table = PairTable(
        Counter(word for text in texts for word in split_words(text, pattern))
    )
    merges: list[Pair] = []
    while len(merges) < vocab_size - 257 and (pair := table.most_frequent()):
        table.merge(pair)
        merges.append(pair)
    return merges


def ranks_of(merges: Iterable[Pair]) -> dict[bytes, int]:
    """Token -> id: the 256 bytes in byte order, then each merge in the order it was learned."""
    tokens = [bytes([byte]) for byte in range(256)] + [
        left + right for left, right in merges
    ]
    return {token: rank for rank, token in enumerate(tokens)}


def encode_word(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of one word: join the neighbours of lowest rank, leftmost first, until none is left.

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
    return [
        token
        for word in split_words(text, pattern)
        for token in encode_word(word, ranks)
    ]


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: `ranks` numbers the tokens from 0, end-of-text comes after."""

    name: str
    ranks: dict[bytes, int] = field(repr=False, hash=False)
    pattern: str = field(default=GPT2_PATTERN, repr=False)

    @classmethod
    def from_merges(cls, merges: Iterable[Pair], name: str, **options) -> "Tokenizer":
        """A tokenizer from the merges that `train_bpe` learned."""
        return cls(name, ranks_of(merges), **options)

    @property
    def end_of_text(self) -> int:
        """Id of the token that stands between documents."""
        return len(self.ranks)

    @property
    def n_vocab(self) -> int:
        """Number of ids that mean something, end-of-text included."""
        return len(self.ranks) + 1

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's object for the same vocabulary; its batch encoder uses threads."""
        rules = {"pat_str": self.pattern, "mergeable_ranks": self.ranks}
        return tiktoken.Encoding(
            self.name, special_tokens={END_OF_TEXT: self.end_of_text}, **rules
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the ids: pattern, tokens in order, end-of-text. Not the name."""
        return hashlib.sha256(
            json.dumps(_content(self), sort_keys=True).encode()
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. `END_OF_TEXT` inside it is ordinary text, never the special token."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an array, (n,) uint16, or uint32 for more than 65,536 ids."""
        return _encode(self, text).astype(
            np.uint16 if self.n_vocab <= 2**16 else np.uint32
        )

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids (a sequence, array or tensor); TokenizerError for an id of no token."""
        return self.encoding.decode_bytes(_checked(self, ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON file, hash included; it appears whole or not at all."""
        _write(Path(path), {"name": self.name, "hash": self.hash, **_content(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote. Raises TokenizerError if it is missing, cut off or altered."""
        return _read(Path(path))


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """tiktoken's ids, (n,) uint32, its failures as TokenizerError."""
    try:
        return tokenizer.encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a character; "
            "clean the text with text.encode('utf-8', 'replace').decode()"
        ) from None
    except ValueError as error:
        raise TokenizerError(
            f"the split pattern gave up on a text of {len(text):,} characters ({error}), as it does "
            "on white space hundreds of thousands of characters long; encode it in pieces"
        ) from None


def _checked(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids as ints, or a TokenizerError that names the first that is no token's."""
    ids = [int(token) for token in ids]
    for token in ids:
        if not 0 <= token < tokenizer.n_vocab:
            raise TokenizerError(
                f"id {token} is not in the vocabulary of {tokenizer.name} (0 to "
                f"{tokenizer.end_of_text}); rows that pad an embedding mean nothing, so draw "
                "from the first n_vocab logits only"
            )
    return ids


def _content(tokenizer: Tokenizer) -> dict:
    """All that decides the ids. Tokens as Latin-1, which gives every byte a character."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    if list(map(tokenizer.ranks.get, tokens)) != list(range(len(tokens))):
        raise TokenizerError(
            f"{tokenizer.name}: ranks have gaps; number the tokens from 0 upwards"
        )
    return {
        "pattern": tokenizer.pattern,
        "special": {END_OF_TEXT: tokenizer.end_of_text},
        "tokens": [token.decode("latin-1") for token in tokens],
    }


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path) -> Tokenizer:
    cure = "copy it again from where it was made, or delete it and train it anew"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        ranks = {
            token.encode("latin-1"): rank for rank, token in enumerate(stored["tokens"])
        }
        tokenizer = Tokenizer(stored["name"], ranks, stored["pattern"])
        intact = tokenizer.hash == stored["hash"]
        intact = intact and stored["special"] == {END_OF_TEXT: tokenizer.end_of_text}
    except FileNotFoundError:
        raise TokenizerError(
            f"{path}: no such tokenizer file; make one with save()"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(f"{path}: cut off, or no tokenizer file; {cure}") from None
    if not intact:
        raise TokenizerError(
            f"{path}: altered since it was saved (its hash differs); {cure}"
        )
    return tokenizer


def load_tokenizer(
    name_or_path: str | os.PathLike, *, timeout: float = 8.0
) -> Tokenizer:
    """`gpt2`, `bpe-N` (trained once on TinyWiki, then cached), or the path of a saved tokenizer.

    timeout: seconds to wait for GPT-2's vocabulary where it must be fetched. Raises
    TokenizerError for a name that is none of these, and for GPT-2 without a network.
    """
    name = str(name_or_path)
    if name == "gpt2":
        return _gpt2(timeout)
    if size := re.fullmatch(r"bpe-(\d+)", name):
        return _trained_on_tinywiki(name, int(size[1]))
    if Path(name).is_file():
        return Tokenizer.load(name)
    raise TokenizerError(
        f"unknown tokenizer {name!r}: choose gpt2, bpe-2048 (or another bpe-N, N ids), "
        "or the path of a saved tokenizer.json"
    )


def _gpt2(timeout: float) -> Tokenizer:
    """GPT-2's vocabulary through tiktoken, in a thread, since its download has no time limit."""
    arrived: queue.SimpleQueue = queue.SimpleQueue()

    def fetch() -> None:
        try:
            arrived.put(tiktoken.get_encoding("gpt2"))
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        encoding = arrived.get(timeout=timeout)
    except queue.Empty:
        encoding = TimeoutError(f"no answer in {timeout:g} seconds")
    if isinstance(encoding, Exception):
        raise TokenizerError(
            f"gpt2: its vocabulary cannot be fetched ({type(encoding).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or use the book's own bpe-2048"
        ) from encoding
    return Tokenizer("gpt2", encoding._mergeable_ranks, GPT2_PATTERN)


def _trained_on_tinywiki(name: str, vocab_size: int) -> Tokenizer:
    made_by = (fingerprint() + GPT2_PATTERN).encode()
    key = hashlib.sha256(made_by).hexdigest()[
        :12
    ]  # another TinyWiki is another tokenizer
    path = cache_dir() / "tokenizers" / f"{name}-{key}.json"
    if not path.exists():
        merges = train_bpe(
            (a.text for a in TinyWiki(seed=0).articles("train")), vocab_size
        )
        if len(merges) < vocab_size - 257:
            raise TokenizerError(
                f"{name}: TinyWiki supports only bpe-{len(merges) + 257}"
            )
        Tokenizer.from_merges(merges, name).save(path)
    return Tokenizer.load(path)


def padded_vocab_size(n_vocab: int, multiple: int = 64) -> int:
    """The next multiple at or above `n_vocab`: 50,257 -> 50,304 (report, section 3.1)."""
    return -(-n_vocab // multiple) * multiple
