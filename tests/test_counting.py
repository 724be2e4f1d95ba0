"""Counting: layouts and rules against the rows of WikiText, small and real."""

import math

import pytest
from engine import BYTES, WIKITEXT, model_of

from gptlib.corpus import documents_of_rows
from gptlib.evaluation import all_protocols, evaluate
from gptlib.workshop.counting import (
    LAYOUTS,
    detokenise,
    lay_out,
    protocol_table,
    protocols,
    rows_of,
)
from gptlib.workshop.token_files import load_tokens


ROWS = [
    "",
    " = Ferry = \n",
    "",
    ' A ferry , built in 1 @,@ 906 , was " slow " . \n',
    " It ran . \n",
    "",
    " = = Crew = = \n",
    "",
    " Ten ( or so ) men . \n",
    "",
    "",
    " = Shrimp = \n",
    "",
    " A shrimp 's tail . \n",
    "",
]


@pytest.mark.parametrize(
    ("raw", "joined"),
    [
        (" 1 @,@ 906 @.@ 5 , well @-@ known . \n", "1,906.5, well-known.\n"),
        (" ( 24 in ) and [ sic ] ; why ? ", "(24 in) and [sic]; why?"),
        (' " lobster red " on \n', '"lobster red" on\n'),
        (
            " Bob 's , the boys ' , the ' 70s , ' soft ' . ",
            "Bob's, the boys', the '70s, 'soft'.",
        ),
        (" = = Description = = \n", "== Description ==\n"),
        (" 57 ° 53 N \n", "57°53 N\n"),
        ("", ""),
    ],
)
def test_detokenise(raw, joined):
    assert detokenise(raw) == joined and detokenise(joined) == joined


def test_blank_rows_are_put_back():
    pieces = list(documents_of_rows(ROWS))
    assert [len(rows_of(piece)) for piece in pieces] == [p.lines for p in pieces]
    found = [row for piece in pieces for row in rows_of(piece)]
    assert found == [*ROWS[1:10], "", *ROWS[10:]]  # only the very first one moves


def test_each_layout_has_the_text_and_the_words_of_the_source():
    pieces = list(documents_of_rows(ROWS))
    full = [row for row in ROWS if row]
    texts = {
        "articles": ["".join(piece.text for piece in [p]) for p in pieces],
        "rows": full,
        "file": ["".join(row or " \n" for p in pieces for row in rows_of(p))],
        "spaced": ["\n\n".join(row for p in pieces for row in rows_of(p))],
    }
    words = sum(len(row.split()) for row in ROWS)
    for layout in LAYOUTS:
        split = lay_out(pieces, BYTES, layout)
        found = [BYTES.decode(part[1:-1].tolist()) for part in split.documents()]
        assert found == texts[layout]
        size = sum(len(row.encode()) for row in ROWS)
        assert split.record == {"words": words, "lines": len(ROWS), "text_bytes": size}
        joined = lay_out(pieces, BYTES, layout, detokenised=True)
        assert joined.record == split.record and len(joined) < len(split)
    cut = lay_out(pieces, BYTES, "file", max_tokens=20)
    assert (
        cut.record == {}
        and len(cut) == 22
        and (cut.ids[1:21] == lay_out(pieces, BYTES, "file").ids[1:21]).all()
    )
    for wrong in ({"layout": "lines"}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="choose one of articles, rows"):
            lay_out(pieces, BYTES, **wrong)


def test_every_protocol_counts_the_same_words():
    pieces = list(documents_of_rows(ROWS * 3))
    model = model_of()
    found = all_protocols(model, pieces, BYTES, corpus="own")
    assert list(found) == list(protocols(16)) and len(found) > 8
    marked = lay_out(pieces, BYTES)
    whole = evaluate(model, marked, BYTES, corpus="own")
    ours = found["articles with marks"]
    assert ours.nats == pytest.approx((math.fsum(whole.nats),))
    assert ours.tokens == (sum(whole.tokens),) and ours.words == whole.words
    per_word = math.fsum(whole.nats) / (whole.words - len(ROWS) * 3)
    assert ours.plain_word_perplexity == pytest.approx(math.exp(per_word))
    assert {e.words for e in found.values()} == {ours.words}
    lines = protocol_table(found).splitlines()
    assert len(lines) == len(found) + 1
    assert lines[1].split()[-4:-2] == [f"{sum(ours.tokens)}", f"{ours.perplexity:.1f}"]


def test_layouts_of_the_real_validation_split(wikitext):
    gpt2, pieces = wikitext
    scored = {"articles": 247_137, "rows": 247_137, "file": 249_735, "spaced": 250_896}
    for layout, tokens in scored.items():
        split = lay_out(pieces, gpt2, layout)
        assert (split.ids != split.end_of_text).sum() == tokens, layout
        assert split.record == {
            "words": 213_886,
            "lines": 3_760,
            "text_bytes": 1_139_711,
        }
    joined = lay_out(pieces, gpt2, detokenised=True)
    assert (joined.ids != joined.end_of_text).sum() == 235_823
    split = load_tokens(WIKITEXT, gpt2).split("validation")
    assert (lay_out(pieces, gpt2).ids == split.ids).all()  # as in the token file
