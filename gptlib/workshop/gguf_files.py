"""A model for llama.cpp: GGUF.

Tangled from book/workshop/W21_gguf_files.md; change it there, not here.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlib.decoder import (
    DecoderConfig,
    all_fields,
    model_config,
    neighbours_from_halves,
    rotary_speeds,
)
from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.families import (
    check_finite,
    family_of,
    need,
    split_rows,
    their_names,
)
from gptlib.workshop.files import sync_folder
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    ForeignTokenizer,
    in_letters,
    kind_of,
)


COMMON_NAMES = {
    "wte": ["token_embd"],
    "ln_f": ["output_norm"],
    "h.{}.ln_1": ["blk.{}.attn_norm"],
    "h.{}.ln_2": ["blk.{}.ffn_norm"],
    "h.{}.attn.c_proj": ["blk.{}.attn_output"],
    "h.{}.mlp.c_proj": ["blk.{}.ffn_down"],
}
NAMES = {
    "gpt2": COMMON_NAMES
    | {
        "wpe": ["position_embd"],
        "h.{}.attn.c_attn": ["blk.{}.attn_qkv"],
        "h.{}.mlp.c_fc": ["blk.{}.ffn_up"],
    },
    "llama": COMMON_NAMES
    | {
        "lm_head": ["output"],
        "h.{}.attn.c_attn": [f"blk.{{}}.attn_{part}" for part in "qkv"],
        "h.{}.mlp.c_fc": ["blk.{}.ffn_gate", "blk.{}.ffn_up"],
    },
}


def architecture_of(config: GPTConfig) -> str:
    """The program of llama.cpp for a model of ours: gpt2 or llama.

    Raises ExchangeError if neither has its parts.
    """
    if not isinstance(config, DecoderConfig):
        return "gpt2"
    if type(model_config(asdict(config))) is GPTConfig:
        return "gpt2"
    if (kind := family_of(config)) == "llama":
        return "llama"
    raise ExchangeError(
        f"a model of the kind {kind}; a GGUF file of this book holds GPT-2's parts or "
        "LLaMA's"
    )


def gguf_weights(model: GPT, n_vocab: int) -> dict[str, Tensor]:
    """Our weights under llama.cpp's names, float32, on the CPU, in its layout.

    Raises ExchangeError for parts that it has not, and for a value that is not finite.
    """
    kind, weights = architecture_of(model.config), {}
    config = DecoderConfig(**all_fields(model.config))
    check_finite(model.state_dict())
    for ours, value in model.state_dict().items():
        value = value.detach().cpu().float()
        if ours in ("wte.weight", "lm_head.weight"):
            value = value[:n_vocab]
        names = their_names(ours, NAMES[kind])
        for name, part in split_rows(value, names, config).items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                part = neighbours_from_halves(part, len(part) // config.head_width)
            weights[name] = part.contiguous()
    if kind == "gpt2":
        for name in list(weights):
            if name.endswith(".weight") and "_embd" not in name:
                bias = name.replace(".weight", ".bias")
                weights.setdefault(bias, torch.zeros(len(weights[name])))
    elif config.rope_scaling == "llama3":
        hs, base, far = config.head_width, config.rope_base, config.rope_original
        plain = rotary_speeds(hs, base, "none", 1.0, far)
        slower = rotary_speeds(hs, base, "llama3", config.rope_factor, far)
        weights["rope_freqs.weight"] = (plain / slower).float()
    return weights


def gguf_shape(config: GPTConfig, n_vocab: int) -> dict[str, Any]:
    """What llama.cpp must know of the shape, by key."""
    kind = architecture_of(config)
    c = DecoderConfig(**asdict(config))  # GPT-2's parts where the config names none
    shape: dict[str, Any] = {
        "context_length": c.block_size,
        "embedding_length": c.n_embd,
        "block_count": c.n_layer,
        "feed_forward_length": c.inner_width,
        "vocab_size": n_vocab,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.kv_heads,
    }
    if kind == "gpt2":
        shape["attention.layer_norm_epsilon"] = c.norm_eps
    else:
        shape |= {
            "attention.layer_norm_rms_epsilon": c.norm_eps,
            "attention.key_length": c.head_width,
            "attention.value_length": c.head_width,
            "rope.dimension_count": c.head_width,
            "rope.freq_base": c.rope_base,
        }
    if kind == "llama" and c.rope_scaling == "linear":
        shape |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rope_factor}
    return {f"{kind}.{key}": value for key, value in shape.items()}


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # steps of a tokenizer.json -> the rule's name in llama.cpp
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (LLAMA3_PATTERN, "bytes"): "llama-bpe",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


def step_of(step: dict) -> str:
    """One step of a pre_tokenizer in a word; a pattern stands for itself."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", kind)
    return str(kind)


def foreign_gguf_tokenizer(tokenizer: ForeignTokenizer) -> dict[str, Any]:
    """As `gguf_tokenizer`, for another model's tokenizer."""
    stored = json.loads(tokenizer.text)
    bpe, cut = stored["model"], stored.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    pre = PRE_TOKENIZERS.get(tuple(step_of(step) for step in steps))

    def refuse(reason: str):
        return ExchangeError(
            f"tokenizer {tokenizer.name!r} {reason}; a GGUF file of this book holds "
            "ours and those that cut text as GPT-2, SmolLM or Llama 3"
        )

    if kind_of(stored) != "letters":
        raise refuse("is no byte-level BPE")
    if pre is None:
        raise refuse(f"cuts text by {', '.join(str(s.get('type')) for s in steps)}")
    if stored.get("normalizer"):
        raise refuse(f"changes text first ({stored['normalizer'].get('type')})")
    if bool(bpe.get("ignore_merges")) != (pre == "llama-bpe"):
        raise refuse(f"has ignore_merges {bool(bpe.get('ignore_merges'))}")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.n_vocab)]
    kinds = [UNUSED] * len(tokens)
    for token, i in bpe["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in stored.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return {"pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


def gguf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything of a tokenizer that llama.cpp reads, by key.

    Raises ExchangeError for one that it would read otherwise than we do.
    """
    if isinstance(tokenizer, ForeignTokenizer):
        found = foreign_gguf_tokenizer(tokenizer)
    else:
        tokens, merges = in_letters(tokenizer)
        found = {"pre": "gpt-2", "tokens": tokens, "merges": [*map(" ".join, merges)]}
        found["token_type"] = [NORMAL] * (len(tokens) - 1) + [CONTROL]
    if not found["merges"]:
        raise ExchangeError(
            f"tokenizer {tokenizer.name!r} has no merges; llama.cpp wants some"
        )
    found |= {"model": "gpt2", "add_bos_token": True}
    found["bos_token_id"] = tokenizer.start_of_text
    found["eos_token_id"] = tokenizer.end_of_text
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers
LARGEST = {"f32": math.inf, "f16": 65504.0, "q8_0": 127 * 65504.0}


def type_of(name: str, value: Tensor, dtype: str) -> str:
    """How a tensor is stored in a file of this dtype."""
    if value.dim() == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if dtype == "q8_0" and value.shape[1] % 32 else dtype


def write_gguf(
    model: GPT,
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    dtype: str = "f32",
    name: str = "gptlib",
) -> Path:
    """Write a model and its tokenizer as a file that llama.cpp opens.

    dtype: f32, f16 or q8_0. name: shown by programs. The file is whole or not there.
    Raises ExchangeError if it exists, or for what a GGUF file cannot hold.
    """
    out = Path(out)
    if dtype not in FILE_TYPES:
        raise ExchangeError(f"unknown dtype {dtype!r}; there are {', '.join(LARGEST)}")
    if out.suffix != ".gguf":
        raise ExchangeError(f"{out}: a file for llama.cpp ends in .gguf; rename --out")
    if out.exists():
        raise ExchangeError(f"{out} exists; choose another --out or delete it")
    need("gguf")
    import gguf

    kind, n_vocab = architecture_of(model.config), tokenizer.n_vocab
    if n_vocab > model.config.vocab_size:
        raise ExchangeError(
            f"tokenizer {tokenizer.name!r} has {n_vocab} ids and the model only "
            f"{model.config.vocab_size}; they do not belong together"
        )
    keys = {"general.name": name, "general.file_type": FILE_TYPES[dtype]}
    if dtype == "q8_0":
        keys["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    keys |= gguf_shape(model.config, n_vocab) | gguf_tokenizer(tokenizer)
    weights = gguf_weights(model, n_vocab)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=out.name + ".", dir=out.parent) as folder:
        part = Path(folder) / out.name
        writer: Any = gguf.GGUFWriter(part, kind)
        kinds = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in keys.items():
            kinds[type(value)](key, value)
        for tensor, value in weights.items():
            stored = type_of(tensor, value, dtype)
            if value.abs().max() > LARGEST[stored]:
                raise ExchangeError(
                    f"weight {tensor!r} is too large for {stored}; take --dtype f32"
                )
            number = getattr(gguf.GGMLQuantizationType, stored.upper())
            array = gguf.quantize(value.numpy(), number)
            writer.add_tensor(tensor, array, raw_dtype=number)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    sync_folder(out.parent)
    return out
