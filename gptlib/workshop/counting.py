"""Counting perplexity in eleven ways.

Tangled from book/workshop/W19_counting.md; change it there, not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gptlib import GptlibError
from gptlib.corpus import Piece
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.token_files import TokenSplit


DETOKENISE = (  # pattern and replacement, in this order
    (r" ' (?=\d)", " '"),  # the ' 70s
    (r"(?<= )' (\w[^'\n]*) '(?=\s)", r"'\1'"),
    (r"s '(?=\s)", "s'"),
    (r" 's\b", "'s"),
    (r" @([-,.])@ ", r"\1"),  # well @-@ known, 1 @,@ 000, 0 @.@ 5
    (r" ([.,:;!?])(?=\s)", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r'" ?([^"\n]*?) ?"', r'"\1"'),
    (r" ° ", "°"),
    (r"= (?==)", "="),  # signs around a heading
    (r"(?m)^ | $", ""),
)


def detokenise(text: str) -> str:
    """WikiText's words and signs joined again: `1 @,@ 000 .` becomes `1,000.`

    Kinds of rules as in Megatron-LM (NVIDIA, tasks/zeroshot_gpt/detokenizer.py), where
    quotes may run over lines and a capital N becomes 1; here neither.
    """
    for pattern, replacement in DETOKENISE:
        text = re.sub(pattern, replacement, text)
    return text


class CountingError(GptlibError):
    """A layout that there is not."""


HEADING = re.compile(r" (= )+[^=].*( =)+ \n")


def rows_of(piece: Piece) -> list[str]:
    """The rows of a WikiText article, the blank ones put back as empty strings.

    There is one before and after each heading; the others are at the end.
    """
    rows: list[str] = []
    for row in re.findall(r"[^\n]*\n|[^\n]+", piece.text):
        rows += ["", row, ""] if HEADING.fullmatch(row) else [row]
    rows = rows[1:] if rows and not rows[0] else rows  # it is the last article's
    while len(rows) > piece.lines and not rows[-1]:
        rows.pop()
    return rows + [""] * (piece.lines - len(rows))


LAYOUTS = ("articles", "rows", "file", "spaced")
LAID = ("layout", "detokenised", "max_tokens")  # options of `lay_out`


def lay_out(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    layout: str = "articles",
    *,
    detokenised: bool = False,
    max_tokens: int | None = None,
) -> TokenSplit:
    """A split in memory, its text laid out in one of four ways.

    articles: a mark before each document, as in a token file. rows: before each row
    that is not blank. file: one text, with blank lines as in WikiText's file. spaced:
    one text, with two line ends more after each row. Words and bytes are counted before
    detokenising, but if there are only the first `max_tokens`, in these. Raises
    CountingError for another layout and for less than one token.
    """
    if layout not in LAYOUTS or (max_tokens is not None and max_tokens < 1):
        raise CountingError(
            f"layout is {layout!r}, max_tokens {max_tokens}; choose one of "
            f"{', '.join(LAYOUTS)}, and at least 1 token"
        )
    documents: list[list[str]] = []
    record = dict.fromkeys(("words", "lines", "text_bytes"), 0)
    for piece in pieces:
        record["words"] += len(piece.text.split())
        record["lines"] += piece.lines
        record["text_bytes"] += len(piece.text.encode())
        rows = rows_of(piece)
        if piece.starts or not documents:
            documents.append([])
        documents[-1] += map(detokenise, rows) if detokenised else rows
    rows = [row for document in documents for row in document]
    blank = "\n" if detokenised else " \n"
    texts = {
        "articles": ["".join(document) for document in documents],
        "rows": [row for row in rows if row.strip()],
        "file": ["".join(row or blank for row in rows)],
        "spaced": ["\n\n".join(rows)],
    }[layout]
    mark = tokenizer.end_of_text
    ids = [mark]
    for text in texts:
        ids += [*tokenizer.encode(text), mark]
    if max_tokens is not None and max_tokens < len(ids) - 2:
        ids, record = [*ids[: max_tokens + 1], mark], {}
    return TokenSplit(np.array(ids), record, mark)


def protocols(context: int) -> dict[str, dict]:
    """Ways of counting that are in use: the options of `lay_out` and `evaluate`.

    context: of the model, in tokens; no stride is longer.
    """
    file = {"layout": "file"}
    start = {**file, "stride": min(32, context), "max_tokens": 8192}
    return {
        "articles with marks": {},
        "each article alone": {"separate": True},
        "... filled up, all counted": {"padded": True},
        "each row alone": {"layout": "rows", "separate": True},
        "rows with two line ends more": {"layout": "spaced"},
        "the file": file,
        "... stride of half a context": {**file, "stride": max(1, context // 2)},
        "... stride 32, first 8,192 tokens": start,
        "... and means of windows": {**start, "window_means": True},
        "detokenised, the file": {**file, "detokenised": True},
        "detokenised, each article alone": {"separate": True, "detokenised": True},
    }


def protocol_table(results: dict[str, Any]) -> str:
    """Each way in a line: tokens counted, then perplexity per token and per word.

    results: by name, each an `Evaluation`. In the last column line ends are no words.
    """
    lines = [f"{'perplexity':33} {'tokens':>8} {'token':>8} {'word':>8} {'plain':>8}"]
    for name, e in results.items():
        values = e.perplexity, e.word_perplexity, e.plain_word_perplexity
        lines.append(
            f"{name:33} {sum(e.tokens):8,} " + " ".join(f"{v:8.1f}" for v in values)
        )
    return "\n".join(lines)
