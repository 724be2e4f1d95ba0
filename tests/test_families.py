"""LLaMA, Mistral, Qwen and BLOOM: parity with transformers, folders, tokenizers."""

import dataclasses
import json
import shutil

import pytest
import torch
from engine import model_of
from tokenizers import (
    Regex,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tokenizers import (
    Tokenizer as FastTokenizer,
)

from gptlib import GptlibError
from gptlib.decoder import DecoderConfig
from gptlib.exchange import crop_block_size, export_run, import_model, save_imported
from gptlib.gpt import GPT
from gptlib.tokenizer import TokenizerError
from gptlib.workshop.families import (
    FAMILIES,
    by_head,
    by_part,
    family_of,
    from_family,
    our_decoder_config,
    to_family,
)
from gptlib.workshop.run_folders import load_run
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    ForeignTokenizer,
    open_tokenizer,
)


SHAPES = {
    "small": {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 40,
        "vocab_size": 64,
    },
    "three heads": {
        "n_layer": 1,
        "n_head": 3,
        "n_embd": 24,
        "block_size": 16,
        "vocab_size": 50,
    },
}
OPTIONS = {
    "full heads": {},
    "grouped": {"n_inner": 40},
    "wide heads, untied": {"n_kv_head": 1, "head_size": 16, "tied_head": False, "rope_base": 5e5},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0, "norm_eps": 1e-6},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 10},
}  # fmt: skip
GRID = [
    (f, s, o)
    for f in FAMILIES
    for s in SHAPES
    for o in OPTIONS
    if f != "bloom" or o == "full heads"
]


def family_model(family: str, shape: str = "small", options: str = "full heads") -> GPT:
    more = dict(OPTIONS[options])
    if options == "grouped":
        more["n_kv_head"] = {"small": 2, "three heads": 1}[shape]
    return model_of(DecoderConfig(**SHAPES[shape], **FAMILIES[family].parts, **more))


@pytest.mark.parametrize("family, shape, options", GRID)
@torch.no_grad()
def test_logits_equal_transformers_in_both_directions(family, shape, options):
    ours = family_model(family, shape, options)
    n_vocab = ours.config.vocab_size
    tokens = torch.randint(n_vocab, (2, ours.config.block_size))
    theirs = to_family(ours, n_vocab, 0)
    # Mistral's shape is LLaMA's: what is written is a LLaMA, what is read may be either
    wanted = "llama" if family == "mistral" else family
    assert theirs.config.model_type == wanted
    a, b = ours(tokens)[0], theirs(tokens).logits
    assert (a - b).abs().max() < 1e-4 * b.abs().max()
    stored = theirs.config.to_dict() | {"model_type": family}
    stored |= {"sliding_window": None, "use_sliding_window": False}
    config = our_decoder_config(stored)
    there = dataclasses.replace(
        ours.config, n_inner=ours.config.inner_width if family != "bloom" else None
    )
    same = {f.name for f in dataclasses.fields(config)} - {
        "n_kv_head",
        "head_size",
        "rope_original",
    }
    assert all(getattr(config, name) == getattr(there, name) for name in same)
    back = from_family(theirs.state_dict(), config, family)
    assert torch.equal(back(tokens)[0], a)


@torch.no_grad()
def test_mistrals_own_class_gives_our_logits():
    from transformers import MistralConfig, MistralForCausalLM

    theirs = MistralForCausalLM(
        MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=8, max_position_embeddings=100, sliding_window=20)
    ).eval()  # fmt: skip
    config = our_decoder_config(theirs.config.to_dict())
    assert config.block_size == 20  # no text is longer than the window
    ours, tokens = (
        from_family(theirs.state_dict(), config, "mistral"),
        torch.randint(64, (2, 20)),
    )
    assert torch.allclose(ours(tokens)[0], theirs(tokens).logits, atol=1e-5)


def test_blooms_rows_are_put_in_order_and_back():
    rows = torch.arange(2 * 3 * 2)  # two heads of two rows: q0 q0 k0 k0 v0 v0 q1 ...
    assert by_part(rows, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert torch.equal(by_head(by_part(rows, 2), 2), rows)


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; there are gpt2, llama, mistral, qwen2, qwen3, bloom"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 8}}, "high_freq_factor"),
    ],
)  # fmt: skip
def test_features_that_are_not_here_are_named(change, message):
    assert our_decoder_config(LLAMA).n_embd == 32
    with pytest.raises(ExchangeError, match=message):
        our_decoder_config(LLAMA | change)


def test_parts_that_no_class_has_are_named():
    config = DecoderConfig(**SHAPES["small"], positions="alibi", mlp="swiglu")
    with pytest.raises(ExchangeError, match="positions alibi, mlp swiglu"):
        family_of(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.norm.weight": None}, "weight 'model.norm.weight' is missing"),
        ({"model.layers.0.mlp.experts": torch.ones(2)}, "unknown weight 'model.layers.0.mlp.experts'"),
        ({"model.norm.weight": torch.ones(31)}, r"of shape \(31,\), not \(32,\)"),
        ({"model.norm.weight": torch.full((32,), torch.inf)}, "not finite"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, message):
    ours = family_model("llama")
    weights = to_family(ours, 64, 0).state_dict() | change
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ExchangeError, match=message):
        from_family(weights, ours.config, "llama")


# Tokenizers


def trained(kind: str) -> FastTokenizer:
    """A small tokenizer of LLaMA 3's kind (digits by three) or of LLaMA 2's (U+2581)."""
    texts = ["The river Ildiss, 1234 m long: über café \U0001f600.\n"] * 20
    if kind == "bytes":
        fast = FastTokenizer(models.BPE())
        cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(False)]
        )
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        fast = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        fast.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = []
    marks = ["<s>", "</s>", "<unk>"] + [f"<0x{b:02X}>" for b in range(256)] * (
        kind != "bytes"
    )
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    fast.train_from_iterator(texts, trainer)
    stored = json.loads(fast.to_str())  # LLaMA's bytes are no marks
    stored["added_tokens"] = stored["added_tokens"][:3]
    return FastTokenizer.from_str(json.dumps(stored))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_foreign_tokenizer_gives_the_same_ids_and_its_bytes(kind, tmp_path):
    fast = trained(kind)
    ours = ForeignTokenizer.from_text(fast.to_str(), kind, 0, 1)
    assert (ours.start_of_text, ours.end_of_text) == (0, 1)
    assert ours.n_vocab == fast.get_vocab_size()
    text = "über the river, 12345 </s>"
    assert 1 not in ours.encode(text)  # the mark's letters are ordinary text
    assert ours.decode(ours.encode(text)).lstrip() == text
    plain = "The river 1234"
    assert ours.encode(plain) == fast.encode(plain, add_special_tokens=False).ids
    ours.save(tmp_path / "tokenizer.json")
    back = open_tokenizer(tmp_path / "tokenizer.json")
    assert back.hash == ours.hash and back.encode(text) == ours.encode(text)
    altered = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(altered | {"end": 2}))
    with pytest.raises(TokenizerError, match="altered"):
        open_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="not in the vocabulary"):
        ours.decode_bytes([ours.n_vocab])
    with pytest.raises(TokenizerError, match="half of a character"):
        ours.encode("\ud800")


def test_a_tokenizer_of_an_unknown_kind_is_named():
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ExchangeError, match="a WordPiece tokenizer of an unknown kind"):
        ForeignTokenizer.from_text(fast.to_str(), "bert", 0, 0)
    with pytest.raises(ExchangeError, match="cannot be read"):
        ForeignTokenizer.from_text("{", "cut", 0, 0)


# Folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA in bf16, in five files, with a tokenizer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama") / "hf"
    fast = trained("bytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=fast.get_vocab_size(), hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(
        path, max_shard_size="20KB"
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(path)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


@torch.no_grad()
def test_a_folder_comes_in_and_goes_out(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = import_model(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("The river 1234")
    assert (
        ids == their_tokenizer("The river 1234", add_special_tokens=False)["input_ids"]
    )
    tokens = torch.tensor([[tokenizer.start_of_text, *ids]])
    assert torch.allclose(model(tokens)[0], theirs(tokens).logits, atol=1e-5)
    save_imported(crop_block_size(model, 32), tokenizer, "llama", tmp_path / "run")
    run = load_run(tmp_path / "run")
    greedy = run.sample("The river", 12, temperature=0)
    start = torch.tensor([[0, *tokenizer.encode("The river")]])
    wanted = theirs.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=1)  # fmt: skip
    new = wanted[0, start.shape[1] :].tolist()
    new = new[: new.index(1)] if 1 in new else new
    assert greedy == "The river" + tokenizer.decode(new)
    out = export_run(run, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.allclose(again(tokens).logits, theirs(tokens).logits, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("The river 1234", add_special_tokens=False)[
            "input_ids"
        ]
        == ids
    )
    assert "llama" in (out / "README.md").read_text()


def test_an_imported_run_is_evaluated_and_fine_tuned_with_adapters(
    folder, tmp_path, monkeypatch
):
    from gptlib.evaluation import evaluate
    from gptlib.finetuning import finetune_config
    from gptlib.lora import Lora, finetune_lora, load_adapter
    from gptlib.workshop.runs import RunOptions
    from gptlib.workshop.token_files import load_tokens

    monkeypatch.setenv("GPTLIB_CACHE", str(tmp_path / "cache"))
    model, tokenizer = import_model(str(folder))
    save_imported(model, tokenizer, "llama", tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("The river Ildiss, 1234 m long.\n" * 400)
    split = load_tokens(str(text), tokenizer).split("validation")
    assert int(split.ids[0]) == tokenizer.start_of_text
    assert evaluate(model, split, tokenizer, corpus="text").nats_per_token > 1
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for i in range(60):
            chat = [
                {"role": "user", "content": f"river {i}?"},
                {"role": "assistant", "content": "Ildiss"},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    config = finetune_config(str(tmp_path / "run"), str(chats), steps=12, batch_size=8, learning_rate=0.02)  # fmt: skip
    options = RunOptions(tmp_path / "tuned", progress=False, micro_batch_size=8)
    tuned = finetune_lora(config, options, Lora(2))
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    plain = load_run(tmp_path / "run")
    load_adapter(plain.model, tmp_path / "tuned" / "adapter")
    tokens = torch.tensor([[0, *tokenizer.encode("The river")]])
    with torch.no_grad():
        assert torch.allclose(plain.model(tokens)[0], tuned.model(tokens)[0], atol=1e-4)


def test_folders_that_are_damaged_are_named(folder, tmp_path):
    for name, message in (
        ("tokenizer.json", "cannot be read|damaged"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("model-00002-of-*", "weights cannot be read"),
    ):
        bad = tmp_path / name.partition(".")[0]
        shutil.copytree(folder, bad)
        for path in bad.glob(name):
            path.write_text("{")
        with pytest.raises(GptlibError, match=message):
            import_model(str(bad))
