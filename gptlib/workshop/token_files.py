"""A corpus as a file of tokens.

Tangled from book/workshop/W2_token_files.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from gptlib import GptlibError
from gptlib.corpus import Corpus, Piece, load_corpus
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.files import cache_dir, lock, write_whole


class TokenFileError(GptlibError):
    """A token file that is missing, damaged, or of another tokenizer."""


def group_pieces(pieces: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, at least `characters` long, but for the last."""
    group, held = [], 0
    for piece in pieces:
        group.append(piece)
        held += len(piece.text)
        if held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def encode_pieces(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    *,
    threads: int,
    group: int = 2**16,
    ahead: int = 2**24,
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its ids, in order, encoded by threads while the caller writes.

    group: characters that a thread gets at once; ahead: characters read and not yet
    given out, at most, unless a single group is longer. This bounds the memory.
    """

    def encode(together: list[Piece]) -> list[tuple[Piece, np.ndarray]]:
        return [(piece, tokenizer.encode_array(piece.text)) for piece in together]

    waiting: deque = deque()  # (what a thread works on, its characters), oldest first
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        for together in group_pieces(pieces, group):
            size = sum(len(piece.text) for piece in together)
            while waiting and (len(waiting) >= 4 * threads or held + size > ahead):
                oldest, its_size = waiting.popleft()
                yield from oldest.result()
                held -= its_size
            waiting.append((pool.submit(encode, together), size))
            held += size
        while waiting:
            yield from waiting.popleft()[0].result()


def id_type(n_vocab: int) -> np.dtype:
    """Of the ids in a file: little-endian, 16 bits for up to 65,536 ids, else 32."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, path: Path, progress: bool = False
) -> dict:
    """One split as ids of `id_type`; returns its record for the manifest.

    The mark that begins a text stands before each document and after the last one.
    """
    kind = id_type(tokenizer.n_vocab)
    mark = np.array([tokenizer.start_of_text], kind).tobytes()
    record: dict[str, Any] = {"tokens": 1, "documents": 0, "lines": 0, "text_bytes": 0}
    text_hash = hashlib.sha256()

    def write(file) -> None:
        stream = encode_pieces(
            corpus.pieces(split), tokenizer, threads=os.cpu_count() or 1
        )
        bar = tqdm(unit="B", unit_scale=True, desc=split, disable=not progress)
        for piece, ids in stream:
            text = piece.text.encode("utf-8")
            file.write(mark * piece.starts + ids.astype(kind).tobytes())
            record["tokens"] += piece.starts + len(ids)
            record["documents"] += piece.starts
            record["lines"] += piece.lines
            record["text_bytes"] += len(text)
            text_hash.update(text)
            bar.update(len(text))
        bar.close()
        file.write(mark)

    record["sha256"] = write_whole(path, write)
    record["text_sha256"] = text_hash.hexdigest()
    record["mtime_ns"] = path.stat().st_mtime_ns
    return record


def write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, *, progress: bool = False
) -> "TokenFile":
    """Tokenise every split of a corpus into `folder/SPLIT.bin`, with a manifest.

    The folder appears whole or not at all: it is written under another name and
    renamed. Raises what reading the corpus raises; then nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise TokenFileError(f"{folder} exists already; delete it, or choose another")
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        records = {
            split: write_split(
                corpus, split, tokenizer, scratch / f"{split}.bin", progress
            )
            for split in corpus.splits
        }
        manifest = {
            "corpus": corpus.name,
            "held_out": corpus.held_out,
            "tokenizer": tokenizer.name,
            "tokenizer_hash": tokenizer.hash,
            "n_vocab": tokenizer.n_vocab,
            "end_of_text": tokenizer.start_of_text,  # the mark between documents
            "splits": records,
        }
        write_whole(scratch / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TokenFile.open(folder, tokenizer)


@dataclass(frozen=True)
class TokenSplit:
    """One split: `ids` is a memory map, `record` its part of the manifest."""

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
    """A folder made by `write_tokens`."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer | None = None) -> Self:
        """Raises TokenFileError if it is not there, or is another tokenizer's."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            name, its_hash = manifest["tokenizer"], manifest["tokenizer_hash"]
        except FileNotFoundError:
            raise TokenFileError(
                f"{folder}: no manifest.json there; make it with write_tokens"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise TokenFileError(
                f"{folder}: manifest.json is damaged; delete the folder, it will be "
                "made again"
            ) from None
        if tokenizer is not None and its_hash != tokenizer.hash:
            raise TokenFileError(
                f"{folder}: its ids are of tokenizer {name!r} ({its_hash[:8]}), not of "
                f"this {tokenizer.name!r} ({tokenizer.hash[:8]}); tokenize the corpus "
                "again"
            )
        return cls(folder, manifest)

    def split(self, name: str, *, verify: bool = False) -> TokenSplit:
        """A split as a memory map.

        The file must have the size and the time stamp of the manifest. With another
        time stamp, or with `verify`, it is read once and its SHA-256 is compared.
        """
        if name not in self.manifest["splits"]:
            raise TokenFileError(
                f"{self.folder}: no split {name!r}; it has "
                f"{', '.join(self.manifest['splits'])}"
            )
        record, path = self.manifest["splits"][name], self.folder / f"{name}.bin"
        cure = f"delete {self.folder}, it will be made again"
        size = path.stat().st_size if path.exists() else 0
        kind = id_type(self.manifest["n_vocab"])
        wanted = kind.itemsize * record["tokens"]
        if size != wanted:
            raise TokenFileError(f"{path}: {size} bytes where {wanted} belong; {cure}")
        if verify or path.stat().st_mtime_ns != record["mtime_ns"]:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != record["sha256"]:
                raise TokenFileError(
                    f"{path}: altered since it was written (SHA-256 differs); {cure}"
                )
            with suppress(OSError):  # a copy proven right: the next start need not read
                os.utime(path, ns=(record["mtime_ns"],) * 2)
        return TokenSplit(
            np.memmap(path, kind, "r"), record, self.manifest["end_of_text"]
        )


def load_tokens(
    corpus: Corpus | str, tokenizer: Tokenizer, *, progress: bool = False
) -> TokenFile:
    """Tokens of a corpus, from the cache or made now, by one process at a time."""
    if not isinstance(corpus, Corpus):
        corpus = load_corpus(corpus)
    folder = cache_dir() / "tokens" / f"{corpus.key}-{tokenizer.hash[:8]}"
    if not (folder / "manifest.json").exists():
        with lock(folder.with_name(folder.name + ".lock")):
            if not (folder / "manifest.json").exists():  # made meanwhile by another
                for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
                    shutil.rmtree(leftover)  # of a process that was killed
                shutil.rmtree(folder, ignore_errors=True)
                write_tokens(corpus, tokenizer, folder, progress=progress)
    return TokenFile.open(folder, tokenizer)
