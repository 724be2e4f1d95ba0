"""A tokenizer as a file: tokenizer.json.

Tangled from book/workshop/W18_tokenizer_json.md; change it there, not here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from gptlib import GptlibError
from gptlib.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, TokenizerError


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: its own, or else one from 256 on.

    Source: `bytes_to_unicode` of openai/gpt-2, encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def letter_bytes() -> dict[str, int]:
    """The inverse of `byte_letters`."""
    return {letter: byte for byte, letter in byte_letters().items()}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a table of ranks: each token's two halves.

    They are found by encoding the token with the ranks before its own.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


class ExchangeError(GptlibError):
    """What cannot be exported or imported; names the key, the feature or the file."""


def in_letters(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens by id, the mark last, and the merges, in GPT-2's letters.

    Raises ExchangeError for another split pattern than GPT-2's.
    """
    if tokenizer.pattern != GPT2_PATTERN:
        raise ExchangeError(
            f"tokenizer {tokenizer.name!r} does not split text as GPT-2 does; it "
            "cannot be exported"
        )
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks)]
    return [*map(spell, tokens), END_OF_TEXT], merges


def to_fast_tokenizer(tokenizer: Tokenizer, block_size: int):
    """A `transformers.PreTrainedTokenizerFast` that gives the same ids on all text.

    By transformers' custom the words `<|endoftext|>` in a text become the mark; with
    `split_special_tokens=True` they are ordinary text, as `Tokenizer.encode` has them.
    block_size: the longest text of a model, in tokens. Raises ExchangeError.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    tokens, merges = in_letters(tokenizer)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ExchangeError, which names a damaged file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise ExchangeError(f"{path.name}: damaged (no JSON); fetch or export it again")


def from_tokenizer_json(path: Path, name: str) -> Tokenizer:
    """The byte-level BPE of a `tokenizer.json` as one of ours.

    Raises ExchangeError if it is of another kind.
    """
    stored = read_json(path)
    bpe, cut = stored.get("model") or {}, stored.get("pre_tokenizer") or {}

    def refuse(reason: str):
        return ExchangeError(f"{path.name}: {reason}; it cannot be imported")

    if bpe.get("type") != "BPE":
        raise refuse(f"a {bpe.get('type')} tokenizer, not a byte-level BPE")
    byte_level = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    if not byte_level or cut.get("add_prefix_space") or stored.get("normalizer"):
        raise refuse(
            f"it does not split text as GPT-2 does (pre_tokenizer {cut.get('type')})"
        )
    special = {t["content"]: t["id"] for t in stored.get("added_tokens", [])}
    unknown = sorted(set(special) - {END_OF_TEXT})
    if unknown:
        raise refuse(f"added tokens {', '.join(unknown)} beside {END_OF_TEXT}")

    def read(token: str) -> bytes:
        return bytes(letter_bytes()[letter] for letter in token)

    try:
        vocabulary = bpe.get("vocab", {}).items()
        ranks = {read(token): i for token, i in vocabulary if token not in special}
        pairs = [
            p.split(" ") if isinstance(p, str) else p for p in bpe.get("merges", [])
        ]
        merges = [(read(a), read(b)) for a, b in pairs]
    except KeyError as error:
        raise refuse(f"{error} is no byte-level letter") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or merges_of(ranks) != merges:
        raise refuse("ids do not count the merges, as GPT-2's do")
    if special.get(END_OF_TEXT) != len(ranks):
        found = special.get(END_OF_TEXT)
        raise refuse(f"{END_OF_TEXT} has id {found}, not {len(ranks)}, the next")
    return Tokenizer(name=name, ranks=ranks, pattern=GPT2_PATTERN)


def kind_of(stored: dict) -> str:
    """How a tokenizer.json spells bytes: `letters` as GPT-2, or `pieces` with `▁`.

    Raises ExchangeError for another kind.
    """
    model = (stored.get("model") or {}).get("type")
    decoder = json.dumps(stored.get("decoder"))
    if model == "BPE" and '"ByteLevel"' in decoder:
        return "letters"
    if model in ("BPE", "Unigram") and "\\u2581" in decoder:
        return "pieces"
    raise ExchangeError(
        f"tokenizer.json: a {model} tokenizer of an unknown kind; there are byte-level "
        "BPE and those that mark a space by U+2581"
    )


def bytes_of_token(token: str, kind: str) -> bytes:
    """The bytes that an ordinary token of a `kind_of` tokenizer stands for."""
    if kind == "letters":
        return bytes(letter_bytes()[letter] for letter in token)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


@dataclass(frozen=True)
class ForeignTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, with the methods of ours.

    text: its whole tokenizer.json. start, end: ids of the marks around a text.
    """

    text: str = field(default="", repr=False)
    start: int = 0
    end: int = 0

    @classmethod
    def from_text(cls, text: str, name: str, start: int, end: int) -> Self:
        """Raises ExchangeError if the file is damaged or of an unknown kind."""
        try:
            tokenizer = cls(name, {}, "", text, start, end)
            marks = {t["id"] for t in json.loads(text).get("added_tokens", [])}
            ordinary = {i: b for i, b in tokenizer.pieces.items() if i not in marks}
        except ExchangeError:
            raise
        except Exception as error:  # whatever its reader raises for a damaged file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ExchangeError(
                f"{name}: tokenizer.json cannot be read ({reason[:80]}); fetch it again"
            ) from None
        ranks = {token: i for i, token in ordinary.items()}
        return cls(name, ranks, "", text, start, end)

    @functools.cached_property
    def fast(self) -> Any:
        """The `tokenizers.Tokenizer`. Marks in a text are ordinary text."""
        from tokenizers import Tokenizer as FastTokenizer

        fast = FastTokenizer.from_str(self.text)
        fast.encode_special_tokens = True
        fast.no_truncation()
        fast.no_padding()
        return fast

    @property
    def end_of_text(self) -> int:
        return self.end

    @property
    def start_of_text(self) -> int:
        return self.start

    def to_fast(self, block_size: int):
        """The same as a `transformers.PreTrainedTokenizerFast`."""
        from tokenizers import Tokenizer as FastTokenizer
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=FastTokenizer.from_str(self.text),
            bos_token=self.fast.id_to_token(self.start),
            eos_token=self.fast.id_to_token(self.end),
            model_max_length=block_size,
            clean_up_tokenization_spaces=False,
        )

    @functools.cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes of each id, marks included."""
        stored = json.loads(self.text)
        kind, added = kind_of(stored), stored.get("added_tokens", [])
        marks = {t["id"]: t["content"].encode() for t in added}
        vocabulary = self.fast.get_vocab(with_added_tokens=True).items()
        return marks | {
            i: bytes_of_token(token, kind) for token, i in vocabulary if i not in marks
        }

    @property
    def n_vocab(self) -> int:
        return max(self.pieces) + 1

    def encode_array(self, text: str) -> np.ndarray:
        try:
            ids = self.fast.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise TokenizerError(
                "the text holds half of a character; use "
                "text.encode('utf-8', 'replace').decode()"
            ) from None
        return np.array(ids, np.uint16 if self.n_vocab <= 2**16 else np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        try:
            return b"".join(self.pieces[int(i)] for i in ids)
        except KeyError as error:
            raise TokenizerError(
                f"id {error} is not in the vocabulary of {self.name}"
            ) from None

    @functools.cached_property
    def _content(self) -> dict:
        return {"tokenizers": self.text, "start": self.start, "end": self.end}

    @classmethod
    def from_stored(cls, stored: dict) -> Self:
        """What `save` wrote. Raises TokenizerError if it was altered."""
        try:
            names = ("tokenizers", "name", "start", "end")
            tokenizer = cls.from_text(*(stored[name] for name in names))
            intact = tokenizer.hash == stored["hash"]
        except (KeyError, ExchangeError):
            intact = False
        if not intact:
            raise TokenizerError(
                "tokenizer.json: cut off or altered; copy it again from where it was "
                "made"
            )
        return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that `save` wrote, ours or foreign. Raises TokenizerError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        foreign = isinstance(stored, dict) and "tokenizers" in stored
    except (OSError, ValueError):
        foreign = False
    return ForeignTokenizer.from_stored(stored) if foreign else Tokenizer.load(path)


def mark_of(settings: dict, key: str, fast: Any) -> int | None:
    """The id of `bos_token` or `eos_token` in a tokenizer_config.json, or None."""
    token = settings.get(key)
    name = token.get("content") if isinstance(token, dict) else token
    return fast.token_to_id(name) if isinstance(name, str) else None


def foreign_tokenizer(text: str, name: str, settings: dict, model: dict) -> Tokenizer:
    """The tokenizer of a model's folder.

    text: its tokenizer.json. settings: its tokenizer_config.json. model: its
    config.json, whose marks count where the settings name none. Raises ExchangeError.
    """
    tokenizer = ForeignTokenizer.from_text(text, name, 0, 0)
    marks = []
    for key in ("bos_token", "eos_token"):
        found = mark_of(settings, key, tokenizer.fast)
        if found is None:
            found = model.get(f"{key}_id")
        marks.append(found[0] if isinstance(found, list) else found)
    start, end = marks
    if end is None:
        raise ExchangeError(f"{name}: no eos_token, so no text would end; name one")
    return replace(tokenizer, start=end if start is None else start, end=end)
