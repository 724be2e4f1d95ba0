"""The world's files: the notation means what it says, and a mistake is named by line."""

import shutil
from importlib import resources

import pytest

from gptlib import GptlibError
from gptlib.workshop.grammar import (
    Choice,
    Filler,
    Slot,
    TinyWikiError,
    compile_wording,
    load_world,
    read_values,
)
from gptlib.workshop.tinywiki import KINDS


WORLD = resources.files("gptlib.workshop") / "world"


def test_slots_and_fillers():
    assert compile_wording("In {a.b} , {^she}") == [
        *("In ", Slot(("a", "b")), " , ", Slot(("she",), True))
    ]
    assert compile_wording("<x=town/a/b><3..5><month>") == [
        Filler("x", "@town", ("a", "b")),
        Filler("", range(3, 6)),
        Filler("", "@month"),
    ]


def test_brackets_nest():
    assert compile_wording("a [b|c [d|e] f|]") == [
        "a ",
        Choice([["b"], ["c ", Choice([["d"], ["e"]]), " ", "f"], []]),
    ]


def test_the_space_before_an_empty_option_goes_with_the_others():
    assert compile_wording("it [now|] fell") == [
        *("it", Choice([[" ", "now"], []]), " ", "fell")
    ]
    # at the end of a text, and after a bracket, no space is taken away
    assert compile_wording("it [now|]") == ["it ", Choice([["now"], []])]
    assert compile_wording("it [now|then] fell")[0] == "it "


@pytest.mark.parametrize(
    "text", ["[a", "a]", "a|b", "[a|b]]", "{a", "a}", "<1..2", "a>", "{}", "<>", "[[a]"]
)
def test_brackets_that_do_not_match(text):
    with pytest.raises(ValueError, match="do not match"):
        compile_wording(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("red / sky blue", ("red", "sky blue")),
        ("1200..1202", range(1200, 1203)),
        ("1956..1968 by 4", range(1956, 1969, 4)),
        ("600..1200 by 600 count", ("600", "1 @,@ 200")),
        ("60..64 by 4 m", ("60 m ( 196 ft )", "64 m ( 209 ft )")),
        ("60..60 km", ("60 km ( 37 mi )",)),
        ("14..14 mm", ("14 mm ( 0 @.@ 5 in )",)),
        ("18..19 half knots", ("9 @.@ 0 knots", "9 @.@ 5 knots")),
        ("1200..1200 square kilometres", ("1 @,@ 200 square kilometres",)),
        ("@football coach", "@football coach"),
    ],
)
def test_values(text, values):
    assert read_values(text) == values


@pytest.mark.parametrize(
    "text", ["a / a", "a /  / b", "9..3", "1..9 by 0", "1..9 miles"]
)
def test_values_that_are_none(text):
    with pytest.raises(ValueError):
        read_values(text)


def test_the_world_loads_and_is_package_data():
    world = load_world(WORLD, KINDS)
    assert tuple(world) == KINDS
    assert world["person"].facts["craft"].whole == "job"
    assert world["town"].facts["native"].how == "agreed"
    assert world["ship"].asks["yard"][1].endswith("?")
    assert (WORLD / "README.md").is_file()


@pytest.fixture
def damaged(tmp_path):
    """A function that loads a copy of the world with one change in one file."""

    def load(name, old, new, count=1):
        shutil.copytree(WORLD, tmp_path / "world")
        path = tmp_path / "world" / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        line = text[: text.index(old)].count("\n") + 1
        path.write_text(text.replace(old, new, count), encoding="utf-8")
        return line, lambda: load_world(tmp_path / "world", KINDS)

    return load


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("town", "River {river} in {region} .", "River {rivver} .", "has no 'rivver'"),
        ("town", "{native.job} {native} was", "{native.jobs} was", "has no 'jobs'"),
        ("town", "{team.nickname} , the", "{trade.name} , the", "text has no 'name'"),
        (
            "town",
            "moved to] <x=town>",
            "moved to] <x=twon>",
            "'twon' is unknown; choose",
        ),
        ("team", "<x=town/town>", "<x=town/twon>", "has no 'twon'"),
        ("river", "<x=species> , a {x.group}", "<x=town> , a {x.group}", "no 'group'"),
        (
            "town",
            "The town of {name} [lies|stands]",
            "The town of [lies|stands",
            "do not match",
        ),
        ("town", "[lies|stands] on", "{lies|stands] on", "do not match"),
        ("river", "* 13", "* 17", "'17' must be a chance of 1 to 16"),
        ("river", "* 13", "* 0", "'0' must be a chance"),
        ("river", "* 13", "* often", "'often' must be a chance"),
        ("river", "== 14 if towns", "== 14 if twons", "must be a chance of 1 to 16"),
        ("river", "* 16", "* 15", "first sentence of a paragraph must have"),
        ("river", "* 16", "", "stands in no sentence"),
        ("river", "== 14 if towns", "== 14\n-- 12\n== 14 if towns", "is empty"),
        ("river", "* 13", "* 13\n* 12", "is empty"),
        (
            "river",
            "It is {length} long",
            "Its [length|course] [is|measures] {length} .\nA",
            "x",
        ),
        ("ship", "fact yard = @town", "fact yard = @twon", "'twon' is unknown"),
        ("ship", "fact yard = @town", "fact yard @town", "declares"),
        ("ship", "fact yard = @town", "facts yard = @town", "stands in no sentence"),
        ("ship", "fact port = @town", "fact yard = @town", "'yard' twice"),
        ("ship", "1930..1949", "1949..1930", "FIRST..LAST"),
        ("ship", "60..156 by 4 m", "60..156 by 4 miles", "half knots"),
        ("ship", "fact cargo = timber / salt", "fact cargo = salt / salt", "double"),
        ("ship", "part Amber Ancient", "part Amber Amber", "no two alike"),
        ("ship", "part Amber Ancient", "part\nfact old = Amber Ancient", "list words"),
        ("ship", "ask yard =", "ask yrad =", "has no 'yrad'"),
        ("ship", "{type} built in |", "{tipe} built in |", "has no 'tipe'"),
        ("ship", "built in | In", "built in , In", "OPENING | QUESTION"),
        ("person", "fact craft of job = music /", "fact craft of job =", "must have 6"),
        ("person", "fact craft of job", "fact craft of jobs", "part of nothing"),
        ("team", "part @town", "part @twon", "'twon' is unknown"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(damaged, name, old, new, words):
    line, load = damaged(name, old, new)
    if words == "x":  # the second of two equal wordings is the one to complain about
        words, line = "for the second time", line + 2
    with pytest.raises(TinyWikiError) as caught:
        load()
    message = str(caught.value)
    place, _, complaint = message.partition(": ")
    assert words in complaint and "\n" not in message
    file, _, number = place.partition(", line ")
    assert file == f"{name}.txt"
    # what is missing is noticed in the lines after it
    slack = {"is empty": 2, "stands in no sentence": 1}.get(words, 0)
    assert line <= int(number) <= line + slack
    assert isinstance(caught.value, GptlibError)


def test_titles_need_their_parts(damaged):
    _, load = damaged("ship", "title SS {} {}", "title SS {}")
    with pytest.raises(TinyWikiError, match="ship.txt, line .*a {} for each part"):
        load()


def test_an_article_may_not_end_with_an_empty_part(damaged):
    _, load = damaged(
        "ship", "[Her name|The name] was", "* 12\n# [Her name|The name] was"
    )
    with pytest.raises(TinyWikiError, match="ship.txt, line .* is empty"):
        load()


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    shutil.copytree(WORLD, tmp_path / "world")
    (tmp_path / "world" / "ship.txt").write_bytes(b"title \xff")
    with pytest.raises(TinyWikiError, match="ship.txt, line 0: .*utf-8"):
        load_world(tmp_path / "world", KINDS)
    (tmp_path / "world" / "river.txt").unlink()
    with pytest.raises(TinyWikiError, match="river.txt, line 0: .*No such file"):
        load_world(tmp_path / "world", KINDS)


def test_comments_blank_lines_and_long_lines_say_nothing(damaged):
    _, load = damaged(
        "ship",
        "* 12\nShe [sailed|worked] out of {port}",
        "\n# a comment\n* 12\n\nShe [sailed|worked]\n  out of {port}",
    )
    assert load()["ship"] == load_world(WORLD, KINDS)["ship"]
