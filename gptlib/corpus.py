"""What a language model reads.

Tangled from book/chapters/01_corpus.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptlib.workshop.tinywiki import DEFAULT_BYTES, TinyWiki


class CorpusError(ValueError):
    """A corpus that cannot be had or read; the message says how to get it or what works offline."""


def cache_dir() -> Path:
    """Folder for what can be made again: `$GPTLIB_RUNS/cache`, or `runs/cache` below the current folder."""
    path = Path(os.environ.get("GPTLIB_RUNS", "runs")) / "cache"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


@dataclass(frozen=True)
class Piece:
    """A stretch of text. A long document comes as several pieces; only its first has `starts`.

    lines: how many lines of the source it holds. WikiText counts a blank line too, though the
    `datasets` library hands it over as an empty row.
    """

    text: str
    starts: bool = True
    lines: int = 0


MAX_PIECE = (
    1_000_000  # characters; bounds the memory that one piece of a huge document takes
)
TITLE = re.compile(r" = [^=\s](?:.*[^=\s])? = \n")


def documents_of_rows(rows: Iterator[str]) -> Iterator[Piece]:
    """The documents in the rows of a split.

    Rows in WikiText's manner are one line each, and a row ` = Title = ` after a blank one begins an
    article: such rows are joined. If the first row with text is no title, each row is a document.
    """
    article: list[str] = []
    blank, lines = True, None
    for row in rows:
        if lines is None and row.strip():
            lines = bool(TITLE.fullmatch(row))
        if lines is False:
            yield Piece("".join([*article, row]), lines=row.count("\n"))
            article = []
            continue
        if blank and TITLE.fullmatch(row) and any(line.strip() for line in article):
            yield Piece("".join(article), lines=len(article))
            article = []
        article.append(row)
        blank = not row.strip()
    if article:
        yield Piece("".join(article), lines=len(article))


class Corpus:
    """Named text in splits. `pieces(split)` streams it; nothing is held in memory whole."""

    def __init__(self, name: str, splits: dict[str, object]):
        self.name = name
        self._readers = (
            splits  # split -> function that returns a fresh iterator of pieces
        )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._readers)

    def pieces(self, split: str) -> Iterator[Piece]:
        """Stream the documents of a split. Raises CorpusError for a split that is not there."""
        if split not in self._readers:
            raise CorpusError(
                f"corpus {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self._readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Whole documents, the pieces of each joined."""
        parts: list[str] = []
        for piece in self.pieces(split):
            if piece.starts and parts:
                yield "".join(parts)
                parts = []
            parts.append(piece.text)
        if parts:
            yield "".join(parts)


def text_file(path: Path) -> Corpus:
    """A UTF-8 file as a corpus: its first 90% train, then 5% validation, then 5% test, cut at line ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        cuts = [0]
        for share in (0.90, 0.95):
            file.seek(int(size * share))
            file.readline()
            cuts.append(file.tell())
        cuts.append(size)

    def reader(start: int, stop: int):
        def pieces() -> Iterator[Piece]:
            with path.open("rb") as file:
                file.seek(start)
                first = True
                while (place := file.tell()) < stop:
                    block = file.read(min(MAX_PIECE, stop - place))
                    if file.tell() < stop:
                        block += file.readline()
                    text = decode(block, path, place)
                    yield Piece(text, starts=first, lines=text.count("\n"))
                    first = False

        return pieces

    names = ("train", "validation", "test")
    return Corpus(
        str(path),
        {n: reader(a, b) for n, a, b in zip(names, cuts[:-1], cuts[1:], strict=True)},
    )


def decode(block: bytes, path: Path, place: int) -> str:
    """UTF-8 to text, or a CorpusError that names the offending byte."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = block[error.start]
        raise CorpusError(
            f"{path.name}: byte {place + error.start} (0x{byte:02x}) is not UTF-8; convert it, "
            "for example with: iconv -f LATIN1 -t UTF-8"
        ) from None


HUB = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
OFFLINE_HINT = "the corpus `tinywiki` needs no network"


def dataset(name: str, source: str, config: str | None, **options) -> Corpus:
    """A corpus read through the `datasets` library, row by row from its memory-mapped files."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(source, config, **options)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CorpusError(f"{name}: `datasets` cannot read it: {reason}") from None

    def reader(split):
        def pieces() -> Iterator[Piece]:
            if "text" not in split.column_names:
                raise CorpusError(
                    f"{name}: rows have no column 'text', only {split.column_names}; rename one"
                )
            if "title" in split.column_names:
                return titled(split)
            return documents_of_rows(
                row for batch in split.iter(1000) for row in batch["text"]
            )

        return pieces

    return Corpus(name, {key: reader(split) for key, split in splits.items()})


def titled(split) -> Iterator[Piece]:
    """Rows with a title: neighbouring rows of one title are one document."""
    last = None
    for batch in split.iter(100):
        for title, text in zip(batch["title"], batch["text"], strict=True):
            yield Piece(
                text if title != last else "\n" + text,
                starts=title != last,
                lines=text.count("\n") + 1,
            )
            last = title


def has_network(host: str = "huggingface.co", timeout: float = 2.0) -> bool:
    """Whether the hub can be reached; behind a proxy only the proxy knows, so that counts as yes."""
    if any(
        os.environ.get(name)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True
    try:
        socket.create_connection((host, 443), timeout).close()
        return True
    except OSError:
        return False


def from_hub(name: str) -> Corpus:
    """WikiText from the Hugging Face hub, or from its cache when there is no network."""
    if not has_network():
        import datasets
        import huggingface_hub

        # the variables HF_HUB_OFFLINE are read at import only, hence the constants
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return dataset(name, *HUB[name])
    except CorpusError as error:
        if has_network():
            raise
        raise CorpusError(
            f"{name}: no network, and it is not in the cache (HF_HOME); connect once to fetch it, "
            f"or set GPTLIB_DATA to a folder that holds it; {OFFLINE_HINT}"
        ) from error


def from_folder(name: str, folder: Path, config: str | None) -> Corpus:
    """A local dataset folder in the hub's layout. Its cache is keyed by file sizes and times."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = [
        [str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns]
        for p in files
    ]
    key = hashlib.sha256(json.dumps([config, listing]).encode()).hexdigest()[:16]
    return dataset(
        name, str(folder), config, cache_dir=str(cache_dir() / "datasets" / key)
    )


def tinywiki(seed: int = 0) -> Corpus:
    """The book's own corpus (appendix A1): fresh articles, made as they are read."""
    wiki = TinyWiki(seed=seed)

    def reader(split):
        return lambda: (
            Piece(article.text, lines=article.text.count("\n"))
            for article in wiki.articles(split)
        )

    return Corpus("tinywiki", {split: reader(split) for split in DEFAULT_BYTES})


def load_corpus(name: str) -> Corpus:
    """Find a corpus by name: no silent fallback, no network unless the name asks for it.

    name: `tinywiki`, `wikitext-2`, `wikitext-103`, a dataset folder (`DIR` or `DIR:config`), a
    text file, or the name of a folder below `$GPTLIB_DATA`. Raises CorpusError with the cure.
    """
    path, _, config = name.partition(":")
    data = os.environ.get("GPTLIB_DATA")
    places = [Path(path)] + ([Path(data) / path] if data else [])
    if name == "tinywiki":
        return tinywiki()
    for place in places:
        if place.is_dir():
            return from_folder(name, place, config or None)
        if place.is_file():
            return text_file(place)
    if name in HUB:
        return from_hub(name)
    known = ", ".join(["tinywiki", *HUB])
    raise CorpusError(
        f"unknown corpus {name!r}: it is none of {known}, no dataset folder and no text file; {OFFLINE_HINT}"
    )
