"""What a language model reads.

Tangled from book/chapters/01_corpus.md; change it there, not here.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from gptlib import GptlibError
from gptlib.workshop.files import cache_dir


TITLE = re.compile(r" = [^=].* = \n")


def articles_of_rows(rows: Iterable[str]) -> Iterator[list[str]]:
    """The articles in WikiText's rows, each as the list of its rows."""
    article: list[str] = []
    after_blank = True
    for row in rows:
        if after_blank and TITLE.fullmatch(row) and "".join(article).strip():
            yield article
            article = []
        article.append(row)
        after_blank = not row.strip()
    if article:
        yield article


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is too large to be read at once.

    starts: whether a document begins here. lines: how many lines of the source it
    holds; a blank line of WikiText counts, although its row is empty.
    """

    text: str
    starts: bool = True
    lines: int = 0


def documents_of_rows(rows: Iterable[str]) -> Iterator[Piece]:
    """The documents in the rows of a split.

    If the first row with text is a title, the rows are WikiText's, and those of an
    article are joined. If not, each row is a document.
    """
    rows = iter(rows)
    first: list[str] = []  # the rows up to the first with text
    for row in rows:
        first.append(row)
        if row.strip():
            break
    if first and TITLE.fullmatch(first[-1]):
        for article in articles_of_rows(chain(first, rows)):
            yield Piece("".join(article), lines=len(article))
    elif first:
        yield Piece("".join(first), lines=first[-1].count("\n"))
        for row in rows:
            yield Piece(row, lines=row.count("\n"))


class CorpusError(GptlibError):
    """A corpus that cannot be had or read; the message says how to get it."""


Reader = Callable[[], Iterator[Piece]]


class Corpus:
    """Named text in splits, streamed: no split is ever held in memory whole.

    readers: for each split a function that returns a fresh iterator of pieces, or a
    function that returns such a dictionary and is called when text is first asked for.
    key: stands for the exact text; what is made from the text is kept under this name.
    hold_out: if there is no validation split, take every 20th training document for it,
    and say so on stderr.
    """

    def __init__(
        self,
        name: str,
        readers: Mapping[str, Reader] | Callable[[], Mapping[str, Reader]],
        *,
        key: str = "",
        hold_out: bool = False,
    ):
        self.name, self.key = name, key or name
        self.held_out: str | None = None  # how a missing validation split was made
        self._given, self._hold_out = readers, hold_out

    @cached_property
    def _readers(self) -> dict[str, Reader]:
        readers = dict(self._given() if callable(self._given) else self._given)
        if self._hold_out and "train" in readers and "validation" not in readers:
            self.held_out = f"every {HELD_OUT}th document of train"
            print(
                f"corpus {self.name}: no validation split; "
                f"{self.held_out} is held out as validation",
                file=sys.stderr,
            )
            readers |= hold_out(self.name, readers["train"])
        return readers

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self._readers)

    def pieces(self, split: str) -> Iterator[Piece]:
        """Stream a split. Raises CorpusError for a split that is not there."""
        if split not in self._readers:
            raise CorpusError(
                f"corpus {self.name!r} has no split {split!r}; "
                f"it has {', '.join(self.splits)}"
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


HELD_OUT = 20  # without a validation split, one training document in 20 becomes one


def hold_out(name: str, train: Reader) -> dict[str, Reader]:
    """Two readers for one: every 20th document is `validation`, the others `train`."""

    def part(validation: bool) -> Iterator[Piece]:
        document = 0  # the number of the document, from 1
        for piece in train():
            document += piece.starts
            if (document % HELD_OUT == 0) == validation:
                yield piece
        if validation and document < HELD_OUT:
            raise CorpusError(
                f"{name}: {document} documents are too few to hold out every "
                f"{HELD_OUT}th; add a validation file"
            )

    return {"train": partial(part, False), "validation": partial(part, True)}


MAX_PIECE = 1_000_000  # bytes; bounds the memory that a piece of a huge document takes


def text_file(path: Path, name: str = "", key: str = "") -> Corpus:
    """A UTF-8 file as a corpus: 90% train, 5% validation, 5% test, cut at line ends.

    Raises CorpusError for a file too short to be cut, and, once the text is read, for
    one that is not UTF-8.
    """
    name = name or str(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        cuts = [0]
        for share in (0.90, 0.95):
            file.seek(int(size * share))
            file.readline()
            cuts.append(file.tell())
        cuts.append(size)
    parts = dict(zip(("train", "validation", "test"), zip(cuts, cuts[1:])))
    for split, (start, stop) in parts.items():
        if start == stop:
            raise CorpusError(
                f"{name}: {size} bytes in too few lines, nothing is left for {split}; "
                "add text, or break long lines"
            )

    def reader(start: int, stop: int) -> Iterator[Piece]:
        with path.open("rb") as file:
            file.seek(start)
            while (place := file.tell()) < stop:
                block = file.read(min(MAX_PIECE, stop - place))
                if file.tell() < stop:
                    block += file.readline()
                text = decode(block, name, place)
                yield Piece(text, starts=place == start, lines=text.count("\n"))

    readers = {split: partial(reader, *part) for split, part in parts.items()}
    return Corpus(name, readers, key=key)


def decode(block: bytes, name: str, place: int) -> str:
    """UTF-8 to text, or a CorpusError that names the offending byte."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name}: byte {place + error.start} (0x{block[error.start]:02x}) is not "
            "UTF-8; convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from None


HUB = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
OFFLINE = "the corpus `tinywiki` needs no network"


def read_dataset(
    name: str, source: str, config: str | None, cache: Path | None = None
) -> dict[str, Reader]:
    """Readers of a data set, by the `datasets` library, from memory-mapped files."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(source, config, cache_dir=cache and str(cache))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CorpusError(
            f"{name}: `datasets` cannot read it: {reason}; {OFFLINE}"
        ) from error

    def reader(rows) -> Iterator[Piece]:
        if "text" not in rows.column_names:
            raise CorpusError(
                f"{name}: rows have no column 'text', only {rows.column_names}; "
                "rename one of them"
            )
        if "title" in rows.column_names:
            return join_titles(rows)
        return documents_of_rows(r for batch in rows.iter(1000) for r in batch["text"])

    return {split: partial(reader, rows) for split, rows in splits.items()}


def join_titles(rows) -> Iterator[Piece]:
    """Rows with a title: neighbouring rows of one title are one document."""
    last = None
    for batch in rows.iter(100):
        for title, text in zip(batch["title"], batch["text"], strict=True):
            new = title != last
            yield Piece(text if new else "\n" + text, new, text.count("\n") + 1)
            last = title


def has_network(timeout: float = 2.0) -> bool:
    """Whether the Hugging Face hub, or the proxy before it, takes a connection."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    if proxy and not proxy_bypass(hub.hostname or ""):
        hub = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        socket.create_connection((hub.hostname, port), timeout).close()
        return True
    except OSError:
        return False


def read_hub(name: str) -> dict[str, Reader]:
    """Readers of WikiText from the hub; with HF_HUB_OFFLINE=1 from the local cache."""
    if not os.environ.get("HF_HUB_OFFLINE") and not has_network():
        raise CorpusError(
            f"{name}: the Hugging Face hub cannot be reached; if {name} was fetched "
            "before, set HF_HUB_OFFLINE=1, or set GPTLIB_DATA to a folder that holds "
            f"it; {OFFLINE}"
        )
    return read_dataset(name, *HUB[name])


def load_corpus(name: str) -> Corpus:
    """Find a corpus by name. Another corpus is never put in its place.

    name: `tinywiki`, `wikitext-2`, `wikitext-103`, a dataset folder (`DIR` or
    `DIR:config`), a text file, or one of these two below `$GPTLIB_DATA`. Raises
    CorpusError, with the cure. A data set is opened when its text is first asked for.
    """
    if name == "tinywiki":
        return _tinywiki()
    folder, _, config = name.rpartition(":")  # the last: C:\text.txt has a colon too
    roots = [Path(), Path(os.environ.get("GPTLIB_DATA") or ".")]
    places = [(root / name, "") for root in roots]
    places += [(root / folder, config) for root in roots if folder and config]
    for path, config in places:
        if path.is_file():
            return text_file(path, name, _key(name, [path]))
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            if not files:
                raise CorpusError(f"{path} is empty; give a dataset folder or a file")
            key = _key(name, files)
            cache = cache_dir() / "datasets" / key
            readers = partial(read_dataset, name, str(path), config or None, cache)
            return Corpus(name, readers, key=key, hold_out=True)
    if name in HUB:
        return Corpus(name, partial(read_hub, name), hold_out=True)
    raise CorpusError(
        f"unknown corpus {name!r}: it is none of {', '.join(['tinywiki', *HUB])}, no "
        f"dataset folder and no text file; {OFFLINE}"
    )


def _key(name: str, files: Iterable[Path], contents: bool = False) -> str:
    """The name, and a hash of the files: of names, sizes and times, or of contents."""
    digest = hashlib.sha256(name.encode())
    for path in files:
        seen = path.stat()
        stamp = f"{path.name} {seen.st_size} {seen.st_mtime_ns}".encode()
        digest.update(path.read_bytes() if contents else stamp)
    readable = re.sub(r"[^A-Za-z0-9]", "-", Path(name).name)[-40:]
    return f"{readable}-{digest.hexdigest()[:8]}"


def _tinywiki() -> Corpus:
    """The book's own corpus: articles of an invented world, made as they are read."""
    from gptlib.workshop import tinywiki

    wiki, folder = tinywiki.TinyWiki(seed=0), Path(tinywiki.__file__).parent
    parts = ("tinywiki.py", "grammar.py", "world/*.txt")  # what decides the text
    files = [path for part in parts for path in sorted(folder.glob(part))]

    def reader(split: str) -> Iterator[Piece]:
        for article in wiki.articles(split):
            yield Piece(article.text, lines=article.text.count("\n"))

    readers = {s: partial(reader, s) for s in ("train", "validation", "test")}
    return Corpus("tinywiki", readers, key=_key("tinywiki", files, contents=True))
