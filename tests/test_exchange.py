"""Exchange where a notebook cell cannot look: injected failures, damaged files, every feature by name."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from engine import randomise
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import gptlib.exchange as exchange
from gptlib.evaluation import token_losses
from gptlib.exchange import (
    ACTIVATION_NAMES,
    crop_block_size,
    export_run,
    from_gpt2_weights,
    import_model,
    our_config,
    save_imported,
    to_gpt2_weights,
)
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import generate
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.training import TrainConfig
from gptlib.workshop.run_folders import Run, load_run
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    to_fast_tokenizer,
)


TEXT = (
    "Alice was friends with Bob . Alice went to visit her friend Bob , and Bob 's friend Al . "
    * 3
)
TOKENIZER = Tokenizer.from_merges(train_bpe([TEXT], 290), "own")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_of(path, **options) -> Run:
    torch.manual_seed(0)
    shape = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 32,
        "vocab_size": 320,
    }
    config = GPTConfig(**shape | options)
    train = TrainConfig(model=config, corpus="own", tokenizer="own")
    path.mkdir(exist_ok=True)
    return Run(path, randomise(GPT(config)).eval(), TOKENIZER, train, 5)


@torch.no_grad()
def gap(model: GPT, theirs, ids: torch.Tensor) -> float:
    return (
        (model(ids)[0][..., : theirs.config.vocab_size] - theirs(ids).logits)
        .abs()
        .max()
        .item()
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATION_NAMES))
def test_the_exported_folder_computes_and_continues_the_same(
    tmp_path, bias, activation
):
    run = run_of(tmp_path / "run", bias=bias, activation=activation)
    folder = export_run(run, tmp_path / "hf")
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (
        theirs.config.vocab_size == TOKENIZER.n_vocab == len(tokenizer)
    )  # the padding is cropped
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    ids = torch.randint(0, TOKENIZER.n_vocab, (3, 32))
    assert gap(run.model, theirs, ids) < 1e-4
    prompt = ids[:1, :4]
    said = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(
        said, generate(run.model, prompt, 20, top_k=1, n_vocab=TOKENIZER.n_vocab)
    )
    assert tokenizer(TEXT)["input_ids"] == TOKENIZER.encode(TEXT)


def test_the_folder_holds_what_it_should(tmp_path):
    run = run_of(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 5, "validation_loss": 3.25}\n')
    folder = export_run(run, tmp_path / "hf")
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    } <= names
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "3.2500 nats" in card and '"learning_rate"' in card and "own" in card
    assert (
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        == TOKENIZER.end_of_text
    )
    assert (
        os.access(folder, os.R_OK | os.X_OK) and folder.stat().st_mode & 0o755 == 0o755
    )


def test_pipeline(tmp_path):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    pipe = transformers.pipeline("text-generation", str(folder), device="cpu")
    said = pipe("Alice was", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert said.startswith("Alice was") and len(said) > len("Alice was")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_short_floats(tmp_path, dtype):
    run = run_of(tmp_path / "run")
    folder = export_run(run, tmp_path / "hf", dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == exchange.DTYPES[dtype]
    back, _ = import_model(str(folder))
    for name, value in run.model.state_dict().items():
        wanted = value[: TOKENIZER.n_vocab] if name == "wte.weight" else value
        assert torch.equal(
            back.state_dict()[name], wanted.to(exchange.DTYPES[dtype]).float()
        ), name


def test_export_then_import_gives_equal_bits(tmp_path):
    for bias in (False, True):
        run = run_of(tmp_path / "run", bias=bias)
        back, tokenizer = import_model(str(export_run(run, tmp_path / f"hf-{bias}")))
        assert tokenizer.hash == TOKENIZER.hash
        state = back.state_dict()
        for name, value in run.model.state_dict().items():
            assert torch.equal(
                state.pop(name),
                value[: TOKENIZER.n_vocab] if name == "wte.weight" else value,
            ), name
        assert all(
            value.eq(0).all() for value in state.values()
        )  # the biases it had not


def test_export_refuses_with_one_line(tmp_path):
    run = run_of(tmp_path / "run")
    (tmp_path / "there").mkdir()
    with pytest.raises(ExchangeError, match="there exists; choose another --out"):
        export_run(run, tmp_path / "there")
    with pytest.raises(
        ExchangeError, match="unknown dtype 'fp8'; there are fp32, bf16, fp16"
    ):
        export_run(run, tmp_path / "hf", dtype="fp8")
    run.model.h[1].ln_2.weight.data[3] = float("inf")
    with pytest.raises(
        ExchangeError, match="'h.1.ln_2.weight' holds values that are not finite"
    ):
        export_run(run, tmp_path / "hf")
    other = dataclasses.replace(
        run_of(tmp_path / "run"),
        tokenizer=Tokenizer("own", TOKENIZER.ranks, r"\S+|\s+"),
    )
    with pytest.raises(ExchangeError, match="does not split text as GPT-2 does"):
        export_run(other, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


@pytest.mark.parametrize("where", ["to_fast_tokenizer", "model_card"])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, where):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(exchange, where, fail)
    with pytest.raises(OSError, match="no space"):
        export_run(run_of(tmp_path / "run"), tmp_path / "deep" / "hf")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run")
    monkeypatch.setattr(
        exchange.Checkpoints,
        "save",
        lambda *_: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        save_imported(run.model, TOKENIZER, "x", tmp_path / "deep" / "run")
    assert list((tmp_path / "deep").iterdir()) == []


# In


@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 16, 40), (3, 4, 32, 64, 1000), (2, 3, 24, 5, 64)]
)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_any_gpt2_shape_comes_in_with_equal_logits(shape, activation):
    n_layer, n_head, n_embd, n_positions, vocab = shape
    config = GPT2Config(
        vocab_size=vocab, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        activation_function=activation, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = randomise(GPT2LMHeadModel(config), 0.2).eval()
    model = from_gpt2_weights(theirs.state_dict(), our_config(config.to_dict()))
    assert gap(model, theirs, torch.randint(0, vocab, (2, n_positions))) < 1e-4
    back = to_gpt2_weights(model, vocab)
    for name, value in theirs.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(back[name], value), name
    padded = from_gpt2_weights(
        theirs.state_dict(), our_config(config.to_dict(), vocab_size=vocab + 24)
    )
    assert gap(padded, theirs, torch.randint(0, vocab, (1, n_positions))) < 1e-4


WEIGHTS = to_gpt2_weights(randomise(GPT(GPTConfig(2, 2, 8, 16, True, 32))), 32)
CONFIG = GPTConfig(2, 2, 8, 16, True, 32)


def test_names_without_prefix_and_old_buffers_are_understood():
    plain = {
        name.removeprefix("transformer."): value for name, value in WEIGHTS.items()
    }
    plain |= {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    assert torch.equal(
        from_gpt2_weights(plain, CONFIG).wpe.weight, WEIGHTS["transformer.wpe.weight"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.h.0.attn.q_norm.weight": torch.ones(4)}, "unknown weight 'h.0.attn.q_norm.weight'"),
        ({"transformer.h.2.ln_1.weight": torch.ones(8)}, "unknown weight 'h.2.ln_1.weight'"),
        ({"score.weight": torch.ones(2, 8)}, "unknown weight 'score.weight'"),
        ({"transformer.ln_f.bias": None}, "weight 'ln_f.bias' is missing"),
        ({"transformer.wte.weight": None}, "weight 'wte.weight' is missing"),
        ({"transformer.h.1.mlp.c_fc.weight": torch.ones(32, 8)}, r"'h.1.mlp.c_fc.weight' has shape \(8, 32\), not \(32, 8\)"),
        ({"transformer.wpe.weight": torch.ones(15, 8)}, r"'wpe.weight' has shape \(15, 8\), not \(16, 8\)"),
        ({"transformer.wte.weight": torch.ones(33, 8)}, r"'wte.weight' has shape \(33, 8\), not \(32, 8\)"),
        ({"transformer.wte.weight": torch.ones(8)}, r"'wte.weight' has shape \(8,\)"),
        ({"transformer.h.0.ln_1.bias": torch.full((8,), torch.nan)}, "'h.0.ln_1.bias' holds values that are not finite"),
        ({"lm_head.weight": torch.ones(32, 8)}, "untied head"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, message):
    changed = {
        name: value for name, value in (WEIGHTS | change).items() if value is not None
    }
    with pytest.raises(ExchangeError, match=message):
        from_gpt2_weights(changed, CONFIG)


@pytest.mark.parametrize(
    "feature, value",
    [
        ("model_type", "llama"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("activation_function", "relu"),
    ],
)
def test_features_that_gpt2_has_not_are_named(feature, value):
    config = GPT2Config(n_embd=8, n_head=2).to_dict()
    assert our_config(config).n_embd == 8
    with pytest.raises(ExchangeError, match=feature):
        our_config(config | {feature: value})
    our_config(config | {"n_inner": 32})  # the usual width, spelled out


def test_folders_that_are_no_checkpoint(tmp_path):
    good = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    cases = [
        ("config.json", None, "no config.json there"),
        ("config.json", "{", "config.json: damaged"),
        (
            "config.json",
            "{}",
            "config.json: model_type is None; there are gpt2, llama",
        ),
        ("config.json", '{"model_type": "llama"}', "config.json: .* is missing"),
        ("model.safetensors", None, "weights cannot be read"),
        ("model.safetensors", "half", "weights cannot be read"),
        ("tokenizer.json", None, "no tokenizer.json there"),
        ("tokenizer.json", "{}", "a None tokenizer"),
    ]
    for number, (name, content, message) in enumerate(cases):
        bad = tmp_path / str(number)
        shutil.copytree(good, bad)
        (bad / name).unlink()
        if content is not None:
            (bad / name).write_text(content)
        with pytest.raises(ExchangeError, match=message):
            import_model(str(bad))
    with pytest.raises(ExchangeError, match="no such folder"):
        import_model(str(tmp_path / "nowhere"))


def test_pytorch_bin_is_read(tmp_path):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    expected, _ = import_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(
        to_gpt2_weights(expected, TOKENIZER.n_vocab), folder / "pytorch_model.bin"
    )
    found, _ = import_model(str(folder))
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), expected.state_dict().values())
    )


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    larger = Tokenizer.from_merges(train_bpe([TEXT], 300), "larger")
    to_fast_tokenizer(larger, 32).save_pretrained(folder)
    with pytest.raises(ExchangeError, match="do not belong together"):
        import_model(str(folder))


# Run folders and the command line


def test_an_imported_model_becomes_a_run(tmp_path):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    model, tokenizer = import_model(str(folder))
    save_imported(model, tokenizer, str(folder), tmp_path / "new")
    run = load_run(tmp_path / "new")
    ids = torch.randint(0, TOKENIZER.n_vocab, (1, 32))
    assert (
        torch.equal(run.model(ids)[0], model(ids)[0])
        and run.tokenizer.hash == TOKENIZER.hash
    )
    with pytest.raises(ExchangeError, match="exists; choose another --out"):
        save_imported(model, tokenizer, str(folder), tmp_path / "new")
    again = export_run(run, tmp_path / "again")
    assert (
        gap(run.model, AutoModelForCausalLM.from_pretrained(again).eval(), ids) < 1e-4
    )


@pytest.mark.parametrize("block_size", [0, -1, 33])
def test_crop_block_size_out_of_range(tmp_path, block_size):
    with pytest.raises(
        ExchangeError,
        match=f"block_size {block_size} is not between 1 and the model's 32",
    ):
        crop_block_size(run_of(tmp_path / "run").model, block_size)


def test_crop_block_size_keeps_early_positions(tmp_path):
    model = run_of(tmp_path / "run").model
    small, ids = crop_block_size(model, 9), torch.randint(0, 280, (2, 9))
    assert torch.equal(small(ids)[0], model(ids)[0]) and small.config.block_size == 9
    with pytest.raises(ValueError, match="block_size"):
        small(torch.zeros(1, 10, dtype=torch.long))
    before = model(ids)[0]
    with torch.no_grad():
        small.wte.weight.zero_()  # a copy: what happens to it does not reach the model
    assert torch.equal(model(ids)[0], before)


def cli(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptlib.workshop.command", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_a_sharded_folder_comes_in(tmp_path):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    expected, _ = import_model(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    found, _ = import_model(str(folder))
    pairs = zip(found.state_dict().values(), expected.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_a_folder_with_other_weights_is_refused(tmp_path, change):
    from safetensors.torch import load_file, save_file

    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    if change == "unknown":
        weights["transformer.h.0.attn.q_norm.weight"] = torch.ones(4)
    else:
        del weights["transformer.h.1.ln_2.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    word = "q_norm" if change == "unknown" else "h.1.ln_2.weight"
    with pytest.raises(ExchangeError, match=word):
        import_model(str(folder))


def test_command_line_there_and_back(tmp_path, monkeypatch):
    folder = export_run(run_of(tmp_path / "run"), tmp_path / "hf")
    new = tmp_path / "in"
    done = cli("import", "--model", folder, "--out", new, "--block-size", 16)
    assert done.returncode == 0, done.stderr
    sample = ["sample", "--run", new, "--prompt", "Alice", "--seed", 1]
    done = cli(*sample, "--max-new-tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("Alice"), done.stderr
    text, out = tmp_path / "text.txt", tmp_path / "evaluation.json"
    text.write_text(10 * TEXT.replace(" . ", " .\n"), encoding="utf-8")
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "cache"))
    evaluate = ["evaluate", "--run", new, "--corpus", text, "--split", "train"]
    done = cli(*evaluate, "--out", out)
    assert done.returncode == 0 and "nats per token" in done.stdout, done.stderr
    assert json.loads(out.read_text())["context"] == 16
    done = cli("export", "--run", new, "--out", tmp_path / "again")
    assert done.returncode == 0 and (tmp_path / "again" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "--run", "nowhere", "--out", "x"], "no run.json there"),
        (["import", "--model", "./nowhere", "--out", "x"], "no such folder"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, arguments, message):
    done = cli(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0], done.stderr


def test_lm_evaluation_harness_agrees(tmp_path):
    """A local word-perplexity task, run by the harness on the exported folder and by us on the run."""
    pytest.importorskip(
        "lm_eval",
        reason="lm-evaluation-harness is not installed (pip install 'lm-eval[hf]')",
    )
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    run = run_of(
        tmp_path / "run", vocab_size=TOKENIZER.n_vocab
    )  # padding would take a share
    pages = [
        " ".join(random.Random(i).choices(TEXT.split(), k=20 + 30 * i))
        for i in range(6)
    ]
    lines = "".join(json.dumps({"page": page}) + "\n" for page in pages)
    (tmp_path / "pages.jsonl").write_text(lines)
    task = {
        "task": "pages", "dataset_path": "json", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "pages.jsonl")}},
        "validation_split": "validation", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    }  # fmt: skip
    theirs = HFLM(
        pretrained=str(export_run(run, tmp_path / "hf")), device="cpu", batch_size=1
    )
    found = lm_eval.simple_evaluate(theirs, tasks=[task], bootstrap_iters=0)["results"][
        "pages"
    ]
    rows = [
        np.array([TOKENIZER.end_of_text, *TOKENIZER.encode(page)]) for page in pages
    ]
    nats = sum(
        token_losses(run.model, ids).sum() for ids in rows
    )  # each page after its own mark
    words, size = sum(len(page.split()) for page in pages), sum(map(len, pages))
    assert found["word_perplexity,none"] == pytest.approx(
        math.exp(nats / words), rel=0.005
    )
    assert found["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / size, rel=0.005
    )
