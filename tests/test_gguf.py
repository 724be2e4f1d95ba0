"""GGUF files: every tensor, token and merge read back; what llama.cpp would not check."""

import contextlib
import dataclasses
import json
import math
import random
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from engine import model_of
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

import gptlib.exchange as exchange
from gptlib.decoder import DecoderConfig, rotate
from gptlib.exchange import Export
from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import Tokenizer, train_bpe
from gptlib.workshop.gguf_files import LLAMA3_PATTERN, write_gguf
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    ForeignTokenizer,
    to_fast_tokenizer,
)


TEXT = (
    "Alice was friends with Bob . Alice went to visit her friend Bob , and Bob 's friend Al . "
    * 3
)
TOKENIZER = Tokenizer.from_merges(train_bpe([TEXT], 290), "own")
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 48, "vocab_size": 320}
LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "swiglu"}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original": 26, "rope_base": 500.0}  # fmt: skip
GPT2 = {
    "bias": GPTConfig(**SHAPE, bias=True, activation="gelu_tanh"),
    "no bias": GPTConfig(**SHAPE, activation="gelu_tanh"),
    "named parts": DecoderConfig(**SHAPE, activation="gelu_tanh"),
}
LLAMAS = {
    "llama": DecoderConfig(**SHAPE, **LLAMA),
    "grouped": DecoderConfig(**SHAPE, **LLAMA, n_kv_head=2),
    "llama3": DecoderConfig(**SHAPE, **LLAMA, n_kv_head=2, **LLAMA3),
    "linear": DecoderConfig(**SHAPE, **LLAMA, rope_scaling="linear", rope_factor=2.0),
    "own widths": DecoderConfig(**SHAPE, **LLAMA, n_kv_head=1, head_size=32, n_inner=96, norm_eps=1e-3),
    "untied": DecoderConfig(**SHAPE, **LLAMA, tied_head=False),
}  # fmt: skip
CONFIGS = GPT2 | LLAMAS


def fields_of(path) -> dict:
    """Keys and values of a file, the reader's own entries left out."""
    fields = gguf.GGUFReader(path).fields.items()
    return {k: f.contents() for k, f in fields if not k.startswith("GGUF.")}


def tensors_of(path) -> dict[str, np.ndarray]:
    """Tensors of a file as float32, by name."""
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type)
        for t in gguf.GGUFReader(path).tensors
    }


def by_neighbours(rows: torch.Tensor, hs: int) -> torch.Tensor:
    """Row 2i of a head is its row i, row 2i + 1 its row i + hs / 2; written out."""
    order = []
    for head in range(0, len(rows), hs):
        for i in range(hs // 2):
            order += [head + i, head + i + hs // 2]
    return rows[order]


def expected(model: GPT) -> dict[str, torch.Tensor]:
    """Every tensor of the file, spelled out."""
    c, state = DecoderConfig(**dataclasses.asdict(model.config)), model.state_dict()
    n, width, kv = TOKENIZER.n_vocab, c.n_head * c.head_width, c.kv_heads * c.head_width
    found = {
        "token_embd.weight": state["wte.weight"][:n],
        "output_norm.weight": state["ln_f.weight"],
    }
    for i in range(c.n_layer):
        layer = lambda name: state[f"h.{i}.{name}.weight"]  # noqa: B023
        qkv, fc = layer("attn.c_attn"), layer("mlp.c_fc")
        mine = {
            "attn_norm": layer("ln_1"),
            "ffn_norm": layer("ln_2"),
            "attn_output": layer("attn.c_proj"),
            "ffn_down": layer("mlp.c_proj"),
        }
        if c.mlp == "gelu":
            mine |= {"attn_qkv": qkv, "ffn_up": fc}
        else:
            mine |= {
                "attn_q": by_neighbours(qkv[:width], c.head_width),
                "attn_k": by_neighbours(qkv[width : width + kv], c.head_width),
                "attn_v": qkv[width + kv :],
                "ffn_gate": fc[: c.inner_width],
                "ffn_up": fc[c.inner_width :],
            }
        found |= {f"blk.{i}.{name}.weight": value for name, value in mine.items()}
    if c.mlp == "gelu":
        found["position_embd.weight"] = state["wpe.weight"]
        ours = {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn"}
        ours |= {"attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
        names = {"output_norm": "ln_f"}
        names |= {
            f"blk.{i}.{a}": f"h.{i}.{b}" for i in range(c.n_layer) for a, b in ours.items()
        }  # fmt: skip
        for theirs, mine in names.items():
            zeros = torch.zeros(len(found[f"{theirs}.weight"]))
            found[f"{theirs}.bias"] = state.get(f"{mine}.bias", zeros)
    if not c.tied_head:
        found["output.weight"] = state["lm_head.weight"][:n]
    if c.rope_scaling == "llama3":
        divisors = []
        for i in range(c.head_width // 2):
            turns = (
                c.rope_original * c.rope_base ** (-2 * i / c.head_width) / 2 / math.pi
            )
            kept = min(1, max(0, (turns - 1) / 3))
            divisors.append(1 / (kept + (1 - kept) / c.rope_factor))
        assert min(divisors) == 1 and 3.99 < max(divisors) <= 4
        found["rope_freqs.weight"] = torch.tensor(divisors)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_tensor_is_read_back(tmp_path, config):
    model = model_of(config)
    found = tensors_of(write_gguf(model, TOKENIZER, tmp_path / "m.gguf"))
    wanted = expected(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == tuple(value.shape), name
        exact = name != "rope_freqs.weight"
        assert np.allclose(found[name], value, rtol=0 if exact else 1e-6, atol=0), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype, bits", [("f16", 16), ("q8_0", 8.5)])
def test_smaller_types_round_and_no_more(tmp_path, config, dtype, bits):
    path = write_gguf(model_of(config), TOKENIZER, tmp_path / "m.gguf", dtype=dtype)
    exact = {n: v.numpy() for n, v in expected(model_of(config)).items()}
    for t in gguf.GGUFReader(path).tensors:
        value, right = gguf.dequantize(t.data, t.tensor_type), exact[t.name]
        whole = right.ndim == 1 or t.name == "position_embd.weight"
        small = dtype == "q8_0" and not right.shape[-1] % 32
        kind = "F32" if whole else "Q8_0" if small else "F16"
        assert t.tensor_type.name == kind, t.name
        if whole:
            assert np.allclose(value, right, rtol=1e-6, atol=0), t.name
        elif kind == "F16":
            assert np.array_equal(value, right.astype(np.float16).astype(np.float32))
        else:
            largest = np.abs(right.reshape(len(right), -1, 32)).max(-1)
            error = np.abs((value - right).reshape(len(right), -1, 32)).max(-1)
            assert (error <= 0.57 * largest / 127).all() and error.max() > 0, t.name
            assert t.n_bytes * 8 == bits * right.size
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {"F32", dtype.upper()} <= kinds
    keys = fields_of(path)
    assert keys["general.file_type"] == {"f16": 1, "q8_0": 7}[dtype]
    assert keys.get("general.quantization_version") == (2 if dtype == "q8_0" else None)


def test_rows_of_any_length_have_a_type(tmp_path):
    config = dataclasses.replace(LLAMAS["llama"], n_inner=72)
    path = write_gguf(model_of(config), TOKENIZER, tmp_path / "m.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_shape_is_written(tmp_path, config):
    c = DecoderConfig(**dataclasses.asdict(config))
    path = write_gguf(model_of(config), TOKENIZER, tmp_path / "m.gguf", name="mine")
    keys = fields_of(path)
    kind = "gpt2" if c.mlp == "gelu" else "llama"
    assert keys["general.architecture"] == kind and keys["general.name"] == "mine"
    wanted = {
        "context_length": 48,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": c.inner_width,
        "vocab_size": TOKENIZER.n_vocab,
        "attention.head_count": 4,
        "attention.head_count_kv": c.kv_heads,
    }
    if kind == "gpt2":
        wanted["attention.layer_norm_epsilon"] = c.norm_eps
    else:
        wanted["attention.layer_norm_rms_epsilon"] = c.norm_eps
        wanted |= {"rope.freq_base": c.rope_base, "rope.dimension_count": c.head_width}
        wanted |= {f"attention.{x}_length": c.head_width for x in ("key", "value")}
    if c.rope_scaling == "linear":
        wanted |= {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    found = {
        k.removeprefix(f"{kind}."): v for k, v in keys.items() if k.startswith(kind)
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == (
            pytest.approx(value) if isinstance(value, float) else value
        )


@pytest.mark.parametrize("name", ["grouped", "llama3", "linear", "own widths"])
def test_neighbours_turned_by_the_files_angles_score_as_ours(tmp_path, name):
    """What llama.cpp computes from the file, written out; ours by halves."""
    config = LLAMAS[name]
    model, hs = model_of(config), config.head_width
    path = write_gguf(model, TOKENIZER, tmp_path / "m.gguf")
    found, keys = tensors_of(path), fields_of(path)
    attention = model.h[0].attn
    x = torch.randn(48, 64)
    q, k, _ = attention.c_attn(x).split(attention.split, dim=1)
    places = torch.arange(48, dtype=torch.float64)[:, None]
    i = torch.arange(0, hs, 2, dtype=torch.float64)
    angles = places * keys["llama.rope.freq_base"] ** (-i / hs)
    angles /= keys.get("llama.rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in found:
        angles /= torch.tensor(found["rope_freqs.weight"])
    cos, sin = angles.cos().float(), angles.sin().float()

    def turned(name, head):
        rows = x @ torch.tensor(found[f"blk.0.{name}.weight"]).T
        a, b = rows[:, head * hs : (head + 1) * hs].unflatten(1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(1)

    for head in range(config.n_head):
        mine = rotate(q[:, head * hs :][:, :hs], attention.cos, attention.sin)
        group = head // attention.group
        other = rotate(k[:, group * hs :][:, :hs], attention.cos, attention.sin)
        right = mine @ other.T
        scores = turned("attn_q", head) @ turned("attn_k", group).T
        assert (scores - right).abs().max() < 1e-4 * right.abs().max()


def test_every_token_and_merge_is_read_back(tmp_path):
    path = write_gguf(model_of(GPT2["bias"]), TOKENIZER, tmp_path / "m.gguf")
    keys = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in fields_of(path).items()
        if k.startswith("tokenizer")
    }
    stored = json.loads(
        to_fast_tokenizer(TOKENIZER, 48).backend_tokenizer.to_str()
    )  # written by another library
    vocabulary = stored["model"]["vocab"]
    assert keys.pop("tokens") == sorted(vocabulary, key=vocabulary.get)
    assert keys.pop("merges") == [" ".join(m) for m in stored["model"]["merges"]]
    assert keys.pop("token_type") == [1] * (TOKENIZER.n_vocab - 1) + [3]
    end = TOKENIZER.end_of_text
    marks = {"bos_token_id": end, "eos_token_id": end, "add_bos_token": True}
    assert keys == {"model": "gpt2", "pre": "gpt-2"} | marks
    rows = tensors_of(path)["token_embd.weight"].shape[0]
    assert rows == TOKENIZER.n_vocab < SHAPE["vocab_size"]


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3_CUT = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
RULES = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([DIGITS, WORDS]),
    "llama-bpe": pre_tokenizers.Sequence([LLAMA3_CUT, BYTES]),
}


def foreign(rule, change=lambda stored: None, marks=("<a>", "<b>")) -> ForeignTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = rule, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(marks), show_progress=False, initial_alphabet=alphabet
    )  # fmt: skip
    fast.train_from_iterator([TEXT], trainer)
    fast.add_tokens(["Carol"])
    stored = json.loads(fast.to_str())
    stored["model"]["ignore_merges"] = rule is RULES["llama-bpe"]
    change(stored)
    return ForeignTokenizer.from_text(json.dumps(stored), "other", start=0, end=1)


@pytest.mark.parametrize("pre", RULES)
def test_another_models_tokenizer_is_read_back(tmp_path, pre):
    def change(stored):  # an id that nothing has
        stored["added_tokens"][-1]["id"] += 3

    tokenizer = foreign(RULES[pre], change)
    n = tokenizer.n_vocab
    path = write_gguf(model_of(LLAMAS["grouped"]), tokenizer, tmp_path / "m.gguf")
    keys = fields_of(path)
    tokens, kinds = (keys[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
    assert keys["tokenizer.ggml.pre"] == pre and len(tokens) == len(kinds) == n == 284
    assert tensors_of(path)["token_embd.weight"].shape[0] == n
    assert tokens[:2] == ["<a>", "<b>"] and kinds[:2] == [3, 3]
    assert tokens[n - 4 :] == [*(f"[PAD{i}]" for i in range(280, 283)), "Carol"]
    assert kinds[2:] == [1] * (n - 6) + [5, 5, 5, 4]
    for i in range(2, 280):
        assert tokenizer.fast.id_to_token(i) == tokens[i]
    merges = json.loads(tokenizer.text)["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(m) for m in merges]
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.eos_token_id"] == 1


def not_bytes(stored):
    stored["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}  # fmt: skip


@pytest.mark.parametrize(
    "rule, change, message",
    [
        (WORDS, not_bytes, "is no byte-level BPE"),
        (BYTES, lambda s: None, "cuts text by ByteLevel"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), lambda s: None, "cuts text by ByteLevel"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), WORDS]), lambda s: None, "cuts text by Digits, ByteLevel"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split("a", "isolated"), BYTES]), lambda s: None, "cuts text by Split, ByteLevel"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "removed"), BYTES]), lambda s: None, "cuts text by Split, ByteLevel"),
        (WORDS, lambda s: s.update(pre_tokenizer=None), "cuts text by None"),
        (WORDS, lambda s: s.update(normalizer=json.loads(normalizers.NFC().__getstate__())), r"changes text first \(NFC\)"),
        (WORDS, lambda s: s["model"].update(ignore_merges=True), "has ignore_merges True"),
        (RULES["llama-bpe"], lambda s: s["model"].update(ignore_merges=False), "has ignore_merges False"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path, rule, change, message
):
    with pytest.raises(ExchangeError, match=message) as error:
        write_gguf(
            model_of(LLAMAS["llama"]), foreign(rule, change), tmp_path / "m.gguf"
        )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "bf16"}, "unknown dtype 'bf16'; there are f32, f16, q8_0"),
        ({"out": "m.bin"}, "ends in .gguf; rename --out"),
        ({"tokenizer": Tokenizer("own", TOKENIZER.ranks, r"\w+")}, "does not split text as GPT-2 does"),
        ({"tokenizer": Tokenizer.from_merges([], "raw")}, "'raw' has no merges"),
        ({"config": {"vocab_size": 100}}, "has 290 ids and the model only 100"),
        ({"config": {"qk_norm": True}}, "a model of the kind qwen3; a GGUF file of this book"),
        ({"config": {"positions": "alibi"}}, "no class of transformers has these parts"),
        ({"weight": math.nan}, "weight 'h.1.mlp.c_proj.weight' holds values that are not finite"),
        ({"weight": 1e5, "dtype": "f16"}, "weight 'blk.1.ffn_down.weight' is too large for f16; take --dtype f32"),
        ({"weight": 1e7, "dtype": "q8_0"}, "weight 'blk.1.ffn_down.weight' is too large for q8_0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, change, message):
    config = {"n_inner": 96} | change.get("config", {})
    model = model_of(dataclasses.replace(LLAMAS["llama"], **config))
    if "weight" in change:
        model.h[1].mlp.c_proj.weight.data[3, 4] = change["weight"]
    with pytest.raises(ExchangeError, match=message) as error:
        write_gguf(
            model,
            change.get("tokenizer", TOKENIZER),
            tmp_path / change.get("out", "m.gguf"),
            dtype=change.get("dtype", "f32"),
        )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ExchangeError, match=r"gguf is missing; pip install 'gptlib\[hf\]'"
    ):
        write_gguf(model_of(GPT2["bias"]), TOKENIZER, tmp_path / "m.gguf")


def test_an_existing_file_stays(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(ExchangeError, match="exists; choose another --out"):
        write_gguf(model_of(GPT2["bias"]), TOKENIZER, path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_kv_data_to_file", "write_tensors_to_file"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(model_of(GPT2["bias"]), TOKENIZER, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_made_and_the_file_can_be_read_by_all(tmp_path):
    model = model_of(GPT2["bias"])
    path = write_gguf(model, TOKENIZER, str(tmp_path / "a" / "b" / "m.gguf"))
    assert list(path.parent.iterdir()) == [path] and path.stat().st_mode & 0o400
    again = write_gguf(model, TOKENIZER, tmp_path / "again.gguf")
    assert again.read_bytes() == path.read_bytes()


def test_the_command(tmp_path, monkeypatch):
    run = SimpleNamespace(model=model_of(GPT2["bias"]), tokenizer=TOKENIZER, path=tmp_path / "my-run")  # fmt: skip
    monkeypatch.setattr(exchange, "load_run", lambda path, which: run)
    for dtype, number in (("fp32", 0), ("f32", 0), ("fp16", 1), ("q8_0", 7)):
        out = tmp_path / f"{dtype}.gguf"
        Export(run=tmp_path, out=out, format="gguf", dtype=dtype)()
        keys = fields_of(out)
        assert keys["general.file_type"] == number and keys["general.name"] == "my-run"
    with pytest.raises(ExchangeError, match="unknown dtype 'bf16'"):
        Export(run=tmp_path, out=tmp_path / "x.gguf", format="gguf", dtype="bf16")()
    with pytest.raises(ExchangeError, match="unknown dtype 'q8_0'"):
        Export(run=tmp_path, out=tmp_path / "x", dtype="q8_0")()
    with pytest.raises(ExchangeError, match="unknown format 'onnx'; there are"):
        Export(run=tmp_path, out=tmp_path / "x", format="onnx")()


@contextlib.contextmanager
def llama_cpp_on(path):
    """Context with the file open in llama.cpp, its cache in float32."""
    import llama_cpp

    whole = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    engine = llama_cpp.Llama(
        str(path), n_ctx=48, logits_all=True, verbose=False, n_threads=1, **whole
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype, bound", [("f32", 1e-2), ("f16", 0.05), ("q8_0", 0.5)])
def test_llama_cpp_gives_our_logits(tmp_path, config, dtype, bound):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not here")
    model = model_of(config, std=0.15)
    for name, p in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            p.data += 1
    path = write_gguf(model, TOKENIZER, tmp_path / "m.gguf", dtype=dtype)
    ids = torch.randint(290, (1, 48), generator=torch.Generator().manual_seed(1))
    with llama_cpp_on(path) as engine, torch.no_grad():
        engine.eval(ids[0].tolist())
        found = np.array(engine.scores)
        right = model(ids)[0][0, :, :290].numpy()
    assert found.shape == right.shape and right.std() > 1
    difference = np.abs(found - right).max()
    print(f"logits differ by {difference:.0e}, spread {right.std():.2f}")
    assert difference < bound


def lines() -> list[str]:
    """1,000 lines: words of the tokenizer's text, odd letters, random bytes."""
    rng, words = random.Random(0), TEXT.split(" ")
    odd = " \n\t'’aeSé語👍\u0301\u200d\u00a0½٣_.-@ABCs!12345"
    made = [" ".join(rng.choices(words, k=12)) for _ in range(400)]
    made += ["".join(rng.choices(odd, k=30)) for _ in range(400)]
    made += [rng.randbytes(30).decode("utf-8", "replace") for _ in range(194)]
    return [
        *made,
        " ",
        "it's 'LL we'll",
        "a  b   c \n\n ",
        "a" * 500,
        "<|endoftext|>",
        "x\r\n\r\ny",
    ]


@pytest.mark.parametrize("pre", [None, *RULES], ids=str)
def test_llama_cpp_gives_our_ids_on_1000_lines(tmp_path, pre):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not here")
    tokenizer = foreign(RULES[pre]) if pre else TOKENIZER
    model = model_of(LLAMAS["grouped"])
    path = write_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert len(lines()) == 1000
    with llama_cpp_on(path) as engine:
        for line in lines():
            found = engine.tokenize(line.encode(), add_bos=False, special=False)
            assert found == tokenizer.encode(line), line
        with_mark = engine.tokenize(b"Bob", add_bos=True, special=False)
        assert engine.token_bos() == tokenizer.start_of_text
        assert engine.token_eos() == tokenizer.end_of_text
    assert with_mark == [tokenizer.start_of_text, *tokenizer.encode("Bob")]
