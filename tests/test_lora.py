"""LoRA: what an adapter changes, what is trained, merging, files, runs, bad input."""

import contextlib
import copy
import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from engine import model_of
from torch import nn

from gptlib.exchange import export_run
from gptlib.finetuning import chat_batch, finetune, finetune_config, weighted_loss
from gptlib.gpt import GPT, GPTConfig
from gptlib.lora import (
    FILES,
    LoRA,
    Lora,
    LoraError,
    adapters,
    add_adapters,
    base_hash,
    finetune_lora,
    load_adapter,
    merge,
    plain_weights,
    save_adapter,
    unmerge,
)
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import TrainConfig
from gptlib.workshop.checkpoints import weights_hash
from gptlib.workshop.run_folders import Run, RunError, load_run
from gptlib.workshop.runs import RunOptions, all_weights, run_training, trial


SHAPE = GPTConfig(2, 2, 16, 64, False, 320)
needs_peft = pytest.mark.skipif(
    not importlib.util.find_spec("peft"), reason="peft is not installed"
)


def adapted(rank: int = 4, alpha: float = 8.0, seed: int = 0) -> GPT:
    """A model with adapters that change something."""
    model = model_of(SHAPE)
    add_adapters(model, rank, alpha, seed)
    draws = torch.Generator().manual_seed(seed + 1)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.2, generator=draws)
    return model


TOKENS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def test_the_change_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = LoRA(layer, 1, 2.0, torch.Generator())
    one.lora_A.data, one.lora_B.data = (
        torch.tensor([[2.0, 1.0]]),
        torch.tensor([[1.0], [0.0]]),
    )
    assert one(torch.ones(2)).tolist() == [9.0, 7.0]
    assert one.change().tolist() == [[4.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_alpha_is_divided_by_the_rank(rank):
    """The same A and B, as ones, change as much at every rank."""
    one = LoRA(nn.Linear(10, 10), rank, 3.0, torch.Generator())
    nn.init.ones_(one.lora_A), nn.init.ones_(one.lora_B)
    assert torch.allclose(one.change(), torch.full((10, 10), 3.0))
    x = torch.ones(10)
    assert torch.allclose(one(x), nn.functional.linear(x, one.weight + 3, one.bias))


def test_at_the_start_it_is_the_base_bit_for_bit_and_something_can_move():
    model = model_of(SHAPE)
    before = logits(model)
    add_adapters(model, 4)
    assert torch.equal(logits(model), before)
    model(TOKENS, TOKENS)[1].backward()
    for layer in adapters(model).values():
        assert layer.lora_B.grad.any(), "A and B are both zero"


def test_only_the_adapters_train():
    model = model_of(SHAPE)
    add_adapters(model, 4)
    bits = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.1
    )
    for _ in range(3):
        model(TOKENS, TOKENS)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, bits[name]) != ("lora_" in name), name
    assert len(adapters(model)) == 8


def test_merged_equals_unmerged_and_unmerging_restores_the_bits():
    model = adapted()
    before, bits = logits(model), weights_hash(model)
    merge(model)
    assert torch.allclose(
        logits(model), before, rtol=1e-5, atol=1e-5 * before.abs().max()
    )
    assert weights_hash(model) != bits
    unmerge(model)
    assert weights_hash(model) == bits and torch.equal(logits(model), before)
    unmerge(model)  # nothing to undo
    assert weights_hash(model) == bits


def test_merging_in_float64_is_exact_to_1e_12():
    model = adapted().double()
    before = logits(model)
    merge(model)
    assert (logits(model) - before).abs().max() < 1e-12 * before.abs().max()


def test_merging_twice_is_refused():
    model = adapted()
    merge(model)
    merged = logits(model)
    for attempt in (
        merge,
        lambda m: add_adapters(m, 2),
        lambda m: save_adapter(m, "x"),
    ):
        with pytest.raises(LoraError, match="merged already; call unmerge"):
            attempt(model)
    assert torch.equal(logits(model), merged)


def test_plain_weights_are_a_gpts():
    model, plain = adapted(), GPT(SHAPE)
    plain.load_state_dict(plain_weights(model, merged=True))
    assert torch.allclose(logits(plain.eval()), logits(model), atol=1e-4)
    for step in (lambda m: None, merge):
        step(model)
        plain.load_state_dict(plain_weights(model, merged=False))
        assert weights_hash(plain) == weights_hash(model_of(SHAPE)) == base_hash(model)


# files


def test_an_adapter_comes_back_and_two_are_exchanged(tmp_path):
    one, two = adapted(seed=0), adapted(rank=2, alpha=3.0, seed=5)
    served = model_of(SHAPE)
    save_adapter(one, tmp_path / "one")
    save_adapter(two, tmp_path / "two")
    for name, model in (("one", one), ("two", two), ("one", one)):
        load_adapter(served, tmp_path / name)
        assert torch.equal(logits(served), logits(model)), "never loaded"
        assert not torch.equal(logits(served), logits(model_of(SHAPE)))
    assert base_hash(served) == weights_hash(model_of(SHAPE))
    for model in (one, served):  # to save, hash or load thaws nothing
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 16 and all("lora_" in name for name in trained)


@needs_peft
def test_peft_opens_it_with_equal_logits(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, run = adapted(), tiny_run(tmp_path)
    base = load_run(run, "last")
    model.load_state_dict(base.model.state_dict(), strict=False)
    export_run(base, tmp_path / "hf")
    save_adapter(model, tmp_path / "adapter", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = TOKENS % base.tokenizer.n_vocab
    with torch.no_grad():
        ours = model(tokens)[0][..., : base.tokenizer.n_vocab]
        assert not torch.allclose(
            ours, base.model(tokens)[0][..., : ours.shape[-1]], atol=1e-2
        )
        assert torch.allclose(theirs(tokens).logits, ours, atol=1e-4)
        merged = theirs.merge_and_unload()(tokens).logits  # needs fan_in_fan_out
        assert torch.allclose(merged, ours, atol=1e-4)
    # what peft writes itself is read back
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "again")
    back = copy.deepcopy(base.model)
    load_adapter(back, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(back(tokens)[0], model(tokens)[0])


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    other = model_of(SHAPE, seed=1)
    bits = weights_hash(other)
    with pytest.raises(
        LoraError, match="an adapter of another base .*; load the model"
    ):
        load_adapter(other, tmp_path)
    assert weights_hash(other) == bits and not adapters(other)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "name, change, says",
    [
        (FILES[1], lambda b: b[:-100], "damaged"),
        (FILES[1], lambda b: b"", "damaged"),
        (FILES[1], lambda b: b"\xff" * 100, "damaged"),
        (FILES[0], lambda b: b[:10], "damaged"),
        (FILES[0], lambda b: b"[1]", "damaged"),
        (
            FILES[0],
            lambda b: b.replace(b'"r": 4', b'"r": 5'),
            "only in the file or only",
        ),
        (FILES[0], lambda b: b.replace(b'"r": 4', b'"r": null'), "damaged"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, change, says):
    save_adapter(adapted(), tmp_path)
    damage(tmp_path, name, change)
    model = model_of(SHAPE)
    with pytest.raises(LoraError, match=says) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not adapters(model)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(LoraError, match="no adapter"):
        load_adapter(model_of(SHAPE), tmp_path / "nowhere")


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(adapted(), tmp_path)
    weights = load_file(tmp_path / FILES[1])
    save_file(weights, tmp_path / FILES[1])  # without a hash, as peft writes it
    load_adapter(model_of(SHAPE), tmp_path)
    wide = model_of(replace(SHAPE, n_embd=32))
    with pytest.raises(LoraError, match="lora_A.weight .* is only in the file or only"):
        load_adapter(wide, tmp_path)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_that_no_matrix_has_is_refused(rank):
    model = model_of(SHAPE)
    with pytest.raises(LoraError, match=f"rank is {rank}; .* can have 1 to 16"):
        add_adapters(model, rank)
    assert not adapters(model)


# runs


CHATS = [
    [{"role": "user", "content": f"What is {i} ?"}, {"role": "assistant", "content": f"It is {i % 3}"}]
    for i in range(40)
]  # fmt: skip


def leg(function, config, out, *args, **options):
    options = RunOptions(out, device="cpu", precision="fp32", progress=False, **options)
    with contextlib.redirect_stderr(io.StringIO()):
        return function(config, options, *args)


def tiny_run(place):
    text = "".join(f"the {i % 7} ferries left at {i % 12} .\n" for i in range(400))
    (place / "text.txt").write_text(text)
    Tokenizer.from_merges(train_bpe([text], 300), "small").save(
        place / "tokenizer.json"
    )
    config = TrainConfig(
        replace(SHAPE, dropout=0.1), corpus=str(place / "text.txt"), steps=4,
        tokenizer=str(place / "tokenizer.json"), batch_size=4, eval_sequences=4,
    )  # fmt: skip
    leg(run_training, config, place / "base")
    return place / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    tiny_run(place)
    lines = (json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    (place / "chats.jsonl").write_text("".join(lines))
    return place


def settings(base):
    short = {"steps": 12, "batch_size": 8, "eval_interval": 4, "eval_sequences": 6}
    return finetune_config(base / "base", str(base / "chats.jsonl"), **short)


def test_three_legs_equal_one_byte_for_byte(base):
    leg(finetune_lora, settings(base), base / "whole", Lora(2))
    for _ in range(3):
        leg(finetune_lora, settings(base), base / "legs", Lora(2), max_steps=5)
    for name in ("metrics.jsonl", "adapter/" + FILES[1]):
        one, two = ((base / run / name).read_bytes() for run in ("whole", "legs"))
        assert one == two and len(one) > 500
    one, two = (load_run(base / run, "last").model for run in ("whole", "legs"))
    assert (
        weights_hash(one)
        == weights_hash(two)
        != weights_hash(load_run(base / "base").model)
    )


def test_a_run_is_read_as_a_plain_gpt_and_is_base_plus_adapter(base):
    run = leg(finetune_lora, settings(base), base / "read", Lora(2))
    plain, served = (
        load_run(base / "read", "last").model,
        load_run(base / "base", "last").model,
    )
    assert not adapters(plain) and list(plain.state_dict()) == list(served.state_dict())
    load_adapter(served, base / "read" / "adapter")
    tokens = TOKENS % 300
    with torch.no_grad():
        assert torch.equal(served(tokens)[0], run.model(tokens)[0])
        assert torch.allclose(served(tokens)[0], plain(tokens)[0], atol=1e-5)
    written = base / "read" / "adapter" / FILES[1]
    bits = written.read_bytes()
    written.unlink()  # killed before it was written, or deleted
    again = leg(finetune_lora, settings(base), base / "read", Lora(2))  # finished
    assert written.read_bytes() == bits
    assert weights_hash(again.model) == weights_hash(plain)


def test_another_rank_or_none_is_refused_on_resuming(base):
    leg(finetune_lora, settings(base), base / "ranks", Lora(2), max_steps=4)
    for changed in (Lora(3), Lora(2, 8.0)):
        with pytest.raises(
            RunError, match=r"trains Lora\(rank=2, alpha=16.0\), not Lora"
        ):
            leg(finetune_lora, settings(base), base / "ranks", changed)
    with pytest.raises(RunError, match="trains Lora.* not all_weights; choose another"):
        leg(finetune, settings(base), base / "ranks")
    leg(finetune, settings(base), base / "plain", max_steps=4)
    with pytest.raises(RunError, match="trains all_weights, not Lora"):
        leg(finetune_lora, settings(base), base / "plain", Lora(2))


def test_a_run_without_adapters_is_as_before(base):
    leg(finetune, settings(base), base / "same", max_steps=4)
    record = json.loads((base / "same" / "run.json").read_text())
    assert "trains" not in record
    state = torch.load(
        base / "same" / "checkpoints" / "step-00000004.pt", weights_only=True
    )
    assert "adapted" not in state


def test_the_optimiser_holds_averages_of_the_adapters_alone(base):
    leg(finetune_lora, settings(base), base / "held", Lora(2), max_steps=4)
    path = base / "held" / "checkpoints" / "step-00000004.pt"
    held = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert len(held) == 16  # an A and a B in 8 layers
    assert {min(v["exp_avg"].shape) for v in held.values()} == {2}


def planned(base, make_state, **options):
    options = RunOptions(base / "never", device="cpu", precision="fp32", **options)
    train = partial(finetune, settings(base), make_state=make_state)
    return trial(train, options, seconds=0.2)


def test_a_plan_measures_what_is_trained_and_keeps_nothing(base):
    before = sorted(base.rglob("*"))
    whole = model_of(SHAPE).n_parameters(include_positions=True)
    model = model_of(SHAPE)
    add_adapters(model, 2)
    small = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for make_state, total, trained in (
        (all_weights, whole, whole),
        (Lora(2), whole + small, small),
    ):
        text = planned(base, make_state, micro_batch_size=4)
        assert f"{total:,} weights, {trained:,} of them trained" in text
        assert "whole run    12 steps, about 0.0 minutes" in text
        assert "GB at most in" in text and "fp32" in text
    assert sorted(base.rglob("*")) == before


def test_a_plan_counts_whole_cycles_after_the_first(tmp_path):
    """Steps of 9, 1, 1 seconds again and again; the fifth leg ends inside a cycle."""
    record = {"config": asdict(TrainConfig()), "machine": {"device_name": "toy", "precision": "fp32"}}  # fmt: skip

    def train(options):
        (options.out).mkdir(exist_ok=True)
        (options.out / "run.json").write_text(json.dumps(record))
        rows = 3 if options.max_steps else 8
        with (options.out / "timings.jsonl").open("a") as file:
            for i in range(rows):
                seconds = 50 if options.max_steps else [9, 1, 2][i % 3]
                row = {"step": i, "seconds_per_step": seconds, "peak_bytes": 10**9}
                file.write(json.dumps(row) + "\n" + '{"save_seconds": 1}\n')
        return Run(options.out, model_of(SHAPE), None, TrainConfig(steps=600), 3)

    text = trial(train, RunOptions(tmp_path / "never"), cycle=3)
    assert "speed        4.00 seconds a step" in text
    assert "600 steps, about 40.0 minutes" in text
    assert "1.00 GB at most in 11 steps" in text


def test_a_plan_is_made_in_one_process(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="without torchrun"):
        planned(base, all_weights)


def test_the_command(base):
    def command(*words, **options):
        return subprocess.run(
            [sys.executable, "-m", "gptlib.workshop.command", *words],
            cwd=base, capture_output=True, text=True, timeout=120, **options,
        )  # fmt: skip

    words = [
        "finetune", "--run", "base", "--data", "chats.jsonl", "--steps", "4",
        "--batch-size", "4", "--device", "cpu", "--no-progress",
    ]  # fmt: skip
    done = command(*words, "--out", "shell", "--lora", "2", "--lora-alpha", "4")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((base / "shell" / "adapter" / FILES[0]).read_text())["lora_alpha"]
        == 4
    )
    done = command("chat", "--run", "shell", input="Who ?\n")
    assert done.returncode == 0, done.stderr
    done = command(*words, "--out", "planned", "--lora", "2", "--plan")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert " of them trained" in done.stdout and not (base / "planned").exists()
    done = command(*words, "--out", "high", "--lora", "17")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(
        "can have 1 to 16"
    )


def test_a_weighted_loss_reaches_every_adapter():
    model = adapted()
    row = (list(range(12)), [False] * 4 + [True] * 8)
    weighted_loss(model, *chat_batch([row], 1.0)).backward()
    for layer in adapters(model).values():
        assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
        assert layer.weight.grad is None
