"""A grammar in files.

Tangled from book/workshop/W13_grammar.md; change it there, not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gptlib import GptlibError


class TinyWikiError(GptlibError):
    """A file of the world, a setting or an argument that TinyWiki cannot use."""


class Slot(NamedTuple):
    """`{a.b}`: fact b of a, a fact of the subject or a filler; `^` is a capital."""

    path: tuple[str, ...]
    capital: bool = False


class Filler(NamedTuple):
    """`<x=town/a>`, `<1900..1950>`: drawn for this sentence, with equal chances."""

    name: str
    values: tuple | range | str
    without: tuple[str, ...] = ()


class Choice(NamedTuple):
    """One of `options`, with chances in proportion to `weights` (none: equal chances).

    A subject without the fact `needs` has nothing here, and nothing is drawn.
    """

    options: list
    weights: tuple[int, ...] = ()
    needs: str = ""


Node = str | Slot | Filler | Choice | list  # a list is what its parts say, in order


MONTHS = "January February March April May June July August September October November"
CALENDAR: dict[str, tuple | range] = {
    "@month": (*MONTHS.split(), "December"),
    "@day": range(1, 29),
}
UNITS: dict[str, Callable[[int], str]] = {
    "count": lambda n: f"{n:,}".replace(",", " @,@ "),
    "m": lambda n: f"{n} m ( {n * 3281 // 1000} ft )",
    "km": lambda n: f"{n} km ( {n * 621 // 1000} mi )",
    "mm": lambda n: f"{n} mm ( {n * 394 // 10000} @.@ {n * 394 // 1000 % 10} in )",
    "half knots": lambda n: f"{n // 2} @.@ {n % 2 * 5} knots",
    "square kilometres": lambda n: f"{UNITS['count'](n)} square kilometres",
}


def read_values(text: str) -> tuple | range | str:
    """The values of a fact or filler: `A / B`, `1900..1950 by STEP UNIT`, `@kind`."""
    if text.startswith("@"):
        return text
    values: tuple | range = tuple(text.split(" / "))
    if found := re.fullmatch(r"(\d+)\.\.(\d+)(?: by (\d+))?(?: (.+))?", text):
        first, last, step, unit = found.groups("")
        values = range(int(first), int(last) + 1, int(step or 1))
        if unit:
            values = tuple(map(UNITS.get(unit, lambda n: ""), values))
    if not values or "" in values or len(set(values)) < len(values):
        raise ValueError(
            f"{text!r} must be values without a double, or FIRST..LAST by STEP UNIT, "
            f"where UNIT is nothing, {', '.join(UNITS)}"
        )
    return values


def compile_wording(text: str) -> list:
    """A wording as a list of strings, slots, fillers and choices (`[this|that]`).

    Where ` [this|] ` may come out empty, the space before it goes with `this`. Raises
    ValueError for brackets that do not match.
    """
    tokens = re.findall(r"[\[|]|\] ?|\{\^?[\w.]+\}|<[^<>]+>|[^][|{}<>]+", text)
    stack: list[list[list]] = [[[]]]  # for each open bracket its options so far
    for token in tokens:
        before = stack[-1][-1]
        if token == "[":
            stack.append([[]])
        elif token == "|" or token[0] == "]" and len(stack) == 1:
            stack[-1].append([])  # outside brackets it will be noticed below
        elif token[0] == "]":
            options, before = stack.pop(), stack[-1][-1]
            if [] in options and token == "] " and before and before[-1][-1:] == " ":
                before[-1] = before[-1][:-1]
                options = [[" ", *option] if option else option for option in options]
            before.append(Choice(options))
            before.extend(token[1:])
        elif token[0] == "{":
            before.append(Slot(tuple(token.strip("{^}").split(".")), token[1] == "^"))
        elif token[0] == "<":
            words, *without = token[1:-1].split("/")
            name, _, domain = words.rpartition("=")
            values = read_values(domain if ".." in domain else "@" + domain)
            before.append(Filler(name, values, tuple(without)))
        else:
            before.append(token)
    if "".join(tokens) != text or len(stack) > 1 or len(stack[0]) > 1:
        raise ValueError(f"brackets in {text.strip()!r} do not match")
    return stack[0][0]


class Fact(NamedTuple):
    """What a fact can be: `values`, all equally likely, and how it comes about.

    `how` is "" for a fact drawn by itself, "agreed" for one dealt out so that articles
    agree, "given" for one that follows from the title and costs nothing. `whole` is
    the fact of which this one is a part.
    """

    values: tuple | range | str = ()
    how: str = ""
    whole: str = ""


@dataclass
class Kind:
    """A kind of article as its file describes it."""

    name: str
    title: str = ""
    parts: list[list[str]] = field(default_factory=list)  # of its names
    facts: dict[str, Fact] = field(default_factory=lambda: {"name": Fact(how="given")})
    asks: dict[str, list[str]] = field(default_factory=dict)  # fact: opening, question
    open: list[list] = field(  # the article, and those of its parts not yet closed
        default_factory=lambda: [[" \n = ", Slot(("name",)), " = \n \n", ""]]
    )

    @property
    def tree(self) -> list:
        """The grammar of the whole article."""
        return self.open[0]


DECLARATIONS = ("title", "part", "fact", "ask")


def declare(world: dict[str, Kind], kind: Kind, line: str) -> None:
    """Take in a declaration; other lines are left alone."""
    key, _, rest = line.partition(" ")
    name, _, text = rest.partition(" = ")
    if key == "title":
        kind.title = rest
    elif key == "part":
        words = ["" if word == "-" else word for word in rest.split()]
        if not words or len(set(words)) < len(words):
            raise ValueError(f"{line!r} must list words, no two alike")
        kind.parts.append(words)
    elif key == "ask":
        kind.asks[name] = text.split(" | ")
        if len(kind.asks[name]) != 2:
            raise ValueError(f"{line!r} must read `ask FACT = OPENING | QUESTION`")
    elif key == "fact":
        name, _, whole = name.partition(" of ")
        ((how, values),) = re.findall(r"^(?:(given|agreed)\b ?)?(.*)", text)
        fact = Fact(read_values(values) if values else (), how, whole)
        if name in kind.facts or not text or whole and whole not in kind.facts:
            raise ValueError(f"{line!r} declares {name!r} twice, or as part of nothing")
        n = len(kind.facts[whole].values) if whole else 0
        if whole and isinstance(fact.values, tuple) and len(fact.values) != n:
            raise ValueError(f"{name!r} must have {n} values, one for each {whole!r}")
        kind.facts[name] = fact


def read_line(world: dict[str, Kind], kind: Kind, line: str) -> None:
    """Take in a line of the article; check that what a line speaks of exists."""
    mark, _, rest = line.partition(" ")
    depth = {"==": 1, "--": 2, "*": 3}.get(mark, 4)
    if mark in DECLARATIONS:
        words: list = [Filler("", "@" + at) for at in re.findall(r"@(\w[\w ]*)", rest)]
        if mark == "ask":
            name, _, text = rest.partition(" = ")
            words = compile_wording(f"{{{name}}}{text.replace(' | ', ' ')}")
    elif depth > len(kind.open):
        raise ValueError(f"{line!r} is no declaration and stands in no sentence")
    elif depth == 4:
        words = compile_wording(" " + line)
        if words in kind.open[3]:
            raise ValueError(f"{line!r} stands here for the second time")
        kind.open[3].append(words)
    else:
        words = open_part(kind, depth, rest)
    check_words(world, kind, words, {})


def open_part(kind: Kind, depth: int, rule: str) -> list:
    """Open a section, paragraph or sentence; returns its heading."""
    check_closed(kind, depth)
    rule, _, heading = rule.partition(" | ")
    weight, _, fact = rule.partition(" if ")
    if weight not in map(str, range(1, 17)) or fact and fact not in kind.facts:
        raise ValueError(f"{rule!r} must be a chance of 1 to 16, and `if` a fact")
    if depth == 3 and kind.open[2] == [" \n"] and rule != "16":
        raise ValueError("the first sentence of a paragraph must have `* 16`")
    words = compile_wording(f" = = {heading} = = \n \n") if heading else []
    inside = [] if depth == 3 else [*words, " \n"]  # ends with what comes last
    node = Choice(inside) if depth == 3 else inside
    if weight != "16":
        node = Choice([[], node], (16 - int(weight), int(weight)), fact)
    elif fact:
        node = Choice([node], (16,), fact)
    kind.open[depth - 1].insert(-1, node)
    kind.open[depth:] = [inside]
    if depth == 1:
        open_part(kind, 2, "16")
    return words


def check_closed(kind: Kind, depth: int) -> None:
    """Raises ValueError if a part that ends here is empty."""
    if len(kind.open) == 3 and depth < 3 or kind.open[3:] == [[]]:
        raise ValueError("the section, paragraph or sentence that ends here is empty")


def entity_kind(world: dict[str, Kind], values: object) -> str:
    """The kind of the entities that `@...` stands for; "" for other values."""
    if not isinstance(values, str) or values in CALENDAR:
        return ""
    jobs = world["person"].facts.get("job", Fact()).values
    if values[1:] not in (*world, *jobs):
        known = ", ".join((*world, *jobs, "day", "month"))
        raise ValueError(f"{values[1:]!r} is unknown; choose one of {known}")
    return values[1:] if values[1:] in world else "person"


def check_words(world: dict[str, Kind], kind: Kind, node: Node, names: dict) -> None:
    """Raises ValueError if a node speaks of a fact or a kind that does not exist.

    names: the fillers so far, each with its kind.
    """
    if isinstance(node, Slot):
        at, path = names.get(node.path[0], kind.name), node.path
        for fact in path[1:] if path[0] in names else path:
            if not at or fact not in world[at].facts:
                raise ValueError(f"{'.'.join(path)}: {at or 'text'} has no {fact!r}")
            at = entity_kind(world, world[at].facts[fact].values)
    elif isinstance(node, Filler):
        names[node.name] = entity_kind(world, node.values)
        for fact in node.without:
            check_words(world, kind, Slot((fact,)), {})
    elif not isinstance(node, str):
        for child in node.options if isinstance(node, Choice) else node:
            check_words(world, kind, child, names)


def lines_of(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines of a world file that say something.

    `#` begins a comment; a line that begins with two spaces continues the one before.
    """
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("  ") and lines:
            number, start = lines.pop()
            line = f"{start} {line.strip()}"
        if line.strip() and not line.startswith("#"):
            lines.append((number, line.rstrip()))
    return lines


def load_world(folder: Path, kinds: Sequence[str]) -> dict[str, Kind]:
    """The kinds of article by name, each from its file.

    Raises TinyWikiError, naming file and line, for what does not follow the notation.
    """
    world = {name: Kind(name) for name in kinds}
    for step in (declare, read_line):
        for name, kind in world.items():
            number = 0
            try:
                for number, line in lines_of(folder / f"{name}.txt"):  # noqa: B007
                    step(world, kind, line)
                if not 0 < len(kind.parts) == kind.title.count("{}"):
                    raise ValueError(f"title {kind.title!r} needs a {{}} for each part")
                if step is read_line:
                    check_closed(kind, 1)
            except (OSError, ValueError) as error:
                raise TinyWikiError(f"{name}.txt, line {number}: {error}") from None
    return world
