"""Probes: what does the model know?.

Tangled from book/workshop/W10_probes.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from gptlib.gpt import GPT
from gptlib.sampling import generate
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.files import write_whole
from gptlib.workshop.run_folders import load_run
from gptlib.workshop.tinywiki import Entity, TinyWiki, pool, spell, world
from gptlib.workshop.watching import errors_in_one_line, read_options


@dataclass(frozen=True)
class Probe:
    """A prompt, the true answer (it follows after a space), and what one could answer.

    `family` is "name", "recall" or "question". A guesser who knows the rules of the
    world and none of its facts is right with probability 1 / len(candidates).
    """

    family: str
    prompt: str
    answer: str
    candidates: tuple[str, ...]


def name_probes(wiki: TinyWiki) -> Iterator[Probe]:
    """`... went to visit her friend` for famous people, with a comma and without."""
    people = dict(wiki.entities("person"))
    for index, name in people.items():
        facts = wiki.facts("person", index)
        friend = people[facts["friend"].number]
        others = tuple(other for other in people.values() if other != name)
        told = (
            f" {name} was friends with {friend} . In 1947 {facts['she']} went to visit"
        )
        for comma in ("", " ,"):
            prompt = f"{told} {facts['her']} friend{comma}"
            yield Probe("name", prompt, friend, others)


def fact_probes(wiki: TinyWiki) -> Iterator[Probe]:
    """Facts that a world file has an `ask` for: as training states them, and asked."""
    for kind, described in world().items():
        for fact, (opening, question) in described.asks.items():
            for index, name in wiki.entities(kind):
                facts = wiki.facts(kind, index)
                words = {key: spell(wiki.seed, value) for key, value in facts.items()}
                values = pool(described.facts[fact].values, Entity(kind, index))
                candidates = tuple(spell(wiki.seed, value) for value in values)
                prompt = f" \n = {name} = \n \n {opening.format(**words)}"
                yield Probe("recall", prompt, words[fact], candidates)
                prompt = " " + question.format(**words)
                yield Probe("question", prompt, words[fact], candidates)


def tinywiki_probes(seed: int = 0) -> list[Probe]:
    """The report's three examples, each as many probes of one world."""
    wiki = TinyWiki(seed)
    return [*name_probes(wiki), *fact_probes(wiki)]


def is_person_name(text: str) -> bool:
    """Whether a text, after spaces and commas, begins with a person's first name."""
    first = re.match(r"[ ,]*(\w+)", text)
    return first is not None and first[1] in world()["person"].parts[0]


@torch.no_grad()
def continuation_log_probs(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> np.ndarray:
    """Log-probability in nats of each continuation after its prompt, (n,) float64.

    pairs: token ids of prompt and continuation. A text longer than the block loses its
    oldest tokens.
    """
    longest = model.config.block_size + 1
    rows = [[*prompt, *continuation][-longest:] for prompt, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    found = np.zeros(len(rows))
    for first in tqdm(range(0, len(rows), batch_size), disable=not progress):
        group = order[first : first + batch_size]
        width = len(rows[group[-1]])
        padded = [rows[i] + [0] * (width - len(rows[i])) for i in group]
        tokens = torch.tensor(padded, device=model.device)  # (B, T + 1)
        hidden = model.hidden(tokens[:, :-1])  # (B, T, C)
        for b, i in enumerate(group):
            end = len(rows[i])
            part = slice(max(0, end - 1 - len(pairs[i][1])), end - 1)
            logits = model.head(
                hidden[b, part]
            ).float()  # what predicts the continuation
            found[i] = -F.cross_entropy(logits, tokens[b, 1:][part], reduction="sum")
    return found


def most_probable(
    model: GPT, tokenizer: Tokenizer, probes: Sequence[Probe], *, progress: bool = False
) -> list[str]:
    """For each probe, the candidate that the model finds most probable."""
    pairs = []
    for probe in probes:
        prompt = [tokenizer.start_of_text, *tokenizer.encode(probe.prompt)]
        pairs += [(prompt, tokenizer.encode(" " + word)) for word in probe.candidates]
    scores = iter(continuation_log_probs(model, pairs, progress=progress))
    best = []
    for probe in probes:
        own = [next(scores) for _ in probe.candidates]
        best.append(probe.candidates[own.index(max(own))])
    return best


def names_drawn(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    is_name: Callable[[str], bool],
    draws: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """For each prompt, how many of `draws` continuations begin with a person's name."""
    ids = [[tokenizer.start_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    counts = [0] * len(ids)
    options = {"temperature": temperature, "n_vocab": tokenizer.n_vocab}
    for length in sorted({len(row) for row in ids}):  # equal lengths make one batch
        group = [i for i, row in enumerate(ids) if len(row) == length]
        tokens = torch.tensor([ids[i] for i in group], device=model.device)
        tokens = tokens.repeat_interleave(draws, 0)  # (prompts * draws, length)
        drawn = generate(model, tokens, 8, generator=generator, **options)[:, length:]
        for row, continuation in enumerate(drawn.tolist()):
            counts[group[row // draws]] += is_name(tokenizer.decode(continuation))
    return counts


def names_anywhere(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    is_name: Callable[[str], bool],
    temperature: float,
    generator: torch.Generator,
    texts: int = 16,
    length: int = 100,
) -> float:
    """The share of words that are a person's name in text that the model draws."""
    tokens = torch.full((texts, 1), tokenizer.start_of_text, device=model.device)
    length = min(length, model.config.block_size - 1)
    options = {"temperature": temperature, "n_vocab": tokenizer.n_vocab}
    rows = generate(model, tokens, length, generator=generator, **options)[:, 1:]
    words = [word for row in rows.tolist() for word in tokenizer.decode(row).split()]
    return sum(map(is_name, words)) / max(1, len(words))


def wilson(rate: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate over n independent trials. Source: Wilson 1927."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class ProbeResult:
    """How often a family of probes succeeded, and how often a guesser would."""

    family: str  # name, recall or question
    scores: tuple[float, ...]  # for each prompt, the share of its draws that succeeded
    chance: float  # rate of a guesser, 0 to 1
    draws: int = 1  # per prompt

    @property
    def rate(self) -> float:
        return fmean(self.scores)

    def interval(
        self, level: float = 0.95, samples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Interval of the rate over prompts, which are the independent trials.

        Wilson's where each prompt succeeds or fails as a whole, else a bootstrap over
        prompts: the draws of one prompt resemble each other. Source: Efron and
        Tibshirani 1993, chapter 13.
        """
        scores = np.array(self.scores)
        if np.isin(scores, (0, 1)).all():
            return wilson(self.rate, len(scores), level)
        picks = np.random.default_rng(seed).integers(
            len(scores), size=(samples, len(scores))
        )
        low, high = np.quantile(
            scores[picks].mean(1), [(1 - level) / 2, (1 + level) / 2]
        )
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval()
        n = len(self.scores)
        counted = f"{round(sum(self.scores) * self.draws)} of {n * self.draws}"
        return (
            f"{self.family:9} {counted:>11}   {self.rate:6.1%}   "
            f"95% {low:6.1%} to {high:6.1%}   chance {self.chance:6.1%}"
        )


def run_probes(
    model: GPT,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    *,
    temperature: float = 1.2,
    draws: int = 4,
    seed: int = 0,
    is_name: Callable[[str], bool] = is_person_name,
    progress: bool = False,
) -> list[ProbeResult]:
    """One result for each family of probes, in the order in which they first occur.

    A recall or question probe succeeds if its answer is the most probable of its
    candidates (total log-probability after the end-of-text mark and the prompt); a name
    probe draws `draws` continuations at `temperature`, each a success if a name comes
    first. Its chance is the share of names among the words of text drawn from nothing.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    drawing: dict[str, Any] = {"is_name": is_name, "temperature": temperature}
    drawing["generator"] = generator
    results = []
    for family in dict.fromkeys(probe.family for probe in probes):
        own = [probe for probe in probes if probe.family == family]
        if family == "name":
            prompts = [probe.prompt for probe in own]
            counts = names_drawn(model, tokenizer, prompts, draws=draws, **drawing)
            scores = tuple(count / draws for count in counts)
            chance = names_anywhere(model, tokenizer, **drawing)
            results.append(ProbeResult(family, scores, chance, draws))
        else:
            best = most_probable(model, tokenizer, own, progress=progress)
            scores = tuple(float(b == p.answer) for b, p in zip(best, own))
            chance = fmean(1 / len(probe.candidates) for probe in own)
            results.append(ProbeResult(family, scores, chance))
    return results


@dataclass(frozen=True)
class ProbeOptions:
    """Measure on TinyWiki's facts what a trained model knows."""

    run: Path  # the --out folder of a training run
    which: str = "best"  # checkpoint: best or last
    device: str = "auto"
    temperature: float = 1.2  # of the name probes
    draws: int = 4  # per name probe
    out: Path | None = None  # write the score of every probe here, as JSON


def probe_run(options: ProbeOptions, *, progress: bool = True) -> list[ProbeResult]:
    """Run TinyWiki's probes on a run, as the command line does."""
    run = load_run(options.run, options.which, device=options.device)
    results = run_probes(
        run.model,
        run.tokenizer,
        tinywiki_probes(),
        temperature=options.temperature,
        draws=options.draws,
        progress=progress,
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found = [dataclasses.asdict(result) for result in results]
        write_whole(options.out, json.dumps(found) + "\n")
    return results


def main() -> None:
    """`gptlib probe --run RUN`."""
    with errors_in_one_line():
        print("\n".join(map(str, probe_run(read_options(ProbeOptions)))))


if __name__ == "__main__":
    main()
