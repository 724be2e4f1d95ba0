"""TinyWiki: a corpus whose entropy is known.

Tangled from book/workshop/W9_tinywiki.md; change it there, not here.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from gptlib import GptlibError
from gptlib.workshop.grammar import (
    CALENDAR,
    Choice,
    Filler,
    Kind,
    Node,
    Slot,
    TinyWikiError,
    entity_kind,
    load_world,
)


class Draws:
    """Whole numbers that depend on seed, stream and how many were drawn, and no more.

    Word k of a stream is 64 bits of the BLAKE2b digest of `seed/stream/(k // 8)`.
    """

    def __init__(self, seed: int, stream: str):
        self.prefix, self.count, self.digest = f"{seed}/{stream}/", 0, b""

    def below(self, n: int) -> int:
        """A number in 0 .. n - 1, each with probability 1/n (to within n / 2**64)."""
        place = 8 * (self.count % 8)
        if place == 0:
            block = f"{self.prefix}{self.count // 8}".encode()
            self.digest = hashlib.blake2b(block, digest_size=64).digest()
        self.count += 1
        return int.from_bytes(self.digest[place : place + 8], "little") * n >> 64

    def pick(self, weights: tuple[int, ...]) -> int:
        """A position in `weights`, drawn with probability weight / sum of weights."""
        ends = list(itertools.accumulate(weights))
        return bisect.bisect(ends, self.below(ends[-1]))


SIZE = {  # kind: (famous entities, weight of its articles among all)
    "town": (22, 5),
    "river": (11, 3),
    "team": (22, 4),
    "species": (12, 3),
    "ship": (12, 3),
    "album": (12, 3),
    "person": (22, 5),
}
OBSCURE_AND_FAMOUS = (1, 9)  # 90% of the articles are about a famous entity
DEFAULT_BYTES = {"train": 6_000_000, "validation": 150_000, "test": 150_000}
KINDS, SPLITS = tuple(SIZE), tuple(DEFAULT_BYTES)
FAMOUS = {kind: famous for kind, (famous, _) in SIZE.items()}


@cache
def world() -> dict[str, Kind]:
    """The world whose files come with gptlib. Raises TinyWikiError if SIZE misfits."""
    loaded = load_world(Path(str(resources.files("gptlib.workshop"))) / "world", KINDS)
    n_jobs, n = len(loaded["person"].facts["job"].values), FAMOUS
    if not n_jobs <= n["person"] == n["town"] == 2 * n["river"] >= n["team"] > 3:
        raise TinyWikiError(
            f"SIZE has {n}; the famous people must be as many as the towns, at least "
            f"{n_jobs}, the rivers half as many, the teams no more than towns, and 4"
        )
    return loaded


class Entity(NamedTuple):
    """Something an article can be about; the first numbers of a kind are the famous."""

    kind: str
    number: int  # from 0, within its kind

    @property
    def famous(self) -> bool:
        return self.number < FAMOUS[self.kind]


@cache
def arrangement(seed: int, name: str, n: int) -> tuple[int, ...]:
    """A permutation of 0 .. n - 1, each equally likely (Fisher and Yates)."""
    draws, order = Draws(seed, f"arrangement/{name}"), list(range(n))
    for last in range(n - 1, 0, -1):
        other = draws.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


@cache
def titles(seed: int, kind: str) -> tuple[str, ...]:
    """The titles of a kind by index: every combination of its parts, shuffled."""
    title, parts = world()[kind].title, world()[kind].parts
    if parts[0][0].startswith("@"):  # a team is called by its town
        return tuple(map(title.format, titles(seed, parts[0][0][1:])))
    parts = [[part for part in line if part != "/"] for line in parts]
    spelled = [title.format(*words) for words in itertools.product(*parts)]
    return tuple(spelled[k] for k in arrangement(seed, f"names/{kind}", len(spelled)))


def entity_of(seed: int, title: str) -> Entity | None:
    """The entity whose article has this title; None if there is none."""
    for kind in KINDS:
        if title in titles(seed, kind):
            return Entity(kind, titles(seed, kind).index(title))
    return None


def pool(values: tuple | range | str, subject: Entity) -> tuple | range:
    """The equally likely values of a fact or filler.

    `@town` stands for the famous towns, `@singer` for the famous people with that job,
    in both cases without the subject itself.
    """
    if not isinstance(values, str):
        return values
    if values in CALENDAR:
        return CALENDAR[values]
    kind, first, step = entity_kind(world(), values), 0, 1
    if values != "@" + kind:
        jobs = list(world()["person"].facts["job"].values)
        first, step = jobs.index(values[1:]), len(jobs)
    found = (Entity(kind, index) for index in range(first, FAMOUS[kind], step))
    return tuple(entity for entity in found if entity != subject)


def agree_on_places(seed: int, entity: Entity, facts: dict, sizes: dict) -> None:
    """Facts that towns, rivers and teams share: two famous towns lie on each river."""
    kind, index = entity
    rivers = arrangement(seed, "rivers", FAMOUS["town"])
    births = arrangement(seed, "births", FAMOUS["town"])
    if kind == "town":
        facts["team"] = Entity("team", index)
        if entity.famous:  # the river of an obscure town stays as it was drawn
            facts["river"] = Entity("river", rivers[index] // 2)
            facts["native"] = Entity("person", births.index(index))
            sizes["native"] = FAMOUS["person"]
    elif kind == "team":
        facts["town"] = Entity("town", index)
    else:
        facts["short"] = facts["name"].removeprefix("River ")
        if entity.famous:
            towns = tuple(Entity("town", rivers.index(2 * index + k)) for k in (0, 1))
            facts |= {"towns": towns, "upper": towns[0], "lower": towns[1]}
            sizes["towns"] = FAMOUS["town"] * (FAMOUS["town"] - 1)


def agree_on_people(seed: int, entity: Entity, facts: dict, sizes: dict) -> None:
    """Facts that people share: friends are each other's, a town has one native."""
    index, n = entity.number, FAMOUS["person"]
    friends, births = (arrangement(seed, key, n) for key in ("friends", "births"))
    jobs = list(world()["person"].facts["job"].values)
    first_names = world()["person"].parts[0]
    draws = Draws(seed, f"fact/person/{index}/arranged")
    job, town, friend = draws.below(len(jobs)), draws.below(n), draws.below(n)
    if entity.famous:
        job, town = index % len(jobs), births[index]
        friend = friends[friends.index(index) ^ 1]
        if facts.get("home") == Entity("town", town):  # lives in another one
            other = (town + 1 + draws.below(n - 1)) % n
            facts["home"] = Entity("town", other)
    facts |= {"town": Entity("town", town), "friend": Entity("person", friend)}
    sizes |= {"town": n, "friend": n - entity.famous, "job": len(jobs)}
    facts["job"] = jobs[job]
    facts["first"], facts["last"] = facts["name"].split(" ")
    woman = first_names.index(facts["first"]) < first_names.index("/")
    pronouns = ("she", "her", "her") if woman else ("he", "his", "him")
    facts |= zip(("she", "her", "him"), pronouns)


@lru_cache(maxsize=4096)
def know(seed: int, entity: Entity) -> tuple[dict[str, Any], dict[str, int]]:
    """Facts of an entity, and how many values each could have had."""
    declared = world()[entity.kind].facts
    facts: dict[str, Any] = {"name": titles(seed, entity.kind)[entity.number]}
    sizes: dict[str, int] = {}
    for name, fact in declared.items():
        if not fact.how and not fact.whole:
            values = pool(fact.values, entity)
            draws = Draws(seed, f"fact/{entity.kind}/{entity.number}/{name}")
            facts[name], sizes[name] = values[draws.below(len(values))], len(values)
    if entity.kind in ("town", "river", "team"):
        agree_on_places(seed, entity, facts, sizes)
    elif entity.kind == "person":
        agree_on_people(seed, entity, facts, sizes)
    for name, fact in declared.items():
        if fact.whole and isinstance(fact.values, tuple):
            place = list(declared[fact.whole].values).index(facts[fact.whole])
            facts[name] = fact.values[place]
    return facts, sizes


def spell(seed: int, value: object) -> str:
    """The words for a value; an entity goes by its name, without the word River."""
    if not isinstance(value, Entity):
        return str(value)
    facts = know(seed, value)[0]
    return str(facts.get("short", facts["name"]))


class State(NamedTuple):
    """A way through the grammar so far: place in the text, fillers, and its price."""

    at: int
    names: dict[str, Any]
    choices: tuple[tuple[str, float], ...]  # (sort, nats) of each
    told: dict[tuple[Entity, str], float]  # (entity, fact): nats, when first told


class Walk:
    """Ways through a grammar: one drawn by chance, or all that write a given text.

    From draws it writes: it draws one option at each choice and adds its words to
    `text`. From a text it reads: it takes every option and keeps the ways whose words
    stand in the text.
    """

    def __init__(self, seed: int, subject: Entity, source: str | Draws):
        self.seed, self.subject = seed, subject
        self.text = source if isinstance(source, str) else ""
        self.draws = None if isinstance(source, str) else source

    def steps(self, node: Node, state: State) -> list[State]:
        """Every state in which a node can leave a walk that comes in `state`."""
        if isinstance(node, str):
            return self.say(node, *state)
        if isinstance(node, Slot):
            value, state = self.look_up(node.path, state)
            words = spell(self.seed, value)
            words = words[0].upper() + words[1:] if node.capital else words
            return self.say(words, *state)
        if isinstance(node, Filler):
            values, found = self.candidates(node, state), []
            for k, (at, names, *price) in self.choose("filler", len(values), (), state):
                words = spell(self.seed, values[k])
                found += self.say(words, at, {**names, node.name: values[k]}, *price)
            return found
        if isinstance(node, Choice):
            if node.needs and node.needs not in know(self.seed, self.subject)[0]:
                return [state]
            sort, found = "inclusion" if node.weights else "wording", []
            for k, after in self.choose(sort, len(node.options), node.weights, state):
                found += self.steps(node.options[k], after)
            return found
        states = [state]
        for child in node:
            states = [after for before in states for after in self.steps(child, before)]
        return states

    def say(self, words: str, at: int, *state) -> list[State]:
        """The state after some words, if they stand in the text."""
        if self.draws:
            self.text += words
        if self.text.startswith(words, at):
            return [State(at + len(words), *state)]
        return []

    def choose(
        self, sort: str, n: int, weights: tuple[int, ...], state: State
    ) -> list[tuple[int, State]]:
        """The option drawn, or each of n, with the state that has paid for it."""
        options: Iterable[int] = range(n)
        if self.draws:
            options = [self.draws.pick(weights) if weights else self.draws.below(n)]
        (at, names, paid, told), found, total = state, [], sum(weights)
        for k in options:
            nats = math.log(total / weights[k] if weights else n)
            found.append((k, State(at, names, (*paid, (sort, nats)), told)))
        return found

    def look_up(self, path: tuple[str, ...], state: State) -> tuple[object, State]:
        """What `{a.b}` stands for, and the state that has told it.

        A fact has its price the first time; a part of a fact stands for the whole.
        """
        value, told = state.names.get(path[0], self.subject), dict(state.told)
        for name in path[1:] if path[0] in state.names else path:
            fact = world()[value.kind].facts[name]
            facts, sizes = know(self.seed, value)
            whole = fact.whole or name
            if fact.how != "given":
                told.setdefault((value, whole), math.log(sizes[whole]))
            value = facts[name]
        return value, State(*state[:3], told)

    def candidates(self, filler: Filler, state: State) -> tuple | range:
        """What a filler is drawn from: it may exclude only what the text has told."""
        values, besides = pool(filler.values, self.subject), []
        for name in filler.without:
            value, after = self.look_up((name,), state)
            if len(after.told) > len(state.told):
                raise TinyWikiError(
                    f"{self.subject.kind}.txt: a filler excludes {name!r}, which the "
                    "text has not told; tell it first"
                )
            besides.append(value)
        return tuple(v for v in values if v not in besides) if besides else values


@dataclass(frozen=True)
class Article:
    """An article, every choice behind it and every fact in it, with their nats."""

    text: str
    subject: Entity
    title: str
    choices: tuple[tuple[str, float], ...]  # entity, inclusion, wording or filler
    told: dict[tuple[Entity, str], float]  # by (entity, fact)

    @property
    def nats_known(self) -> float:
        """The price for a reader who knows the grammar and all facts."""
        return math.fsum(nats for _, nats in self.choices)

    @property
    def nats_unknown(self) -> float:
        """The price for a reader who knows the grammar and no facts."""
        return math.fsum([n for _, n in self.choices] + list(self.told.values()))

    @property
    def nats_floor(self) -> float:
        """The price for a reader who knows the grammar and the facts of the famous."""
        new = [n for (entity, _), n in self.told.items() if not entity.famous]
        return math.fsum([n for _, n in self.choices] + new)


def articles_along(walk: Walk) -> list[Article]:
    """An article for each way through the grammar that writes the whole text."""
    kind, index = subject = walk.subject
    title = titles(walk.seed, kind)[index]
    n = FAMOUS[kind] if subject.famous else len(titles(walk.seed, kind)) - FAMOUS[kind]
    weights = [weight for _, weight in SIZE.values()]
    chances = (
        SIZE[kind][1] / sum(weights),
        OBSCURE_AND_FAMOUS[subject.famous] / sum(OBSCURE_AND_FAMOUS),
        1 / n,
    )
    start = State(0, {}, tuple(("entity", -math.log(p)) for p in chances), {})
    return [
        Article(walk.text, subject, title, state.choices, state.told)
        for state in walk.steps(world()[kind].tree, start)
        if state.at == len(walk.text)
    ]


def draw_subject(seed: int, draws: Draws) -> Entity:
    """The entity that an article is about."""
    kind = KINDS[draws.pick(tuple(weight for _, weight in SIZE.values()))]
    if draws.pick(OBSCURE_AND_FAMOUS):
        return Entity(kind, draws.below(FAMOUS[kind]))
    n = len(titles(seed, kind)) - FAMOUS[kind]
    return Entity(kind, FAMOUS[kind] + draws.below(n))


@dataclass(frozen=True)
class TinyWiki:
    """An encyclopedia of an invented world, of any length, a function of `seed`.

    Raises TinyWikiError for a seed, split, kind, index or size that does not exist.
    """

    seed: int = 0

    def __post_init__(self):
        _check(
            "seed", self.seed, isinstance(self.seed, int) and self.seed >= 0, "0, 1 ..."
        )

    def facts(self, kind: str, index: int) -> dict[str, Any]:
        """Everything that is true of an entity: words, numbers and other entities."""
        _check("kind", kind, kind in KINDS, ", ".join(KINDS))
        n = len(titles(self.seed, kind))
        _check(f"index of a {kind}", index, 0 <= index < n, f"0 .. {n - 1}")
        return dict(know(self.seed, Entity(kind, index))[0])

    def entities(self, kind: str, famous: bool = True) -> list[tuple[int, str]]:
        """(index, title) of the famous entities of a kind, or of all the others."""
        self.facts(kind, 0)
        every, n = list(enumerate(titles(self.seed, kind))), FAMOUS[kind]
        return every[:n] if famous else every[n:]

    def article(self, split: str, number: int) -> Article:
        """Article `number` of a split, the same whatever else was asked for."""
        _check("split", split, split in SPLITS, ", ".join(SPLITS))
        _check("article number", number, number >= 0, "0, 1 ...")
        draws = Draws(self.seed, f"article/{split}/{number}")
        walk = Walk(self.seed, draw_subject(self.seed, draws), draws)
        return articles_along(walk)[0]

    def articles(self, split: str, n_bytes: int | None = None) -> Iterator[Article]:
        """Articles 0, 1, 2, ... until their UTF-8 text has reached `n_bytes`.

        Default: DEFAULT_BYTES of the split.
        """
        _check("split", split, split in SPLITS, ", ".join(SPLITS))
        wanted = DEFAULT_BYTES[split] if n_bytes is None else n_bytes
        _check("n_bytes", wanted, wanted >= 1, "1, 2 ...")
        return self._until(split, wanted)

    def _until(self, split: str, wanted: int) -> Iterator[Article]:
        size = 0
        for number in itertools.count():
            if size >= wanted:
                return
            article = self.article(split, number)
            size += len(article.text.encode())
            yield article

    def parse(self, text: str) -> list[Article]:
        """One Article per derivation of `text`; empty if this world cannot have it."""
        title = re.match(r" \n = (.+?) = \n", text)
        subject = entity_of(self.seed, title[1]) if title else None
        return articles_along(Walk(self.seed, subject, text)) if subject else []


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise TinyWikiError(f"{name} is {value!r}; it must be one of {allowed}")


def main() -> None:
    """Writes a split to standard output."""
    parser = argparse.ArgumentParser(description="Write TinyWiki to standard output.")
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--bytes", type=int, help="to the end of an article")
    parser.add_argument("--seed", type=int, default=0, help="number of the world")
    options = parser.parse_args()
    try:
        for article in TinyWiki(options.seed).articles(options.split, options.bytes):
            sys.stdout.buffer.write(article.text.encode())
    except GptlibError as error:
        sys.exit(f"tinywiki: {error}")


if __name__ == "__main__":
    main()
