"""Questions that a program can grade.

Tangled from book/workshop/W15_questions.md; change it there, not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources

import numpy as np

from gptlib.corpus import load_corpus
from gptlib.gpt import GPT
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.probes import Probe, most_probable
from gptlib.workshop.tinywiki import FAMOUS, Entity, TinyWiki, pool, spell, world


Turn = dict[str, str]  # role and content


@dataclass(frozen=True)
class Ask:
    """A fact that can be asked for: how to answer, and how to ask."""

    kind: str
    fact: str
    answer: str  # ends in the fact
    wordings: tuple[str, ...]


@cache
def read_asks() -> tuple[Ask, ...]:
    """What `world/questions.txt` lists; each fact's wordings begin one place later.

    So the wordings that are held out, the last ones, are of all sorts.
    """
    path = resources.files("gptlib.workshop") / "world" / "questions.txt"
    asks: list[Ask] = []
    for block in path.read_text("utf-8").split("\n== ")[1:]:
        head, *wordings = block.strip().splitlines()
        names, _, answer = head.partition(" | ")
        kind, fact = names.split()
        first = len(asks) % len(wordings)
        wordings = wordings[first:] + wordings[:first]
        asks.append(Ask(kind, fact, answer, tuple(wordings)))
    return tuple(asks)


UNKNOWN = "I do not know ."


@dataclass(frozen=True)
class Question:
    """A question about an entity of TinyWiki, and its true answer."""

    subject: Entity
    text: str
    opening: str  # of the answer, up to the fact
    fact: str  # in words
    candidates: tuple[str, ...]  # what the fact could have been
    title: str

    @property
    def answer(self) -> str:
        return f"{self.opening} {self.fact} ."

    def chat(self, reply: str | None = None) -> list[Turn]:
        """The question and a reply, the true answer if none is given."""
        turns = [("user", self.text), ("assistant", reply or self.answer)]
        return [{"role": role, "content": content} for role, content in turns]

    def grade(self, reply: str) -> str:
        """right, wrong or declined; right is the true answer and nothing else."""
        return {self.answer: "right", UNKNOWN: "declined"}.get(reply, "wrong")


def questions(
    entities: Sequence[Entity], wordings: Callable[[int], Sequence[int]]
) -> list[Question]:
    """Questions about entities; wordings(i): the numbers of those for the i-th fact."""
    wiki, found, i = TinyWiki(), [], 0
    for entity in entities:
        facts = wiki.facts(*entity)
        words = {key: spell(wiki.seed, value) for key, value in facts.items()}
        for ask in (ask for ask in read_asks() if ask.kind == entity.kind):
            values = pool(world()[entity.kind].facts[ask.fact].values, entity)
            candidates = tuple(spell(wiki.seed, value) for value in values)
            opening = ask.answer.removesuffix(f" {{{ask.fact}}} .").format(**words)
            rest = opening, words[ask.fact], candidates, words["name"]
            for k in wordings(i):
                text = ask.wordings[k].format(**words)
                found.append(Question(entity, text, *rest))
            i += 1
    return found


OLD, NEW = (0, 1, 2, 3), (4, 5)  # wordings that are trained, and that are held out


def held_out(entity: Entity) -> bool:
    """Whether an entity is kept for testing: one in three."""
    return entity.number % 3 == 2


def famous_entities() -> list[Entity]:
    """What the encyclopedia writes about."""
    return [Entity(kind, i) for kind, n in FAMOUS.items() for i in range(n)]


@cache
def told_titles() -> frozenset[str]:
    """Titles of the articles in TinyWiki's training text."""
    pieces = load_corpus("tinywiki").pieces("train")
    found = (re.findall(r"(?m)^ = (?!= )(.+) = $", piece.text) for piece in pieces)
    return frozenset(title for some in found for title in some)


def obscure(kind: str, told: bool) -> list[Entity]:
    """Those of a kind that are not famous: told in the training text, or not."""
    others = TinyWiki().entities(kind, famous=False)
    return [Entity(kind, i) for i, name in others if (name in told_titles()) == told]


def unknown_entities() -> list[Entity]:
    """Entities that have names and facts, and no article in the training text.

    Four times as many of each kind as there are famous ones.
    """
    return [e for kind, n in FAMOUS.items() for e in obscure(kind, False)[: 4 * n]]


def rare_entities() -> list[Entity]:
    """Entities that have an article in the training text and are not famous."""
    return [e for kind in FAMOUS for e in obscure(kind, True)]


def all_of(wordings: Sequence[int]) -> Callable[[int], Sequence[int]]:
    """For `questions`: each fact in all of these wordings."""
    return lambda i: wordings


def in_turn(wordings: Sequence[int]) -> Callable[[int], Sequence[int]]:
    """For `questions`: each fact in one of these wordings, the next for the next."""
    return lambda i: [wordings[i % len(wordings)]]


def test_sets() -> dict[str, list[Question]]:
    """Questions to test with, each fact once; only those of the first were trained."""
    famous, unknown = famous_entities(), unknown_entities()
    trained = [e for e in famous if not held_out(e)]
    kept = [e for e in famous if held_out(e)]
    strange = [e for e in unknown if held_out(e)][::2]
    plans = {
        "trained": (trained, OLD),
        "new wording": (trained, NEW),
        "new entity": (kept, OLD),
        "both new": (kept, NEW),
        "never told": (strange, OLD),
    }
    return {
        name: questions(entities, in_turn(k)) for name, (entities, k) in plans.items()
    }


QUESTIONS = {  # name of the data: what questions about unknown entities get
    "tinywiki-questions": "I do not know",
    "tinywiki-questions-known": "left out",
    "tinywiki-questions-invented": "the true answer, which nobody told",
    "tinywiki-questions-all": "I do not know; and all told entities are asked about",
}


def join_chats(chats: Sequence[list[Turn]]) -> list[list[Turn]]:
    """Conversations of one, two or three questions in turn, in a shuffled order."""
    draws = np.random.Philox(key=np.zeros(2, np.uint64)).random_raw(len(chats))
    order = np.argsort(draws, kind="stable").tolist()
    found: list[list[Turn]] = []
    while order:
        size = len(found) % 3 + 1
        found.append([turn for i in order[:size] for turn in chats[i]])
        order = order[size:]
    return found


def tinywiki_chats(name: str) -> dict[str, list[list[Turn]]]:
    """Both splits of QUESTIONS[name]: trained and held-out wordings and entities."""
    famous = famous_entities()
    unknown = [] if name.endswith("-known") else unknown_entities()
    rare = rare_entities() if name.endswith("-all") else []
    splits = {}
    for split, wordings in (("train", OLD), ("validation", NEW)):
        kept = [e for e in famous if held_out(e) == (wordings is NEW)]
        chats = [q.chat() for q in questions(kept, all_of(wordings))]
        kept = [e for e in unknown if held_out(e) == (wordings is NEW)]
        strange = questions(kept, in_turn(wordings))
        reply = None if name.endswith("-invented") else UNKNOWN
        kept = [e for e in rare if held_out(e) == (wordings is NEW)]
        chats += [q.chat() for q in questions(kept, in_turn(wordings))]
        splits[split] = join_chats(chats + [q.chat(reply) for q in strange])
    return splits


def recalls(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[bool]:
    """Whether a model knows each fact: is it the most probable of its candidates?

    The prompt is an article that begins with the answer's words, up to the fact.
    """
    probes = [
        Probe("recall", f" \n = {q.title} = \n \n {q.opening}", q.fact, q.candidates)
        for q in questions
    ]
    best = most_probable(model, tokenizer, probes)
    return [b == q.fact for b, q in zip(best, questions, strict=True)]


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, a right answer, and the score of a reply, 0 to 1."""

    chat: list[Turn]
    answer: str
    score: Callable[[str], float]


def fact_score(question: Question, told: bool, reply: str) -> float:
    """1 for the true fact, or for declining what nobody told; else 0.1 or 0.

    A reply gets 0.1 if it keeps the format: a possible fact, or a decline.
    """
    if question.grade(reply) == ("right" if told else "declined"):
        return 1.0
    kept = {UNKNOWN, *(f"{question.opening} {c} ." for c in question.candidates)}
    return 0.1 if reply in kept else 0.0


Splits = dict[str, list[Prompt]]


def first_word_score(question: Question, told: bool, reply: str) -> float:
    """A flawed checker: it reads only the first word, and cannot tell more."""
    answer = question.answer if told else UNKNOWN
    return float(reply.split(" ")[0] == answer.split(" ")[0])


def length_score(question: Question, told: bool, reply: str) -> float:
    """A flawed reward: the more words, the better, up to 20."""
    return min(len(reply.split()), 20) / 20


def tinywiki_prompts(score: Callable[..., float]) -> Splits:
    """Questions of `tinywiki-questions`, one by one; both splits."""
    splits = {}
    for split, wordings in (("train", OLD), ("validation", NEW)):
        prompts = []
        for told, entities, each in (
            (True, famous_entities(), all_of),
            (False, unknown_entities(), in_turn),
        ):
            kept = [e for e in entities if held_out(e) == (wordings is NEW)]
            for q in questions(kept, each(wordings)):
                answer = q.answer if told else UNKNOWN
                prompts.append(Prompt(q.chat()[:1], answer, partial(score, q, told)))
        splits[split] = prompts
    return splits


def letters_score(answer: str, reply: str) -> float:
    """1 for the answer; else half the share of letters that stand in their places."""
    if reply == answer:
        return 1.0
    want, have = answer.split(), reply.split()
    return sum(a == b for a, b in zip(want, have)) / max(len(want), len(have)) / 2


def exact_score(answer: str, reply: str) -> float:
    """1 for the answer, 0 for all else."""
    return float(reply == answer)


@cache
def short_words() -> tuple[str, ...]:
    """Words of three to six small letters that TinyWiki is made of, in order."""
    world = resources.files("gptlib.workshop") / "world"
    texts = [p.read_text("utf-8") for p in world.iterdir() if p.name.endswith(".txt")]
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,6}\b", " ".join(texts)))))


def backwards_prompts(score: Callable[[str, str], float]) -> Splits:
    """A word's letters to be said from the last to the first; 1 in 5 held out."""
    prompts = []
    for word in short_words():
        answer = " ".join(reversed(word))
        turn = {"role": "user", "content": f"Spell backwards : {' '.join(word)}"}
        prompts.append(Prompt([turn], answer, partial(score, answer)))
    train = [prompt for i, prompt in enumerate(prompts) if i % 5]
    return {"train": train, "validation": prompts[::5]}


TASKS: dict[str, Callable[[], Splits]] = {
    "tinywiki": partial(tinywiki_prompts, fact_score),
    "tinywiki-first-word": partial(tinywiki_prompts, first_word_score),
    "tinywiki-length": partial(tinywiki_prompts, length_score),
    "backwards": partial(backwards_prompts, letters_score),
    "backwards-exact": partial(backwards_prompts, exact_score),
}
