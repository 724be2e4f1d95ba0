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

from gptlib.workshop.tinywiki import (
    DEFAULT_BYTES,
    FAMOUS,
    GRAMMAR,
    KINDS,
    SPLITS,
    Account,
    Entity,
    Reader,
    TinyWiki,
    all_titles,
    compile_wording,
    count_names,
    entity_of,
    title_of,
    tree_of,
)

FINGERPRINT = "4314e1abbf87c2183662920c2e9d616b78f41726b8a603e1fa71e8522212a508"  # of the default training text; changes only with the grammar


@pytest.fixture(scope="module")
def wiki():
    return TinyWiki()


@pytest.fixture(scope="module")
def corpus(wiki):
    return {split: list(wiki.articles(split)) for split in SPLITS}


def text_of(articles):
    return "".join(article.text for article in articles)


def test_the_text_is_the_same_everywhere(corpus):
    assert hashlib.sha256(text_of(corpus["train"]).encode()).hexdigest() == FINGERPRINT


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
        for account in ("nats_known", "nats_unknown", "nats_floor"):
            assert math.isclose(
                getattr(found[0], account), getattr(article, account), abs_tol=1e-9
            )


def test_the_reader_finds_the_choices_the_writer_made(wiki, corpus):
    for number, article in enumerate(corpus["validation"][:60]):
        (choices,) = Reader(
            0, Entity(article.kind, article.index), article.text
        ).derivations()
        account = wiki.writer("validation", number).account
        assert (
            len(choices) == len(account.choices) - 3
        )  # the kind, being famous, the name
        assert math.isclose(
            sum(nats for _, nats in account.choices), article.nats_known, abs_tol=1e-9
        )


def test_the_floors_are_ordered(corpus):
    for article in itertools.chain(*corpus.values()):
        assert 0 < article.nats_known <= article.nats_floor <= article.nats_unknown
        if article.famous:
            assert article.nats_floor == article.nats_known
    obscure = [article for article in corpus["train"] if not article.famous]
    assert all(article.nats_floor > article.nats_known for article in obscure)


def test_samples_agree_on_the_floor(corpus):
    rates = [
        sum(a.nats_floor for a in articles) / len(text_of(articles).encode())
        for articles in corpus.values()
    ]
    assert max(rates) / min(rates) < 1.06


def test_an_ambiguous_wording_is_found():
    planted = compile_wording(" It is [old|small|old[ and small|]] .")
    reader = Reader(0, Entity("town", 0), " It is old .")
    assert len(reader.advance(planted, [(0, {}, ())])) == 2


@pytest.mark.parametrize("change", ["", "x", " \n = Nowhere = \n \n", "a town"])
def test_other_text_has_no_derivation(wiki, corpus, change):
    assert wiki.parse(change) == []
    article = next(a for a in corpus["train"] if "River" in a.text)
    assert wiki.parse(article.text + "x") == []
    assert wiki.parse(article.text.replace(" River ", " Rivers ")) == []


def test_names_are_a_bijection():
    assert len(all_titles()) == sum(count_names(kind) for kind in KINDS)
    for kind in KINDS:
        assert count_names(kind) >= 5000
        titles = {
            title_of(3, Entity(kind, index)) for index in range(count_names(kind))
        }
        assert len(titles) == count_names(kind)
        assert all(
            entity_of(3, title_of(3, Entity(kind, i))) == (kind, i)
            for i in range(0, count_names(kind), 97)
        )
    assert entity_of(0, "Nowhere") is None


def test_kinds_and_wordings_are_many():
    assert len(KINDS) >= 7 and 100 <= sum(FAMOUS.values()) <= 200
    for kind in KINDS:
        groups = re.findall(r"^\* .*\n((?:[^*=\n-].*\n)+)", GRAMMAR[kind], re.MULTILINE)
        assert len(groups) >= 9 and all(
            len(group.splitlines()) >= 5 for group in groups
        ), kind
        assert tree_of(kind)


def test_towns_rivers_and_people_agree(wiki):
    for index, _ in wiki.entities("town"):
        town = wiki.facts("town", index)
        assert Entity("town", index) in wiki.facts(*town["river"])["towns"]
        assert wiki.facts(*town["native"])["town"] == ("town", index)
    for index, _ in wiki.entities("person"):
        friend = wiki.facts("person", index)["friend"]
        assert friend.index != index and wiki.facts(*friend)["friend"] == (
            "person",
            index,
        )


def test_articles_agree_with_each_other(corpus):
    """Read the facts off the text with regular expressions and compare across articles."""
    river_of = {}
    for article in corpus["train"]:
        if article.kind == "town":
            river_of.setdefault(article.title, set()).update(
                re.findall(r"River (\w+)", article.text)
            )
    checked = 0
    assert all(len(rivers) == 1 for rivers in river_of.values())
    for article in corpus["train"]:
        town = article.title.split(" women 's")[0]
        if article.kind == "team" and town in river_of:
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
    assert 0 < text.count(" ? ") < 100


def test_probes_are_phrases_of_the_corpus(wiki, corpus):
    probes = wiki.probes()
    families = {
        family: [p for p in probes if p.family == family]
        for family in ("name", "recall", "question")
    }
    assert all(len(members) >= 40 for members in families.values())
    assert all(
        p.answer in p.candidates and len(set(p.candidates)) == len(p.candidates)
        for p in probes
    )
    text = text_of(corpus["train"])
    assert (
        sum(f"{p.prompt} {p.answer} " in text for p in families["recall"])
        > len(families["recall"]) / 2
    )
    assert not any(p.prompt in text for p in families["question"])
    assert wiki.is_person_name(" , Alice Winter") and wiki.is_person_name(
        f" {wiki.person_names()[5]}"
    )
    assert not wiki.is_person_name(" in the town") and not wiki.is_person_name("")


def test_a_filler_may_not_exclude_what_is_untold():
    with pytest.raises(ValueError, match="'friend' before the text tells it"):
        Account(0).check_told(Entity("person", 0), "friend")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TinyWiki(-1), "seed -1"),
        (lambda: TinyWiki("0"), "seed '0'"),
        (
            lambda: TinyWiki().article("dev", 0),
            "split 'dev' is unknown; choose one of train",
        ),
        (lambda: TinyWiki().articles("dev"), "split 'dev'"),
        (lambda: TinyWiki().articles("train", 0), "n_bytes 0 must be at least 1"),
        (lambda: TinyWiki().article("train", -1), "article number -1"),
        (lambda: TinyWiki().facts("planet", 0), "kind 'planet'"),
        (lambda: TinyWiki().facts("town", 10**6), "index 1000000"),
        (lambda: TinyWiki().entities("planet"), "kind 'planet'"),
    ],
)
def test_bad_arguments_give_one_line(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_shell_says_what_is_wrong():
    done = subprocess.run(
        [sys.executable, "-m", "gptlib.workshop.tinywiki", "--split", "dev"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith(
        "tinywiki: split 'dev' is unknown"
    )
