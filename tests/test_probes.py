"""Probes: true answers, probabilities of answers, intervals over prompts, the command."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine import BYTES, model_of

from gptlib.gpt import GPT, GPTConfig
from gptlib.workshop import probes as module
from gptlib.workshop.probes import (
    Probe,
    ProbeOptions,
    ProbeResult,
    continuation_log_probs,
    is_person_name,
    most_probable,
    names_drawn,
    probe_run,
    run_probes,
    tinywiki_probes,
    wilson,
)
from gptlib.workshop.tinywiki import Entity, TinyWiki, know, spell


@pytest.fixture(scope="module")
def families():
    found = {}
    for probe in tinywiki_probes():
        found.setdefault(probe.family, []).append(probe)
    return found


def test_probes_are_phrases_of_the_corpus(families):
    text = "".join(article.text for article in TinyWiki().articles("train"))
    assert set(families) == {"name", "recall", "question"}
    for members in families.values():
        assert len(members) >= 40
        for p in members:
            assert p.answer in p.candidates and len(set(p.candidates)) == len(
                p.candidates
            )
    recall = families["recall"]
    assert sum(f"{p.prompt} {p.answer} " in text for p in recall) > len(recall) / 2
    assert not any(p.prompt in text for p in families["question"])


def test_answers_are_the_facts(families):
    towns = [p for p in families["recall"] if "is a town on the River" in p.prompt]
    assert len(towns) == len({p.prompt for p in towns})
    for index, probe in enumerate(towns):
        river = know(0, Entity("town", index))[0]["river"]
        assert probe.answer == spell(0, river)
        assert probe.prompt.startswith(f" \n = {spell(0, Entity('town', index))} = \n")
    person = TinyWiki().facts("person", 0)
    name, comma = families["name"][:2]
    assert name.answer == comma.answer == spell(0, person["friend"])
    assert comma.prompt == name.prompt + " ," and name.prompt.endswith(" friend")


def test_other_worlds_have_other_answers():
    assert [p.answer for p in tinywiki_probes(1)] != [
        p.answer for p in tinywiki_probes()
    ]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [(" , Alice Winter", True), ("Wilma", True), (" in the town", False), ("", False)]
    + [(" /", False), (" Alicea", False), (" the Alice", False)],
)
def test_person_names(text, is_one):
    assert is_person_name(text) is is_one


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_continuations_of_any_length_cost_what_a_loop_says(batch_size):
    model, rng = model_of(), np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 264, n).tolist(), rng.integers(0, 264, m).tolist())
        for n in (1, 5, 12, 40)  # the last is longer than the block
        for m in (1, 4, 2)
    ]
    found = continuation_log_probs(model, pairs, batch_size=batch_size)
    for (prompt, continuation), nats in zip(pairs, found):
        row, expected = [*prompt, *continuation][-17:], 0.0
        for end in range(len(row) - len(continuation), len(row)):
            with torch.no_grad():
                logits = model(torch.tensor([row[:end]]))[0][0, -1].double()
            expected += logits.log_softmax(-1)[row[end]].item()
        assert nats == pytest.approx(expected, abs=1e-4)


class Parrot(GPT):
    """Continues any text with the bytes of ` Ann`, over and over, nearly surely."""

    def hidden(self, tokens, cache=None):
        if cache is not None:
            super().hidden(tokens, cache)
        following = {ord(a): ord(b) for a, b in zip(" Ann", "Ann ")}
        nxt = tokens.clone().cpu().apply_(lambda t: following.get(t, ord(" ")))
        nxt[tokens == ord("n")] = ord(" ")
        return 50.0 * torch.nn.functional.one_hot(nxt, 264).float()

    def head(self, hidden):
        return hidden


def test_probes_count_successes_of_a_model_whose_answers_are_known():
    model = Parrot(GPTConfig(1, 1, 8, 16, False, 264))
    probes = [
        Probe("recall", "Who ?", "Ann", ("Bob", "Ann", "Eve", "Kim")),
        Probe("recall", "Who ?", "Bob", ("Bob", "Ann")),
        Probe("question", "Who ?", "An", ("An", "Eve")),
        Probe("name", "her friend", "Bob", ("Bob",)),
        Probe("name", "a friend", "Bob", ("Bob",)),
    ]
    assert most_probable(model, BYTES, probes) == ["Ann", "Ann", "An", "Bob", "Bob"]
    is_name = lambda text: text.strip().startswith("A")
    recall, question, name = run_probes(model, BYTES, probes, is_name=is_name, draws=3)
    assert (recall.scores, recall.chance) == ((1.0, 0.0), (1 / 4 + 1 / 2) / 2)
    assert (question.scores, question.chance) == ((1.0,), 1 / 2)
    assert (name.scores, name.draws) == ((1.0, 1.0), 3) and name.chance > 0.9
    assert " 6 of 6 " in str(name) and " 1 of 2 " in str(recall)


def test_probes_run_at_chance_on_random_weights():
    rng, words = np.random.default_rng(0), ("ab", "cd", "ef", "gh")
    probes = [
        Probe("recall", f"{rng.integers(1e9)} is", words[i % 4], words)
        for i in range(200)
    ]
    (found,) = run_probes(model_of(), BYTES, probes)
    low, high = found.interval()
    assert found.chance == 0.25 and low < 0.25 < high


def test_draws_are_seeded_and_counted_for_their_own_prompt():
    model = model_of()
    prompts = ["x", "a longer one", "y", "zz"]

    def draw(seed, prompts=prompts, is_name=str.isascii):
        generator = torch.Generator().manual_seed(seed)
        return names_drawn(
            *(model, BYTES, prompts),
            **{"is_name": is_name, "draws": 40, "temperature": 1.2},
            generator=generator,
        )

    letter = lambda text: text[:1].isalpha()
    assert draw(1, is_name=letter) == draw(1, is_name=letter)
    assert draw(1, is_name=letter) != draw(2, is_name=letter)
    assert draw(1, is_name=lambda text: True) == [40, 40, 40, 40]
    # a model that repeats the last letter of its prompt: counts belong to their prompts
    repeats = lambda tokens, cache=None: (
        50.0 * torch.nn.functional.one_hot(tokens, 264).float()
    )
    model.hidden, model.head = repeats, lambda hidden: hidden
    assert draw(1, is_name=lambda text: text[0] in "xe") == [40, 40, 0, 0]


def test_wilson_interval():
    low, high = wilson(0.8, 10)  # values as in Newcombe 1998's method 3
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(1, 10)[1] == pytest.approx(1)
    assert ProbeResult("recall", (1.0,) * 8 + (0.0,) * 2, 0.5).interval() == (low, high)


def test_the_interval_is_over_prompts_not_over_draws():
    """Four draws that always agree say no more than one draw."""
    clustered = ProbeResult("name", (1.0, 0.0) * 24, 0.1, draws=4)
    assert clustered.interval() == wilson(0.5, 48)
    rng = np.random.default_rng(0)
    rates = rng.beta(0.2, 0.2, 48)  # prompts differ much from each other
    scores = tuple(float(x) for x in rng.binomial(4, rates) / 4)
    found = ProbeResult("name", scores, 0.1, draws=4)
    low, high = found.interval()
    expected = 2 * 1.96 * np.std(scores) / math.sqrt(48)
    assert low < found.rate < high and (low, high) == found.interval()
    assert high - low == pytest.approx(expected, rel=0.1)
    naive = wilson(found.rate, 192)
    assert high - low > 1.5 * (naive[1] - naive[0])


def test_the_command_writes_every_score(tmp_path, monkeypatch):
    class Run:
        model, tokenizer = model_of(), BYTES

    monkeypatch.setattr(module, "load_run", lambda *path, **options: Run)
    few = [Probe("recall", "a", "b", ("b", "c")), Probe("name", "a", "b", ("b",))]
    monkeypatch.setattr(module, "tinywiki_probes", lambda: few)
    out = tmp_path / "new" / "probes.json"
    results = probe_run(ProbeOptions(tmp_path, draws=2, out=out), progress=False)
    written = json.loads(out.read_text())
    assert [row["family"] for row in written] == ["recall", "name"]
    assert written[1]["scores"] == list(results[1].scores) and written[1]["draws"] == 2


def test_help_shows_the_defaults():
    command = [sys.executable, "-m", "gptlib.workshop.probes", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1.2" in done.stdout and "--run" in done.stdout
