"""From a file of tokens to batches.

Tangled from book/chapters/03_batches.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gptlib.corpus import Corpus, Piece, cache_dir, load_corpus
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.checkpoints import one_at_a_time
from gptlib.workshop.tinywiki import fingerprint


def crops(
    ids: np.ndarray, offsets: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (B, T) int64: the targets are the inputs shifted by one."""
    window = np.stack([ids[o : o + block_size + 1] for o in offsets]).astype(np.int64)
    tokens = torch.from_numpy(window)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TokenFileError(ValueError):
    """A token file that is missing, damaged or of another tokenizer; the message says how to mend it."""


class SplitWriter:
    """Writes one split as little-endian uint16 ids; counts and hashes what it writes.

    Raises TokenFileError for a vocabulary of more than 65,536 ids.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer):
        if tokenizer.n_vocab > 2**16:
            raise TokenFileError(
                f"{tokenizer.n_vocab} ids do not fit in 16 bits; use a vocabulary of at most 65,536"
            )
        self.file, self.mark = (
            path.open("wb"),
            np.array([tokenizer.end_of_text], np.uint16),
        )
        self.tokens = self.documents = self.lines = self.text_bytes = 0
        self.token_hash, self.text_hash = hashlib.sha256(), hashlib.sha256()

    def write(self, ids: np.ndarray) -> None:
        data = ids.astype("<u2", copy=False).tobytes()
        self.file.write(data)
        self.token_hash.update(data)
        self.tokens += len(ids)

    def add(self, piece: Piece, text: bytes, ids: np.ndarray) -> None:
        """A piece of a document; an end-of-text mark goes before each document."""
        if piece.starts:
            self.write(self.mark)
            self.documents += 1
        self.write(ids)
        self.text_hash.update(text)
        self.text_bytes += len(text)
        self.lines += piece.lines

    def close(self) -> dict:
        """One last mark, so that the end of the last document can be predicted too; then the record."""
        self.write(self.mark)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "lines": self.lines,
            "text_bytes": self.text_bytes,
            "sha256": self.token_hash.hexdigest(),
            "text_sha256": self.text_hash.hexdigest(),
        }


def grouped(pieces: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, at least `characters` long, so that short ones cost little each."""
    group, held = [], 0
    for piece in pieces:
        group.append(piece)
        held += len(piece.text)
        if held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def encoded(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    *,
    threads: int,
    group: int = 2**16,
    ahead: int = 2**24,
) -> Iterator[tuple[Piece, bytes, np.ndarray]]:
    """(piece, its UTF-8 bytes, its ids), in order; tiktoken's threads work while the caller writes.

    group: characters that go to a thread at once; ahead: characters read and not yet yielded, at
    most, unless a single piece is longer. Bounds the memory whatever the corpus.
    """

    def encode(pieces: list[Piece]):
        ids = [tokenizer.encode_array(piece.text) for piece in pieces]
        return [
            (p, p.text.encode("utf-8"), i) for p, i in zip(pieces, ids, strict=True)
        ]

    waiting: deque = deque()  # (what a thread works on, its characters), oldest first
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        for pieces_together in grouped(pieces, group):
            size = sum(len(piece.text) for piece in pieces_together)
            while waiting and (len(waiting) >= 4 * threads or held + size > ahead):
                oldest, n = waiting.popleft()
                yield from oldest.result()
                held -= n
            waiting.append((pool.submit(encode, pieces_together), size))
            held += size
        while waiting:
            yield from waiting.popleft()[0].result()


def write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, path: Path, progress: bool
) -> dict:
    """Tokenise one split into a file; returns its record."""
    writer = SplitWriter(path, tokenizer)
    stream = encoded(corpus.pieces(split), tokenizer, threads=os.cpu_count() or 1)
    with tqdm(
        unit="B", unit_scale=True, desc=f"tokens of {split}", disable=not progress
    ) as bar:
        for piece, text, ids in stream:
            writer.add(piece, text, ids)
            bar.update(len(text))
    return writer.close()


def prepare_tokens(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, progress: bool = False
) -> Path:
    """Tokenise every split of a corpus into `folder/SPLIT.bin`, with `folder/manifest.json`.

    The folder appears whole or not at all: it is written under another name and renamed.
    Raises what reading the corpus raises; then nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    replaced = scratch.with_name(scratch.name + ".replaced")
    try:
        manifest = {
            "corpus": corpus.name,
            "tokenizer": tokenizer.name,
            "tokenizer_hash": tokenizer.hash,
            "n_vocab": tokenizer.n_vocab,
            "end_of_text": tokenizer.end_of_text,
            "splits": {
                split: write_split(
                    corpus, split, tokenizer, scratch / f"{split}.bin", progress
                )
                for split in corpus.splits
            },
        }
        (scratch / "manifest.json").write_text(
            json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
        )
        if folder.exists():  # moved away whole, so that no reader ever sees half of it
            os.replace(folder, replaced)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class TokenSplit:
    """One split of a token file: `ids` is a memory map of uint16, `record` its line of the manifest."""

    ids: np.ndarray
    record: dict
    end_of_text: int

    def __len__(self) -> int:
        return len(self.ids)

    def documents(self) -> Iterator[np.ndarray]:
        """Ids of each document, with the mark before it and the mark after it."""
        marks = np.flatnonzero(self.ids == self.end_of_text)
        for start, stop in zip(marks[:-1], marks[1:], strict=True):
            yield self.ids[start : stop + 1]


@dataclass(frozen=True)
class TokenFile:
    """A folder made by `prepare_tokens`."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer | None = None) -> "TokenFile":
        """Raises TokenFileError if it is not there, or is another tokenizer's."""
        folder = Path(folder)
        try:
            manifest = json.loads(
                (folder / "manifest.json").read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            raise TokenFileError(
                f"{folder}: no manifest.json there; make it with prepare_tokens"
            ) from None
        except json.JSONDecodeError:
            raise TokenFileError(
                f"{folder}: manifest.json is damaged; delete the folder, it will be made again"
            ) from None
        if tokenizer is not None and manifest["tokenizer_hash"] != tokenizer.hash:
            raise TokenFileError(
                f"{folder}: its ids are of tokenizer {manifest['tokenizer']!r}, not of this {tokenizer.name!r} "
                f"({manifest['tokenizer_hash'][:8]} is not {tokenizer.hash[:8]}); tokenize the corpus again"
            )
        return cls(folder, manifest)

    def split(self, name: str, *, verify: bool = True) -> TokenSplit:
        """A split as a memory map. `verify` reads it once and compares its SHA-256 with the manifest's."""
        if name not in self.manifest["splits"]:
            raise TokenFileError(
                f"{self.folder}: no split {name!r}; it has {', '.join(self.manifest['splits'])}"
            )
        record, path = self.manifest["splits"][name], self.folder / f"{name}.bin"
        size = path.stat().st_size if path.exists() else 0
        if size != 2 * record["tokens"]:
            raise TokenFileError(
                f"{path}: {size} bytes where {2 * record['tokens']} belong; delete {self.folder}, it will be made again"
            )
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    raise TokenFileError(
                        f"{path}: altered since it was written (SHA-256 differs); delete {self.folder}, it will be made again"
                    )
        return TokenSplit(
            np.memmap(path, "<u2", "r"), record, self.manifest["end_of_text"]
        )


def corpus_key(name: str) -> str:
    """A folder name for a corpus: readable, and different for different files behind one name."""
    seen = [name]
    if name == "tinywiki":  # its text is its program
        seen.append(fingerprint())
    for place in (
        Path(name.partition(":")[0]),
        Path(os.environ.get("GPTLIB_DATA", ".")) / name.partition(":")[0],
    ):
        files = (
            [place]
            if place.is_file()
            else sorted(p for p in place.rglob("*") if p.is_file())
            if place.is_dir()
            else []
        )
        if files:
            seen += [
                f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files
            ]
            break
    readable = "".join(c if c.isalnum() else "-" for c in Path(name).name)[-40:]
    return f"{readable}-{hashlib.sha256('|'.join(seen).encode()).hexdigest()[:8]}"


def load_tokens(
    corpus: str, tokenizer: Tokenizer, *, progress: bool = False
) -> TokenFile:
    """Tokens of a corpus by name, from the cache or made now. Raises CorpusError, TokenFileError."""
    folder = cache_dir() / "tokens" / f"{corpus_key(corpus)}-{tokenizer.hash[:8]}"
    if not (folder / "manifest.json").exists():
        with one_at_a_time(folder.with_name(folder.name + ".lock")):
            if not (
                folder / "manifest.json"
            ).exists():  # another process may have made it meanwhile
                for leftover in folder.parent.glob(
                    folder.name + ".[0-9]*"
                ):  # of one that was killed
                    shutil.rmtree(leftover)
                prepare_tokens(
                    load_corpus(corpus), tokenizer, folder, progress=progress
                )
    return TokenFile.open(folder, tokenizer)


def crop_offsets(seed: int, step: int, n: int, positions: int) -> np.ndarray:
    """`n` offsets in [0, positions): a pure function of (seed, step), equal on every machine.

    Philox is a counter-based generator: key in, bits out, no state to keep (Salmon et al. 2011).
    Only its raw bits are used, since NumPy may change how its methods use them. Raises ValueError
    for more than 2**32 positions.
    """
    if positions > 2**32:
        raise ValueError(
            f"{positions} positions are more than 2**32; split the token file"
        )
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(n)
    return ((bits >> np.uint64(32)) * np.uint64(positions) >> np.uint64(32)).astype(
        np.int64
    )


@dataclass(frozen=True)
class Batches:
    """Training batches: batch `step` depends on (seed, step) alone.

    ids: the token stream; batch_size: sequences of a whole step; block_size: tokens of a sequence.
    """

    ids: np.ndarray
    batch_size: int
    block_size: int
    seed: int

    def __post_init__(self):
        if len(self.ids) <= self.block_size:
            raise ValueError(
                f"{len(self.ids)} tokens are too few for one block of {self.block_size} and its target; "
                "use a longer corpus or a smaller block_size"
            )

    def offsets(self, step: int) -> np.ndarray:
        """Where the crops of a step begin, (batch_size,) int64."""
        return crop_offsets(
            self.seed, step, self.batch_size, len(self.ids) - self.block_size
        )

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ):
        """The step's crops in groups of `micro_batch_size`, those of this rank: groups rank, rank + world_size, ..."""
        offsets = self.offsets(step)
        for start in range(
            rank * micro_batch_size, self.batch_size, world_size * micro_batch_size
        ):
            yield crops(
                self.ids, offsets[start : start + micro_batch_size], self.block_size
            )


def to_device(pairs, device: torch.device):
    """Move (inputs, targets) to a device, one pair ahead of its use.

    On CUDA the copy is from pinned memory and does not wait, so it overlaps with the computation.
    """

    def moved(pair):
        if device.type == "cuda":
            pair = tuple(t.pin_memory() for t in pair)
        return tuple(t.to(device, non_blocking=True) for t in pair)

    ahead = None
    for pair in pairs:
        following = moved(pair)
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead
