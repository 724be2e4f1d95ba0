"""A tokenizer as a file: tokenizer.json.

Tangled from book/workshop/W18_tokenizer_json.md; change it there, not here.
"""

from __future__ import annotations

import json
from pathlib import Path

from gptlib import GptlibError
from gptlib.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: its own, or else one from 256 on.

    Source: `bytes_to_unicode` of openai/gpt-2, encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


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


def to_fast_tokenizer(tokenizer: Tokenizer, block_size: int):
    """A `transformers.PreTrainedTokenizerFast` that gives the same ids on all text.

    By transformers' custom the words `<|endoftext|>` in a text become the mark; with
    `split_special_tokens=True` they are ordinary text, as `Tokenizer.encode` has them.
    block_size: the longest text of a model, in tokens. Raises ExchangeError for another
    split pattern than GPT-2's.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    if tokenizer.pattern != GPT2_PATTERN:
        raise ExchangeError(
            f"tokenizer {tokenizer.name!r} does not split text as GPT-2 does; it "
            "cannot be exported"
        )
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    vocabulary[END_OF_TEXT] = tokenizer.end_of_text
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks)]
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
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}

    def read(token: str) -> bytes:
        return bytes(bytes_of[letter] for letter in token)

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
