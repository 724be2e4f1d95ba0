"""TinyWiki: the text is fixed, the floor is exact, the facts agree, the format is WikiText's."""

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
import tracemalloc

import pytest

from gptlib import GptlibError
from gptlib.workshop import tinywiki
from gptlib.workshop.grammar import Choice, Filler, compile_wording
from gptlib.workshop.tinywiki import (
    DEFAULT_BYTES,
    FAMOUS,
    KINDS,
    SPLITS,
    Draws,
    Entity,
    State,
    TinyWiki,
    TinyWikiError,
    Walk,
    entity_of,
    titles,
    world,
)


# SHA-256 of the splits of world 0 and of world 5; they change with the world and its size
HASHES = {
    (0, "train"): "ae2e8ed2e4550d32470f6d6205b9330eb490dc20b82a0b7844b0be35917c8f47",
    (
        0,
        "validation",
    ): "3ce94edc2be0a05bbceb8521d52b4b5470aa65c621a25a5a7d5070edb9ea360e",
    (0, "test"): "6f185c01d1bbd7e11dc21402d3591bc2d1197d7c1b2e1b02a6aeb7bdd4b42c23",
    (
        5,
        "validation",
    ): "e22785835b6218dcc4422121c3262acd140d8f28b8cd41ec83e21c390db772f2",
}
BEGINNING = State(0, {}, (), {})


@pytest.fixture(scope="module")
def wiki():
    return TinyWiki()


@pytest.fixture(scope="module")
def corpus(wiki):
    return {split: list(wiki.articles(split)) for split in SPLITS}


def text_of(articles):
    return "".join(article.text for article in articles)


@pytest.mark.parametrize(("seed", "split"), HASHES)
def test_the_text_is_the_same_everywhere(corpus, seed, split):
    articles = TinyWiki(seed).articles(split) if seed else corpus[split]
    digest = hashlib.sha256(text_of(articles).encode()).hexdigest()
    assert digest == HASHES[seed, split]


def test_draws_are_the_documented_digest():
    draws = Draws(7, "some/stream")
    digest = b"".join(
        hashlib.blake2b(f"7/some/stream/{k}".encode(), digest_size=64).digest()
        for k in range(2)
    )
    for k in range(16):
        word = int.from_bytes(digest[8 * k : 8 * k + 8], "little")
        assert draws.below(1000) == word * 1000 >> 64


def test_weights_are_probabilities():
    draws, counts = Draws(0, "weights"), [0, 0, 0, 0]
    for _ in range(4000):
        counts[draws.pick((1, 0, 2, 5))] += 1
    assert counts[1] == 0 and sum(counts) == 4000
    for count, weight in zip(counts, (1, 0, 2, 5)):
        assert abs(count - 500 * weight) < 5 * math.sqrt(500 * weight + 1)


@pytest.mark.parametrize("salt", ["0", "1"])
def test_the_shell_command_does_not_depend_on_hash_order(corpus, salt):
    command = [
        sys.executable,
        "-m",
        "gptlib.workshop.tinywiki",
        "--split",
        "test",
        "--bytes",
        "20000",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": salt},
        capture_output=True,
        check=True,
    )
    assert len(done.stdout) >= 20000
    assert text_of(corpus["test"]).encode().startswith(done.stdout)


def test_the_default_size_is_kept_to_the_article(corpus):
    for split, articles in corpus.items():
        size = len(text_of(articles).encode())
        assert size >= DEFAULT_BYTES[split] > size - len(articles[-1].text.encode())


def test_an_article_depends_on_its_number_alone(wiki, corpus):
    for split in SPLITS:
        for number in (0, 17, 3):
            assert TinyWiki().article(split, number) == corpus[split][number]
    assert wiki.article("train", 10**12).text  # none of those before it is written


def test_the_splits_and_the_worlds_differ(corpus):
    texts = {split: {article.text for article in corpus[split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
    assert TinyWiki(1).article("train", 0).text != corpus["train"][0].text


def test_memory_does_not_grow_with_the_size(wiki):
    articles = wiki.articles("train", 10**12)
    for _ in range(100):
        next(articles)
    tracemalloc.start()
    for _ in range(500):
        next(articles)
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(500):
        next(articles)
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 4_000_000  # what is kept is the bounded cache of facts


def test_each_article_has_one_derivation_at_the_writers_price(wiki, corpus):
    sample = [
        *corpus["train"][:250],
        *corpus["validation"][:150],
        *corpus["test"][:150],
    ]
    for article in sample:
        found = wiki.parse(article.text)
        assert len(found) == 1, article.title
        assert found[0].text == article.text
        assert found[0] == article  # every choice and every fact, with its price


def test_prices_are_the_logarithms_of_the_chances():
    """All texts of a small grammar: the probabilities by price add up to one."""
    words = compile_wording("[a|b[ c|]] <1..3>[, <month>|]")
    part = Choice([[], words], (3, 13))
    expected = {"": 3 / 16}
    for first, p in (("a", 1 / 2), ("b c", 1 / 4), ("b", 1 / 4)):
        for n in "123":
            expected[f"{first} {n}"] = 13 / 16 * p / 3 / 2
            for month in tinywiki.CALENDAR["@month"]:
                expected[f"{first} {n}, {month}"] = 13 / 16 * p / 3 / 2 / 12
    assert math.isclose(sum(expected.values()), 1)
    for text, p in expected.items():
        states = Walk(0, Entity("town", 0), text).steps(part, BEGINNING)
        (state,) = [state for state in states if state.at == len(text)]
        assert math.isclose(math.exp(-sum(nats for _, nats in state.choices)), p)


def test_a_fact_costs_once_and_a_part_stands_for_the_whole():
    words = compile_wording("{upper} {lower} {upper.river} {length} {length}")
    river = Entity("river", 3)
    (state,) = Walk(0, river, Draws(0, "x")).steps(words, BEGINNING)
    upper = tinywiki.know(0, river)[0]["upper"]
    n = FAMOUS["town"]
    assert state.told == {
        (river, "towns"): math.log(n * (n - 1)),
        (upper, "river"): math.log(FAMOUS["river"]),
        (river, "length"): math.log(50),
    }


def test_what_follows_from_the_title_is_free():
    words = compile_wording("{name} {town} {^town}")
    (state,) = Walk(0, Entity("team", 3), Draws(0, "x")).steps(words, BEGINNING)
    assert state.told == {}


def test_a_subject_without_the_fact_draws_nothing():
    node = Choice([[], ["native"]], (2, 14), "native")
    obscure = Entity("town", FAMOUS["town"])
    draws = Draws(0, "x")
    assert Walk(0, obscure, draws).steps(node, BEGINNING) == [BEGINNING]
    assert draws.count == 0
    assert len(Walk(0, Entity("town", 0), "native").steps(node, BEGINNING)) == 2


def test_the_floors_are_ordered(corpus):
    for article in itertools.chain(*corpus.values()):
        assert 0 < article.nats_known <= article.nats_floor <= article.nats_unknown
        if article.subject.famous:
            assert article.nats_floor == article.nats_known
    obscure = [a for a in corpus["train"] if not a.subject.famous]
    assert all(article.nats_floor > article.nats_known for article in obscure)


def test_samples_agree_on_the_floor(corpus):
    rates = [
        sum(a.nats_floor for a in articles) / len(text_of(articles).encode())
        for articles in corpus.values()
    ]
    assert max(rates) / min(rates) < 1.06


def test_an_ambiguous_wording_is_found():
    planted = compile_wording(" It is [old|small|old[ and small|]] .")
    reader = Walk(0, Entity("town", 0), " It is old .")
    assert len(reader.steps(planted, BEGINNING)) == 2


@pytest.mark.parametrize("change", ["", "x", " \n = Nowhere = \n \n", "a town"])
def test_other_text_has_no_derivation(wiki, corpus, change):
    assert wiki.parse(change) == []
    article = next(a for a in corpus["train"] if "River" in a.text)
    assert wiki.parse(article.text + "x") == []
    assert wiki.parse(article.text.replace(" River ", " Rivers ")) == []


def test_names_are_a_bijection():
    every = [title for kind in KINDS for title in titles(3, kind)]
    assert len(set(every)) == len(every)
    for kind in KINDS:
        assert len(titles(3, kind)) >= 5000
        for i in range(0, len(titles(3, kind)), 97):
            assert entity_of(3, titles(3, kind)[i]) == (kind, i)
    assert entity_of(0, "Nowhere") is None
    assert sorted(titles(0, "town")) == sorted(titles(3, "town")) != titles(0, "town")


def test_kinds_and_wordings_are_many():
    assert len(KINDS) >= 7 and 100 <= sum(FAMOUS.values()) <= 200


def sentences_of(node):
    """The choices among wordings below a node, each of which begins with a space."""
    if isinstance(node, Choice) and not node.weights:
        yield node.options
    elif isinstance(node, (Choice, list)):
        for child in node.options if isinstance(node, Choice) else node:
            yield from sentences_of(child)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_has_five_wordings(kind):
    sections = [node for node in world()[kind].tree if isinstance(node, (Choice, list))]
    groups = [
        options
        for options in sentences_of(sections)
        if all(option and str(option[0]).startswith(" ") for option in options)
    ]
    assert len(groups) >= 9 and all(len(options) >= 5 for options in groups)


def test_towns_rivers_and_people_agree(wiki):
    for index, _ in wiki.entities("town"):
        town = wiki.facts("town", index)
        assert Entity("town", index) in wiki.facts(*town["river"])["towns"]
        assert wiki.facts(*town["native"])["town"] == ("town", index)
    for index, _ in wiki.entities("person"):
        friend = wiki.facts("person", index)["friend"]
        assert friend.number != index and wiki.facts(*friend)["friend"] == (
            "person",
            index,
        )


def test_articles_agree_with_each_other(corpus):
    """Read the facts off the text with regular expressions and compare across articles."""
    river_of = {}
    for article in corpus["train"]:
        if article.subject.kind == "town":
            river_of.setdefault(article.title, set()).update(
                re.findall(r"River (\w+)", article.text)
            )
    checked = 0
    assert all(len(rivers) == 1 for rivers in river_of.values())
    for article in corpus["train"]:
        town = article.title.split(" women 's")[0]
        if article.subject.kind == "team" and town in river_of:
            rivers = set(re.findall(r"River (\w+)", article.text))
            assert rivers <= river_of[town]
            checked += bool(rivers)
        for studio, river in re.findall(
            r"recorded it in (\w+) , a town on the River (\w+)", article.text
        ):
            assert river_of[studio] == {river}
            checked += 1
    assert checked > 50


def test_the_format_is_wikitexts(corpus):
    text = text_of(corpus["train"])
    lines = text.split("\n")
    assert lines[-1] == "" and all(
        line.startswith(" ") and line.endswith(" ") for line in lines[:-1]
    )
    assert all(
        line == " " or not line.startswith("  ") and "  " not in line for line in lines
    )
    for line in lines:
        if line.startswith(" = "):
            assert re.fullmatch(r" = [^=]+ = | = = [^=]+ = = ", line)
    assert not re.search(
        r"\w[.,;:?!\"()]|[({\[]\w|\w'|[|{}<>\[\]]", text
    )  # punctuation is spaced
    assert not re.search(r"\d,\d|\d\.\d|\w-\w", text)
    assert not re.search(r"(?: \. | \n )[a-z]", text)  # sentences begin with a capital
    for mark in (" @,@ ", " @.@ ", " @-@ ", " 's ", " – ", ' " '):
        assert mark in text
    assert text.startswith(" \n = ") and all(
        a.text.endswith(" . \n \n") or a.text.endswith(' " \n \n')
        for a in corpus["train"]
    )


def test_question_marks_are_rare(corpus):
    text = text_of(corpus["train"])
    assert 0 < text.count(" ? ") < len(text) / 20_000


def test_a_filler_may_not_exclude_what_is_untold():
    person = Entity("person", 0)
    stranger = Filler("y", "@person", ("friend",))
    told = {(person, "friend"): 1.0}
    friend = tinywiki.know(0, person)[0]["friend"]
    others = Walk(0, person, "").candidates(stranger, BEGINNING._replace(told=told))
    assert len(others) == FAMOUS["person"] - 2
    assert person not in others and friend not in others
    with pytest.raises(TinyWikiError, match="person.txt: a filler excludes 'friend'"):
        Walk(0, person, "").candidates(stranger, BEGINNING)


def test_a_size_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setitem(FAMOUS, "river", 10)
    with pytest.raises(TinyWikiError, match="SIZE has .*'river': 10") as caught:
        world.__wrapped__()
    assert "\n" not in str(caught.value)


def test_a_smaller_world_is_as_sound():
    """The settings may be made smaller: facts agree, one derivation each."""
    program = """
import gptlib.workshop.tinywiki as t
t.FAMOUS.update(town=12, river=6, team=10, species=5, ship=4, album=5, person=12)
wiki = t.TinyWiki()
for k in range(150):
    article = wiki.article("train", k)
    assert wiki.parse(article.text) == [article]
for index, _ in wiki.entities("town"):
    town = wiki.facts("town", index)
    assert t.Entity("town", index) in wiki.facts(*town["river"])["towns"]
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("towns", [18, 24])
def test_no_famous_person_lives_in_the_town_of_birth(towns):
    """`admired in {town}` and `admired in {home}` would be two ways to one text."""
    program = f"""
import gptlib.workshop.tinywiki as t
t.FAMOUS.update(town={towns}, river={towns // 2}, team={towns}, person={towns})
for seed in range(3):
    for k in range({towns}):
        person = t.Entity("person", k)
        facts = t.know(seed, person)[0]
        assert facts["home"] != facts["town"], (seed, k)
        assert facts["home"].number in range({towns})
        for draws in range(2):
            walk = t.Walk(seed, person, t.Draws(seed, str((k, draws))))
            (article,) = t.articles_along(walk)
            assert t.TinyWiki(seed).parse(article.text) == [article]
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TinyWiki(-1), "seed is -1"),
        (lambda: TinyWiki("0"), "seed is '0'"),
        (
            lambda: TinyWiki().article("dev", 0),
            "split is 'dev'; it must be one of train",
        ),
        (lambda: TinyWiki().articles("dev"), "split is 'dev'"),
        (lambda: TinyWiki().articles("train", 0), "n_bytes is 0; it must be one of 1"),
        (lambda: TinyWiki().article("train", -1), "article number is -1"),
        (lambda: TinyWiki().facts("planet", 0), "kind is 'planet'"),
        (lambda: TinyWiki().facts("town", 10**6), "index of a town is 1000000"),
        (lambda: TinyWiki().facts("town", -1), "index of a town is -1"),
        (lambda: TinyWiki().entities("planet"), "kind is 'planet'"),
    ],
)
def test_bad_arguments_give_one_line(call, words):
    with pytest.raises(GptlibError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_shell_says_what_is_wrong():
    done = subprocess.run(
        [sys.executable, "-m", "gptlib.workshop.tinywiki", "--split", "dev"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("tinywiki: split is 'dev'")
