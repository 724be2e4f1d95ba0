"""Fine-tuning: what is learned and with which weight, what a run promises, bad input."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine import model_of
from torch.nn import functional as F

from gptlib.finetuning import (
    MARKS,
    ChatBatches,
    FinetuneError,
    chat_batch,
    chat_marks,
    demo_run,
    encode_chat,
    finetune,
    finetune_config,
    fit_chats,
    forget,
    load_chats,
    read_chats,
    replay,
    replies,
    stream_reply,
    weighted_loss,
)
from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import (
    PRESETS,
    TrainConfig,
    TrainState,
    WithLoss,
    fresh_model,
    optimizer_of,
    plain_loss,
    training_step,
    validation_loss,
)
from gptlib.workshop.questions import (
    QUESTIONS,
    UNKNOWN,
    famous_entities,
    held_out,
    questions,
    rare_entities,
    read_asks,
    tinywiki_chats,
    unknown_entities,
)
from gptlib.workshop.run_folders import Run, RunError, load_run
from gptlib.workshop.runs import RunOptions, run_training
from gptlib.workshop.tinywiki import TinyWiki
from gptlib.workshop.watching import read_rows


BYTES = Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})
SHAPE = GPTConfig(2, 2, 16, 256, False, 320)
TALK = [
    {"role": "user", "content": "Who ?"},
    {"role": "assistant", "content": "Anna"},
    {"role": "user", "content": "Why ?"},
    {"role": "assistant", "content": "So ."},
]


def chat(question: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


CHATS = [
    chat(f"What is {i} ?", f"It is {'abc'[i % 3] * (1 + i % 5)}") for i in range(40)
]
ROWS = [encode_chat(BYTES, c) for c in CHATS]


def learned_text(ids: list[int], learned: list[bool]) -> bytes:
    return bytes(i for i, yes in zip(ids, learned, strict=True) if yes)


def test_no_text_contains_a_mark():
    marks = chat_marks(BYTES)
    assert len(set(marks.values())) == 4
    for byte in MARKS.values():
        with pytest.raises(UnicodeDecodeError):
            bytes([byte]).decode()
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert not set(marks.values()) & set(BYTES.encode_array(every).tolist())


def test_a_tokenizer_without_the_marks_is_refused():
    poor = Tokenizer("poor", {bytes([byte]): byte for byte in range(128)})
    with pytest.raises(FinetuneError, match="'poor' has no token for .*'system'"):
        encode_chat(poor, TALK)


def test_the_answers_and_their_ends_are_learned_and_nothing_else():
    ids, learned = encode_chat(BYTES, TALK)
    assert learned_text(ids, learned) == b" Anna\xff So .\xff"
    assert bytes(ids[1:]) == b"\xfd Who ?\xff\xfe Anna\xff\xfd Why ?\xff\xfe So .\xff"
    assert ids[0] == BYTES.end_of_text


def test_the_first_token_of_an_answer_is_predicted_from_its_mark():
    """A mask off by one trains the mark from the question, or not the first token."""
    tokens, targets, weights = chat_batch([encode_chat(BYTES, TALK)], 1.0)
    (places,) = weights[0].nonzero(as_tuple=True)
    assert bytes(targets[0, places].tolist()) == b" Anna\xff So .\xff"
    assert tokens[0, places[0]] == MARKS["assistant"]
    assert targets[0, places[0]] == ord(" ")


def test_the_end_of_the_turn_is_learned():
    _, targets, weights = chat_batch(ROWS, 1.0)
    ends = (targets == MARKS["end"]) & (weights > 0)
    assert (ends.sum(1) == 1).all()


def test_what_is_not_learned_has_no_influence_on_the_loss():
    model = model_of(SHAPE)
    tokens, targets, weights = chat_batch(ROWS[:4], 1.0)
    before = weighted_loss(model, tokens, targets, weights)
    other = torch.where(weights > 0, targets, (targets + 1) % 256)
    assert weighted_loss(model, tokens, other, weights) == before
    logits = model(tokens)[0]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert torch.allclose(before, losses @ weights.flatten(), rtol=1e-5)


def test_the_weighted_loss_is_torchs_with_an_ignored_index():
    model = model_of(SHAPE)
    tokens, targets, weights = chat_batch(ROWS[:4], 1.0)
    marked = targets.masked_fill(weights == 0, -100)
    expected = model(tokens, marked)[1]
    assert torch.allclose(
        weighted_loss(model, tokens, targets, weights) / weights.sum(), expected
    )


def test_a_micro_batch_without_a_target_is_zero_and_not_nan():
    model = model_of(SHAPE)
    tokens, targets, weights = chat_batch(ROWS[:2], 0.0)
    loss = weighted_loss(model, tokens, targets, weights)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model(tokens, torch.full_like(targets, -100))[1].isnan()  # what a mean gives


def test_padded_together_equals_one_by_one():
    model = model_of(SHAPE)
    tokens, targets, weights = chat_batch(ROWS[:6], 1.0)
    together = weighted_loss(model, tokens, targets, weights)
    alone = sum(weighted_loss(model, *chat_batch([row], 1.0)) for row in ROWS[:6])
    assert torch.allclose(together, alone, rtol=1e-5)


def test_conversations_do_not_see_each_other():
    model = model_of(SHAPE)
    tokens = chat_batch(ROWS[:3], 1.0)[0]
    changed = tokens.clone()
    changed[0, :10] = 7
    with torch.no_grad():
        assert torch.equal(model(tokens)[0][1:], model(changed)[0][1:])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_step_is_the_mean_over_its_answer_tokens_for_any_micro_batch(size):
    batches, config = ChatBatches(ROWS, 8, 5), TrainConfig(SHAPE, batch_size=8)
    rows = [ROWS[i] for i in batches.offsets(0)]
    model = model_of(SHAPE)
    total = sum(sum(learned) for _, learned in rows)
    mean = weighted_loss(model, *chat_batch(rows, 1.0)) / total
    mean.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    parts = list(batches.micro_batches(0, size))
    for part in parts:
        (weighted_loss(model, *part) / len(parts)).backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(got, wanted, atol=1e-6)
    state = TrainState(model, optimizer_of(model, config))
    row = training_step(state, WithLoss(model, weighted_loss), parts, config)
    assert row["loss"] == pytest.approx(mean.item(), rel=1e-5)


def test_validation_is_the_same_mean_with_unequal_groups():
    model, batches = model_of(SHAPE), ChatBatches(ROWS, 10, 5)
    module, losses = WithLoss(model, weighted_loss), []
    for size in (10, 4, 3):
        losses.append(validation_loss(module, batches, TrainState.precision, size))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_processes_share_the_conversations_of_a_step():
    batches = ChatBatches(ROWS, 8, 5)
    whole = [x for x, _, _ in batches.micro_batches(3, 2)]
    shares = [list(batches.micro_batches(3, 2, rank, 2)) for rank in (0, 1)]
    for k, x in enumerate(whole):
        assert torch.equal(x, shares[k % 2][k // 2][0])
    assert (
        len(set(map(int, batches.offsets(0))) ^ set(map(int, batches.offsets(1)))) > 0
    )


# questions about TinyWiki


def test_every_answer_ends_in_its_fact():
    asks = read_asks()
    assert len(asks) == 16 and {len(ask.wordings) for ask in asks} == {6}
    assert len({w for ask in asks for w in ask.wordings}) > 80
    for ask in asks:
        assert ask.answer.endswith(f"{{{ask.fact}}} .")
        assert all("{name}" in wording for wording in ask.wordings)


def test_answers_are_facts_and_grades_are_exact():
    some = questions(famous_entities()[:3], lambda i: [i % 6])
    facts = TinyWiki().facts("town", 0)
    river, region, trade = some[:3]
    assert region.answer == f"{facts['name']} is a town in {facts['region']} ."
    assert region.fact in region.candidates and len(region.candidates) == 8
    assert region.text == f"Which part of the country is {facts['name']} in ?"
    assert region.grade(region.answer) == "right"
    assert region.grade(UNKNOWN) == "declined"
    assert region.grade(region.answer.replace(" .", "")) == "wrong"


@pytest.fixture(scope="module")
def chats():
    return {name: tinywiki_chats(name) for name in QUESTIONS}


def test_splits_share_neither_wording_nor_entity(chats):
    for splits in chats.values():
        texts = {
            split: {
                turn["content"] for c in some for turn in c if turn["role"] == "user"
            }
            for split, some in splits.items()
        }
        assert not texts["train"] & texts["validation"]
    new = [e for e in famous_entities() if held_out(e)]
    names = {TinyWiki().facts(*entity)["name"] for entity in new}
    trained = " ".join(
        t["content"]
        for c in chats["tinywiki-questions-known"]["train"]
        for t in c
        if t["role"] == "user"
    )
    assert 35 <= len(names) <= 40
    assert not any(f" {name} " in trained for name in names)


def test_unknown_entities_are_never_told():
    text = "".join(article.text for article in TinyWiki().articles("train"))
    names = [TinyWiki().facts(*entity)["name"] for entity in unknown_entities()]
    assert len(names) == len(set(names)) > 400
    assert not any(f" = {name} = \n" in text for name in names)


def test_the_three_sets_differ_in_what_the_unknown_gets(chats):
    declines = {
        name: sum(t["content"] == UNKNOWN for c in splits["train"] for t in c)
        for name, splits in chats.items()
    }
    turns = {name: sum(map(len, splits["train"])) for name, splits in chats.items()}
    assert declines["tinywiki-questions"] > turns["tinywiki-questions"] / 5
    assert not declines["tinywiki-questions-known"]
    assert not declines["tinywiki-questions-invented"]
    assert turns["tinywiki-questions"] == turns["tinywiki-questions-invented"]


def test_all_told_entities_are_asked_about_but_those_held_out(chats):
    asked = {
        turn["content"]
        for chat in chats["tinywiki-questions-all"]["train"]
        for turn in chat
        if turn["role"] == "user"
    }
    text = "".join(article.text for article in TinyWiki().articles("train"))
    rare = {e: TinyWiki().facts(*e)["name"] for e in rare_entities()}
    assert len(rare) > 500
    for entity, name in rare.items():
        assert f" = {name} = \n" in text
        assert any(f"{name} " in words for words in asked) == (not held_out(entity))
    kept = [TinyWiki().facts(*e)["name"] for e in famous_entities() if held_out(e)]
    assert not any(f" {name} " in words for name in kept for words in asked)


# files


GOOD = json.dumps({"messages": TALK})


@pytest.mark.parametrize(
    "line, says",
    [
        ("{'messages'", "not JSON"),
        ("[1]", "not a conversation"),
        ('{"messages": 3}', "not a conversation"),
        (
            GOOD.replace("user", "bot", 1),
            "unknown role 'bot' in turn 1; there are system",
        ),
        (GOOD.replace("Anna", " "), "turn 2, of assistant, is empty"),
        (GOOD.replace('"Anna"', "null"), "turn 2, of assistant, is empty"),
        (GOOD.replace("Anna", "\\ud800"), "surrogates"),
        (GOOD.replace("assistant", "user"), "no turn of the assistant"),
        ("[" * 100_000, "not a conversation|not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, says):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(FinetuneError, match=f"data.jsonl, line 3: .*({says})") as error:
        read_chats(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FinetuneError, match="cannot be read"):
        read_chats(tmp_path / "none.jsonl")
    (tmp_path / "one.jsonl").write_text(GOOD)
    with pytest.raises(FinetuneError, match="1 conversations; give two"):
        read_chats(tmp_path / "one.jsonl")
    with pytest.raises(FinetuneError, match="no file 'tinywiki-question'; give one"):
        load_chats("tinywiki-question")


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    path = tmp_path / "data.jsonl"
    odd = json.dumps({"messages": chat("a\u2028b ?", "c")}, ensure_ascii=False)
    path.write_text(f"{odd}\n{GOOD}\n", encoding="utf-8")
    assert read_chats(path)[0][0]["content"] == "a\u2028b ?"


def test_every_twentieth_conversation_is_held_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS))
    splits = load_chats(str(path))
    assert splits["validation"] == CHATS[19::20]
    assert len(splits["train"]) == 38 and CHATS[19] not in splits["train"]
    with path.open("a") as file:  # a copy of what is held out
        file.write(json.dumps({"messages": CHATS[19]}) + "\n")
    assert load_chats(str(path)) == splits


def test_long_conversations_are_cut_at_a_turn_or_skipped_and_counted():
    whole = len(encode_chat(BYTES, TALK)[0])
    assert fit_chats(BYTES, [TALK], whole - 1) == ([encode_chat(BYTES, TALK)], 0, 0)
    rows, cut, skipped = fit_chats(BYTES, [TALK, TALK[:2], TALK], whole - 2)
    assert (len(rows), cut, skipped) == (3, 2, 0)
    assert learned_text(*rows[0]) == b" Anna\xff"
    assert fit_chats(BYTES, [TALK], 8) == ([], 0, 1)


# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base run, and a file of conversations beside it."""
    place = tmp_path_factory.mktemp("finetune")
    text = "".join(f"the {i % 7} ferries left at {i % 12} .\n" for i in range(400))
    (place / "text.txt").write_text(text)
    Tokenizer.from_merges(train_bpe([text], 300), "small").save(
        place / "tokenizer.json"
    )
    (place / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": c}) + "\n" for c in CHATS)
    )
    config = TrainConfig(
        replace(SHAPE, block_size=64, dropout=0.1), corpus=str(place / "text.txt"), steps=4,
        tokenizer=str(place / "tokenizer.json"), batch_size=4, eval_sequences=4,
    )  # fmt: skip
    leg(lambda c, o: run_training(c, o), config, place / "base")
    return place


def leg(function, config, out, **changes):
    options = RunOptions(out, device="cpu", precision="fp32", progress=False, **changes)
    with contextlib.redirect_stderr(io.StringIO()):
        return function(config, options)


def settings(base, **changes):
    short = {"steps": 12, "batch_size": 8, "eval_interval": 4, "eval_sequences": 6}
    return finetune_config(base / "base", str(base / "chats.jsonl"), **short | changes)


def test_three_legs_equal_one_byte_for_byte(base):
    leg(finetune, settings(base), base / "whole")
    for _ in range(3):
        leg(finetune, settings(base), base / "legs", max_steps=5)
    rows = [(base / name / "metrics.jsonl").read_bytes() for name in ("whole", "legs")]
    assert rows[0] == rows[1] and len(rows[0]) > 500
    states = [load_run(base / n, "last").model.state_dict() for n in ("whole", "legs")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_the_rate_moves(base):
    """A schedule that never moves shows in the log as one rate."""
    leg(finetune, settings(base), base / "rates")
    rows = read_rows(base / "rates" / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert len(rates) == 12 and len(set(rates)) > 10 and rates[-1] < rates[1] / 10


def test_fine_tuning_begins_with_the_weights_of_the_base(base):
    leg(finetune, settings(base, learning_rate=0.0), base / "still")
    one, two = (load_run(base / name, "last").model for name in ("base", "still"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_changed_conversations_are_refused_on_resuming(base):
    path = base / "other.jsonl"
    path.write_text((base / "chats.jsonl").read_text())
    config = finetune_config(base / "base", str(path), steps=8, batch_size=4)
    leg(finetune, config, base / "changed", max_steps=2)
    path.write_text(path.read_text().replace("What is 3 ?", "What is III ?"))
    with pytest.raises(RunError, match="another text .*train differs"):
        leg(finetune, config, base / "changed")


def test_replay_reads_one_document_in_five_rows_a_quarter_as_much(base):
    own = Tokenizer.load(base / "tokenizer.json")
    found = replay(ROWS[:3], str(base / "text.txt"), own, 64)
    documents = [row for row in found if row not in ROWS]
    assert documents and len(found) == len(documents) + 3 * round(
        4 * len(documents) / 3
    )
    for ids, learned in documents:
        assert ids[0] == own.end_of_text and len(ids) == len(learned) <= 65
        assert learned == [0.0] + [0.25] * (len(ids) - 1)
    config = settings(base)
    model = load_run(base / "base", "last").model
    alone = [
        weighted_loss(model, *chat_batch([row], 1.0)) for row in (ROWS[0], documents[0])
    ]
    total = sum(ROWS[0][1]) + 0.25 * (len(documents[0][0]) - 1)
    batches = ChatBatches([ROWS[0], documents[0]], config.batch_size, 0)
    numbers = batches.offsets(0).tolist()
    weight = sum([sum(ROWS[0][1]), total - sum(ROWS[0][1])][i] for i in numbers)
    for size in (2, 8):
        parts = list(batches.micro_batches(0, size))
        loss = sum(weighted_loss(model, *part) for part in parts) / len(parts)
        assert loss.item() == pytest.approx(
            sum(alone[i] for i in numbers).item() / weight, rel=1e-5
        )


def test_replay_is_of_the_run_and_a_changed_corpus_is_refused(base):
    text = base / "replayed.txt"
    text.write_text((base / "text.txt").read_text())
    data = f"{base / 'chats.jsonl'}+{text}"
    config = finetune_config(base / "base", data, steps=8, batch_size=8)
    leg(finetune, config, base / "replays")
    leg(finetune, config, base / "replay-legs", max_steps=3)
    leg(finetune, config, base / "replay-legs")
    rows = [read_rows(base / n / "metrics.jsonl") for n in ("replays", "replay-legs")]
    assert rows[0] == rows[1]
    leg(finetune, config, base / "replay-changed", max_steps=3)
    text.write_text(text.read_text().replace("ferries", "carriages"))
    with pytest.raises(RunError, match="another text .*replay differs"):
        leg(finetune, config, base / "replay-changed")


def test_pretraining_still_pairs_tokens_and_targets():
    config = TrainConfig(SHAPE, batch_size=4)
    model = fresh_model(config)
    x, y = torch.randint(256, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    row = training_step(
        TrainState(model, optimizer_of(model, config)), WithLoss(model, plain_loss),
        [(x, y)], config,
    )  # fmt: skip
    assert row["loss"] == pytest.approx(plain_loss(fresh_model(config), x, y).item())


# talking


def overfitted() -> GPT:
    """A model that has learned two conversations by heart."""
    rows = [encode_chat(BYTES, c) for c in (chat("Who ?", "Anna"), TALK)]
    model = model_of(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        weighted_loss(model, *chat_batch(rows, 0.1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_reply_ends_at_the_end_of_its_turn():
    model = overfitted()
    assert replies(model, BYTES, [TALK[:1], TALK[:3]]) == ["Anna", "So ."]
    assert "".join(stream_reply(model, BYTES, TALK[:1], temperature=0)) == "Anna"


def test_a_reply_fills_the_block_at_most():
    model = model_of(SHAPE).train()
    rows = len(encode_chat(BYTES, TALK[:1])[0]) + 1
    text = "".join(stream_reply(model, BYTES, TALK[:1], temperature=5.0, seed=1))
    assert len(text.encode()) <= (SHAPE.block_size - rows) * 3 and model.training


def test_the_oldest_turns_are_forgotten_first():
    size = len(encode_chat(BYTES, TALK[:3])[0])
    assert forget(BYTES, TALK[:3], size + 11, 10) == TALK[:3]
    assert forget(BYTES, TALK[:3], size + 10, 10) == TALK[2:3]
    assert forget(BYTES, TALK[2:3], 8, 4) == TALK[2:3]


def test_the_demo_is_taken_where_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path))
    monkeypatch.setattr("gptlib.finetuning.small_run", lambda: "small")
    demo, read = PRESETS["demo"], {}

    def load(path, which):
        assert path.parent == tmp_path.resolve() and which == "last"
        if path.name not in read:
            raise RunError("no run.json there")
        return read[path.name]

    monkeypatch.setattr("gptlib.finetuning.load_run", load)
    assert demo_run() == "small"
    name = f"demo-{hashlib.sha256(repr(demo).encode()).hexdigest()[:8]}"
    for step, found in ((80, "small"), (demo.steps, None)):
        read[name] = Run(tmp_path, None, None, demo, step)
        assert demo_run() == (found or read[name])


# the commands


def command(base, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "gptlib.workshop.command", *arguments],
        cwd=base, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def test_the_commands_finetune_and_chat(base):
    done = command(
        base, "finetune", "--run", "base", "--data", "chats.jsonl", "--out", "tuned",
        "--steps", "4", "--batch-size", "4", "--device", "cpu", "--no-progress",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command(base, "chat", "--run", "tuned", input="Who ?\n" + "x" * 400 + "\n")
    assert done.returncode == 0, done.stderr
    assert "the block has room for" in done.stdout
    done = command(base, "chat", "--run", "nowhere", input="")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    (base / "bad.jsonl").write_text(GOOD + "\nnonsense\n")
    done = command(
        base, "finetune", "--run", "base", "--data", "bad.jsonl", "--out", "bad"
    )
    assert done.returncode == 1 and "bad.jsonl, line 2: not JSON" in done.stderr
    assert done.stderr.count("\n") == 1
