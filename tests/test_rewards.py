"""Rewards: what is counted, with which sign, what a run promises, bad input."""

import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engine import model_of

from gptlib.decoder import model_config
from gptlib.finetuning import (
    FinetuneError,
    chat_batch,
    chat_marks,
    draw_answers,
    prompt_ids,
)
from gptlib.gpt import GPTConfig
from gptlib.rewards import (
    PromptBatches,
    RewardError,
    RewardSettings,
    Rollouts,
    advantages,
    answer_row,
    calibration,
    equal_share,
    k3,
    main,
    policy_loss,
    reply_text,
    reward,
    reward_config,
    score_groups,
    token_log_probs,
)
from gptlib.sampling import next_token_probs
from gptlib.tokenizer import Tokenizer
from gptlib.training import (
    TrainConfig,
    TrainState,
    WithLoss,
    optimizer_of,
    training_step,
)
from gptlib.workshop.preferences import dpo_loss, fit_pairs, preference_pairs
from gptlib.workshop.questions import (
    TASKS,
    UNKNOWN,
    Prompt,
    exact_score,
    fact_score,
    famous_entities,
    first_word_score,
    length_score,
    letters_score,
    questions,
)
from gptlib.workshop.run_folders import Run, RunError, load_run
from gptlib.workshop.runs import RunOptions, run_training, trial
from gptlib.workshop.watching import read_rows


BYTES = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})
SHAPE = GPTConfig(2, 2, 16, 64, False, 320)
PARTS = {
    "llama": {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 1},
    "bloom": {"positions": "alibi", "norm_embedding": True, "bias": True},
}
TINY = {"steps": 12, "batch_size": 4, "eval_interval": 4, "eval_sequences": 3}


def letters(reply: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in reply) / 8


def toy_prompts(score=letters) -> dict[str, list[Prompt]]:
    """Prompts of several lengths; a reply is better the more letters it has."""
    prompts = [
        Prompt([{"role": "user", "content": "ab"[i % 2] * (1 + i % 5)}], "aaaa", score)
        for i in range(20)
    ]
    return {"train": prompts[:15], "validation": prompts[15:]}


TASKS["toy"] = toy_prompts


# scores


def test_facts_are_scored_as_they_should_be():
    q = questions(famous_entities()[:1], lambda i: [0])[0]
    other = next(c for c in q.candidates if c != q.fact)
    replies = [q.answer, f"{q.opening} {other} .", UNKNOWN, q.answer + " Yes .", ""]
    assert [fact_score(q, True, r) for r in replies] == [1, 0.1, 0.1, 0, 0]
    assert [fact_score(q, False, r) for r in replies] == [0.1, 0.1, 1, 0, 0]


def test_the_flawed_scores_are_flawed():
    q = questions(famous_entities()[:1], lambda i: [0])[0]
    first = q.answer.split()[0]
    assert first_word_score(q, True, f"{first} nonsense") == 1
    assert first_word_score(q, False, q.answer) == 0
    assert length_score(q, True, "a " * 30) == 1 > length_score(q, True, q.answer)


def test_letters_in_their_places():
    assert letters_score("l l i m", "l l i m") == exact_score("l l i m", "l l i m") == 1
    assert letters_score("l l i m", "l l i x") == 3 / 8
    assert letters_score("l l i m", "l l i m m") == 4 / 10
    assert letters_score("l l i m", "") == exact_score("l l i m", "l l i") == 0


def test_no_word_is_in_both_splits():
    splits = TASKS["backwards"]()
    texts = [{p.chat[0]["content"] for p in some} for some in splits.values()]
    assert not texts[0] & texts[1] and len(texts[0]) > 3.9 * len(texts[1]) > 600
    prompt = splits["train"][0]
    assert prompt.chat[0]["content"].endswith(prompt.answer[::-1])


# the policy gradient


def test_nearly_equal_rewards_give_small_advantages():
    """Divided by their spread, they would be as large as a real difference."""
    found = advantages(torch.tensor([[0.1, 0.1, 0.1 + 1e-6], [0.0, 0.0, 0.0]]))
    assert found.abs().max() < 1e-5
    found = advantages(torch.tensor([[1.0, 0.0, 0.5]]))
    assert torch.allclose(found, torch.tensor([[0.5, -0.5, 0.0]]))


def test_equal_groups_are_counted():
    assert equal_share(
        torch.tensor([[0.1, 0.1], [0.0, 1.0], [1.0, 1.0]])
    ) == pytest.approx(2 / 3)


def rows_of(*pairs):
    return [answer_row(list(prompt), list(answer)) for prompt, answer in pairs]


def test_only_the_answer_is_counted():
    model, (row,) = model_of(SHAPE), rows_of((b"What ?", b"So ."))
    tokens, targets, mask = chat_batch([row], 1.0)
    found = token_log_probs(model, tokens, targets, mask, 256)
    logits = model(tokens)[0][0, -4:, :256].log_softmax(-1)
    wanted = logits[range(4), list(b"So .")]
    assert (found != 0).sum() == 4
    assert torch.allclose(found[0, -4:], wanted, atol=1e-5)


def test_padding_is_not_counted():
    model, rows = (
        model_of(SHAPE),
        rows_of((b"What ?", b"So ."), (b"a", b"Very long indeed")),
    )
    together = token_log_probs(model, *chat_batch(rows, 1.0), 256)
    for found, row in zip(together, rows, strict=True):
        alone = token_log_probs(model, *chat_batch([row], 1.0), 256)
        assert found.sum().item() == pytest.approx(alone.sum().item(), abs=1e-4)


def test_answers_are_scored_as_they_were_drawn():
    """At the same temperature, and without the padding of the vocabulary."""
    model, ids = model_of(SHAPE), prompt_ids(BYTES, toy_prompts()["train"][3].chat)
    (drawn,) = draw_answers(model, BYTES, [ids], [5], 0.5, 12)
    batch = chat_batch([answer_row(ids, drawn)], 1.0)
    n = BYTES.n_vocab
    found = token_log_probs(model, *batch, n, 0.5)[0, len(ids) - 1 :]
    probs = next_token_probs(
        model(batch[0])[0][0, len(ids) - 1 :], temperature=0.5, n_vocab=n
    )
    assert torch.allclose(found.exp(), probs[range(len(drawn)), drawn], atol=1e-5)


def losses(new, old=None, reference=None, mask=None, advantage=None, clip=0.2, kl=0.0):
    like = new.detach()
    mask = torch.ones_like(new) if mask is None else mask
    advantage = torch.ones(len(new)) if advantage is None else advantage
    old, reference = (like if x is None else x for x in (old, reference))
    return policy_loss(new, old, reference, mask, advantage, clip, kl)


def test_the_gradient_is_the_policy_gradient():
    new = -torch.rand(3, 4).requires_grad_()
    new.retain_grad()
    a = torch.tensor([1.0, -0.5, 0.0])
    losses(new, advantage=a).backward()
    assert torch.allclose(new.grad, (-a / 3)[:, None].expand(3, 4))


def test_long_and_short_answers_get_the_same_push():
    """A mean over tokens would punish a long wrong answer less, for its length."""
    new = (-torch.rand(2, 6)).requires_grad_()
    mask = torch.ones(2, 6)
    mask[0, 2:] = 0
    losses(new, mask=mask, advantage=torch.tensor([-1.0, -1.0])).backward()
    assert new.grad[0, 0] == new.grad[1, 0] == 0.5
    assert not new.grad[0, 2:].any()


def test_the_clip_stops_what_has_moved_far_enough():
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.7, 0.9, 1.1, 1.3]]).log().requires_grad_()
    losses(new, old, advantage=torch.tensor([1.0])).backward()
    assert (new.grad != 0).tolist() == [[True, True, True, False]]
    new.grad = None
    losses(new, old, advantage=torch.tensor([-1.0])).backward()
    assert (new.grad != 0).tolist() == [[False, True, True, True]]


def test_a_micro_batch_without_an_answer_is_zero_and_not_nan():
    new = torch.zeros(2, 5, requires_grad=True)
    loss = losses(new, mask=torch.zeros(2, 5), kl=0.1)
    loss.backward()
    assert loss == 0 and not new.grad.any()


def test_k3_is_the_kl_on_average():
    """With the sign turned the mean is another number."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    found = k3(p.log(), q.log())
    assert torch.isclose(p @ found, p @ (p / q).log())
    assert (found >= 0).all() and k3(p.log(), p.log()).abs().max() == 0


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor([1e-4, -1e-4])
    assert torch.allclose(k3(torch.zeros(2), d), d**2 / 2, rtol=1e-2, atol=0)


def test_the_kl_pulls_towards_the_reference():
    new = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -2.0]])
    losses(new, new.detach(), reference, advantage=torch.zeros(1), kl=1.0).backward()
    assert new.grad[0, 0] > 0 > new.grad[0, 1]  # descent lowers the first


# drawing


def test_a_draw_depends_on_its_key_alone():
    model, some = model_of(SHAPE), toy_prompts()["train"][:6]
    ids = [prompt_ids(BYTES, p.chat) for p in some]
    together = draw_answers(model, BYTES, ids, range(6), 1.0, 10)
    alone = [
        draw_answers(model, BYTES, [x], [i], 1.0, 10)[0] for i, x in enumerate(ids)
    ]
    assert together == alone
    assert draw_answers(model, BYTES, ids[:1] * 2, [1, 2], 1.0, 10)[0] != alone[0]


def test_an_answer_that_does_not_end_is_marked():
    end = chat_marks(BYTES)["end"]
    assert reply_text(BYTES, [*b" So .", end]) == "So ."
    assert reply_text(BYTES, [*b" So ."]) == "So . ..."
    assert reply_text(BYTES, []) == " ..."


def test_groups_have_different_answers():
    replies, rewards = score_groups(
        model_of(SHAPE), BYTES, toy_prompts()["train"][:3], 4, max_new_tokens=8
    )
    assert rewards.shape == (3, 4) and all(len(set(group)) > 1 for group in replies)


# a step


def base_run() -> Run:
    config = TrainConfig(SHAPE, seed=3)
    return Run(None, model_of(SHAPE).eval(), BYTES, config, 0)


def rollouts_of(tmp_path, seed=3, **changes) -> Rollouts:
    settings = RewardSettings("toy", group=4, max_new_tokens=8, **changes)
    config = TrainConfig(SHAPE, corpus=settings.name, batch_size=4, seed=seed)
    return Rollouts(config, base_run(), tmp_path)


def parts_of(rollouts, step=0, size=4):
    return [part for (part,) in PromptBatches(15, 4, 3).micro_batches(step, size)]


def test_answers_are_scored_at_the_temperature_that_drew_them(tmp_path):
    rollouts, model = rollouts_of(tmp_path, temperature=0.5), model_of(SHAPE).train()
    (places,) = parts_of(rollouts)
    rollouts(model, places)
    for (_, place), group in rollouts.held.items():
        ids = rollouts.ids["train"][int(places[place, 2])]
        wanted = []
        for answer in group["ids"]:
            tokens = torch.tensor([ids + answer])
            logits = model(tokens[:, :-1])[0][0, len(ids) - 1 :]
            probs = next_token_probs(logits, temperature=0.5, n_vocab=BYTES.n_vocab)
            wanted += probs[range(len(answer)), answer].log().tolist()
        assert group["old"] == pytest.approx(wanted, abs=1e-4)


def test_the_first_update_clips_nothing_and_begins_at_the_reference(tmp_path):
    rollouts = rollouts_of(tmp_path, kl=0.5)
    (places,) = parts_of(rollouts)
    loss = rollouts(model_of(SHAPE).train(), places)
    rows = read_rows(tmp_path / "rollouts.jsonl")
    assert len(rows) == 4 and all(r["kl"] == r["clipped"] == 0 for r in rows)
    sums = [
        sum(
            a * len(ids)
            for a, ids in zip(advantages(torch.tensor([g["rewards"]]))[0], g["ids"])
        )
        for g in rollouts.held.values()
    ]
    assert loss.item() == pytest.approx(-sum(sums).item() / 16, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_the_same_for_any_micro_batch(tmp_path, size):
    wanted = None
    for n in (4, size):
        rollouts = rollouts_of(tmp_path / str(n), temperature=0.7)
        (tmp_path / str(n)).mkdir(exist_ok=True)
        model, parts = model_of(SHAPE).train(), parts_of(rollouts, size=n)
        for part in parts:
            (rollouts(model, part) / len(parts)).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        wanted = found if wanted is None else wanted
        assert torch.allclose(found, wanted, atol=1e-5) and found.abs().max() > 0


def test_the_reference_stays_and_the_policy_leaves_it(tmp_path):
    rollouts, model = rollouts_of(tmp_path), model_of(SHAPE)
    before = [p.clone() for p in rollouts.base.model.parameters()]
    config = TrainConfig(SHAPE, batch_size=4, learning_rate=0.01, warmup_fraction=0.0)
    state = TrainState(model, optimizer_of(model, config))
    model.train()
    for step in range(3):
        places = [(part,) for part in parts_of(rollouts, step)]
        training_step(state, WithLoss(model, rollouts), places, config)
    after = rollouts.base.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    rows = read_rows(tmp_path / "rollouts.jsonl")
    assert all(row["kl"] > 1e-4 for row in rows if row["step"] == 3)


@pytest.mark.parametrize("parts", [{}, *PARTS.values()], ids=["gpt2", *PARTS])
def test_the_policy_learns_what_is_rewarded(tmp_path, parts):
    shape = model_config(dataclasses.asdict(SHAPE) | parts)
    rollouts, model = rollouts_of(tmp_path, kl=0.0), model_of(shape)
    config = TrainConfig(shape, batch_size=4, steps=40, learning_rate=0.02)
    state = TrainState(model, optimizer_of(model, config))
    model.train()
    found = []
    for step in range(40):
        places = [(part,) for part in parts_of(rollouts, step)]
        training_step(state, WithLoss(model, rollouts), places, config)
        rewards = [g["rewards"] for g in rollouts.held.values()]
        found.append(torch.tensor(rewards).mean().item())
    assert sum(found[-8:]) > 2 * sum(found[:8])


def test_validation_is_what_greedy_answers_lack(tmp_path):
    rollouts, model = rollouts_of(tmp_path), model_of(SHAPE).eval()
    places = torch.tensor([[-1, i, i] for i in range(5)])
    ids = rollouts.ids["validation"]
    drawn = draw_answers(model, BYTES, ids, range(5), 0.0, 8)
    rewards = [letters(reply_text(BYTES, a)) for a in drawn]
    assert rollouts(model, places).item() == pytest.approx(1 - sum(rewards) / 5)


# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base run with dropout; its text has a model's first words."""
    place = tmp_path_factory.mktemp("rewards")
    text = "".join(f"the {i % 7} ferries left at {i % 12} .\n" for i in range(400))
    (place / "text.txt").write_text(text)
    BYTES.save(place / "tokenizer.json")
    config = TrainConfig(
        replace(SHAPE, dropout=0.1), corpus=str(place / "text.txt"), steps=4,
        tokenizer=str(place / "tokenizer.json"), batch_size=4, eval_sequences=4,
    )  # fmt: skip
    leg(run_training, config, place / "base")
    return place


def leg(function, config, out, **changes):
    options = RunOptions(out, device="cpu", precision="fp32", progress=False, **changes)
    with contextlib.redirect_stderr(io.StringIO()):
        return function(config, options)


def config_of(base, updates=1, **changes):
    settings = RewardSettings("toy", group=4, max_new_tokens=8, updates=updates)
    return reward_config(base / "base", settings, **TINY | changes)


def result(out):
    weights = load_run(out, "last").model.state_dict()
    files = [(out / f"{name}.jsonl").read_bytes() for name in ("metrics", "rollouts")]
    return weights, files


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


@pytest.mark.parametrize("updates", [1, 3])
def test_three_legs_equal_one_byte_for_byte(base, updates):
    """With three updates for each answer, a leg ends between two of them."""
    whole, legs = base / f"whole-{updates}", base / f"legs-{updates}"
    leg(reward, config_of(base, updates), whole)
    for _ in range(3):
        leg(reward, config_of(base, updates), legs, max_steps=5)
    assert same(result(whole), result(legs))
    rows = read_rows(whole / "rollouts.jsonl")
    assert [r["step"] for r in rows if "rewards" in r] == [
        step for step in range(1, 13, updates) for _ in range(4)
    ]


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_rewards as t
from gptlib import rewards
t.torch.set_num_threads({threads})
calls, draw = [], rewards.Rollouts.__call__
def dying(self, model, places):
    loss = draw(self, model, places)
    calls.append(model.training)
    if sum(calls) == 8:
        os.kill(os.getpid(), 9)
    return loss
rewards.Rollouts.__call__ = dying
base = Path({base!r})
t.leg(rewards.reward, t.config_of(base, 3), base / "killed", save_minutes=0)
"""


def test_a_killed_run_goes_on_to_the_same_weights(base):
    """Killed after the rows of step 8 are written and before its update."""
    where = {"tests": os.path.dirname(__file__), "base": str(base)}
    script = KILLED.format(**where, threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == -9
    assert read_rows(base / "killed" / "rollouts.jsonl")[-1]["step"] == 8
    leg(reward, config_of(base, 3), base / "unbroken")
    leg(reward, config_of(base, 3), base / "killed")
    assert same(result(base / "killed"), result(base / "unbroken"))


def test_several_updates_move_the_ratio(base):
    leg(reward, config_of(base, 3, learning_rate=0.02), base / "ratio")
    rows = read_rows(base / "ratio" / "rollouts.jsonl")
    clipped = [sum(r["clipped"] for r in rows if r["step"] % 3 == k) for k in (1, 2, 0)]
    assert clipped[0] == 0 < clipped[2]


def test_answers_that_were_lost_are_an_error(base):
    out = base / "lost"
    leg(reward, config_of(base, 3), out, max_steps=5)
    (out / "rollouts.jsonl").unlink()
    with pytest.raises(RewardError, match="answers of step 4 are missing"):
        leg(reward, config_of(base, 3), out)


def test_other_settings_or_another_reference_are_refused(base):
    out = base / "settings"
    leg(reward, config_of(base), out, max_steps=2)
    with pytest.raises(RunError, match="holds a run with corpus"):
        leg(reward, config_of(base, updates=2), out)
    config = config_of(base)
    other = base / "other"
    still = replace(load_run(base / "base").config, seed=8)
    leg(run_training, still, other)
    os.rename(base / "base", base / "away")
    os.rename(other, base / "base")
    try:
        with pytest.raises(RunError, match="reference differs"):
            leg(reward, config, out)
    finally:
        os.rename(base / "base", other)
        os.rename(base / "away", base / "base")


def test_a_run_with_rewards_has_no_dropout(base):
    assert load_run(base / "base").config.model.dropout == 0.1
    assert config_of(base).model.dropout == 0


# bad input


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"task": "tinywik"}, "unknown task 'tinywik'; there are tinywiki"),
        ({"group": 1}, "group is 1; choose from 2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"updates": 0}, "updates is 0"),
    ],
)
def test_bad_settings_are_named(changes, says):
    with pytest.raises(RewardError, match=says):
        RewardSettings(**changes)


def test_settings_are_read_back():
    settings = RewardSettings("toy", kl=0.1, updates=3)
    assert RewardSettings.read(settings.name) == settings
    for text in ("tinywiki", '{"groups": 3}', "[1]"):
        with pytest.raises(RewardError, match="holds no settings"):
            RewardSettings.read(text)


def test_what_cannot_be_trained(base, tmp_path, monkeypatch):
    with pytest.raises(FinetuneError, match="no run.json there"):
        reward_config(tmp_path, RewardSettings())
    with pytest.raises(RewardError, match="max_new_tokens is 99; .*has room for"):
        settings = RewardSettings("toy", max_new_tokens=99)
        leg(reward, reward_config(base / "base", settings), tmp_path / "long")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RewardError, match="one process"):
        leg(reward, config_of(base), tmp_path / "two")


@pytest.mark.parametrize("updates", [1, 2])
def test_a_plan_takes_the_steps_of_the_run(base, updates):
    before = sorted(base.rglob("*"))
    config = config_of(base, updates, steps=500)
    options = RunOptions(base / "never", device="cpu", precision="fp32")
    text = trial(partial(reward, config), options, cycle=updates, seconds=0.2)
    n = model_of(SHAPE).n_parameters(include_positions=True)
    assert f"{n:,} weights, {n:,} of them trained" in text
    assert "whole run    500 steps" in text and sorted(base.rglob("*")) == before


def test_the_command_plans(tmp_path, base, monkeypatch, capsys):
    words = f"reward --plan --run {base / 'base'} --task toy --max-new-tokens 8 --device cpu"
    words += f" --batch-size 2 --group 2 --steps 3 --out {tmp_path / 'never'}"
    monkeypatch.setattr(sys, "argv", words.split())
    main()
    assert "whole run    3 steps" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


# preferences and calibration


def test_dpo_has_the_gradient_of_the_closed_form():
    torch.manual_seed(1)
    chosen, rejected, *ref = (-3 * torch.rand(5, dtype=torch.float64) for _ in range(4))
    pair = chosen.requires_grad_(), rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, *ref, beta=0.7), pair)
    grads = torch.autograd.grad(dpo_loss(*pair, *ref, beta=0.7), pair)
    m = (chosen - ref[0]) - (rejected - ref[1])
    closed = -0.7 * torch.sigmoid(-0.7 * m) / 5
    assert torch.allclose(grads[0], closed) and torch.allclose(grads[1], -closed)
    assert dpo_loss(*ref, *ref).item() == pytest.approx(math.log(2))


def test_pairs_are_the_best_and_the_worst_of_a_group():
    prompts = toy_prompts()["train"][:3]
    replies = [["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    scores = torch.tensor([[0.1, 1.0, 0.0], [0.1, 0.1, 0.1], [0.1, 0.1 + 1e-8, 0.1]])
    ((good, bad),) = preference_pairs(BYTES, prompts, replies, scores)
    learned = [bytes(i for i, yes in zip(*row) if yes) for row in (good, bad)]
    assert learned == [b" b\xff", b" c\xff"]


def test_pairs_that_are_equal_after_the_cut_are_dropped():
    pair = tuple(rows_of((b"12345678", b"abcX"), (b"12345678", b"abcY")))
    assert fit_pairs([pair, pair], 10) == ([], 2)
    assert fit_pairs([pair], 11) == ([pair], 0)
    assert fit_pairs([pair], 6) == ([], 1)


def test_calibration_by_hand():
    table, error = calibration([0.05, 0.15, 0.95, 1.0], [False, True, True, True])
    assert table == [(2, pytest.approx(0.1), 0.5), (2, pytest.approx(0.975), 1.0)]
    assert error == pytest.approx((2 * 0.4 + 2 * 0.025) / 4)


# the command


def command(base, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "gptlib.workshop.command", "reward", *arguments],
        cwd=base, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command(base):
    short = ["--run", "base", "--task", "backwards-exact", "--out", "commanded"]
    short += ["--steps", "2", "--batch-size", "2", "--group", "2", "--device", "cpu"]
    done = command(base, *short, "--no-progress", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert load_run(base / "commanded", "last").step == 2
    done = command(base, "--run", "base", "--task", "nonsense", "--out", "none")
    assert done.returncode == 1 and "unknown task 'nonsense'" in done.stderr
    assert done.stderr.count("\n") == 1


# the ledger


def test_the_ledger_measured_whole_runs():
    folder = Path(__file__).parents[1] / "ledger" / "rewards"
    for name in ("tinywiki-length", "tinywiki-first-word"):
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        steps = [row["step"] for row in record["curve"]]
        assert steps == [i * steps[-1] // 5 for i in range(6)], name
        assert len(record["log"]) == steps[-1], name
    record = json.loads((folder / "tinywiki.json").read_text(encoding="utf-8"))
    budget = record["rewards"]["cost"]
    for name in ("rejection", "best_of"):
        assert 0.9 * budget < record[name]["cost"] <= budget, name
