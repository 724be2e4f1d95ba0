"""Families: LLaMA, Mistral, Qwen and BLOOM as ours.

Tangled from book/workshop/W20_families.md; change it there, not here.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlib.decoder import DecoderConfig, all_fields
from gptlib.gpt import GPT, GPTConfig
from gptlib.workshop.tokenizer_json import ExchangeError


LAYER = "model.layers.{}."
ROTARY_NAMES = {
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "h.{}.ln_1": [LAYER + "input_layernorm"],
    "h.{}.ln_2": [LAYER + "post_attention_layernorm"],
    "h.{}.attn.c_attn": [LAYER + f"self_attn.{part}_proj" for part in "qkv"],
    "h.{}.attn.c_proj": [LAYER + "self_attn.o_proj"],
    "h.{}.attn.q_norm": [LAYER + "self_attn.q_norm"],
    "h.{}.attn.k_norm": [LAYER + "self_attn.k_norm"],
    "h.{}.mlp.c_fc": [LAYER + f"mlp.{part}_proj" for part in ("gate", "up")],
    "h.{}.mlp.c_proj": [LAYER + "mlp.down_proj"],
}

TOP = "transformer."
BLOOM_NAMES = {
    "wte": [TOP + "word_embeddings"],
    "h.{}.ln_0": [TOP + "word_embeddings_layernorm"],
    "ln_f": [TOP + "ln_f"],
    "h.{}.ln_1": [TOP + "h.{}.input_layernorm"],
    "h.{}.ln_2": [TOP + "h.{}.post_attention_layernorm"],
    "h.{}.attn.c_attn": [TOP + "h.{}.self_attention.query_key_value"],
    "h.{}.attn.c_proj": [TOP + "h.{}.self_attention.dense"],
    "h.{}.mlp.c_fc": [TOP + "h.{}.mlp.dense_h_to_4h"],
    "h.{}.mlp.c_proj": [TOP + "h.{}.mlp.dense_4h_to_h"],
}


def their_names(ours: str, names: dict[str, list[str]]) -> list[str]:
    """`h.3.attn.c_attn.weight` -> the names of the tensors that stand in it."""
    layer = re.match(r"h\.(\d+)\.", ours)
    number = layer[1] if layer else ""
    stem, _, suffix = ours.rpartition(".")
    key = re.sub(r"^h\.\d+\.", "h.{}.", stem)
    return [f"{theirs.format(number)}.{suffix}" for theirs in names[key]]


def split_rows(
    value: Tensor, names: list[str], config: DecoderConfig
) -> dict[str, Tensor]:
    """One of our tensors as theirs: whole, as gate and value, or as q, k and v."""
    heads = (config.n_head, config.kv_heads, config.kv_heads)
    sizes = {
        1: [len(value)],
        2: [config.inner_width] * 2,
        3: [n * config.head_width for n in heads],
    }[len(names)]
    return dict(zip(names, value.split(sizes), strict=True))


def by_part(value: Tensor, n_head: int) -> Tensor:
    """BLOOM's rows, head by head, as ours: all queries, all keys, all values."""
    return value.unflatten(0, (n_head, 3, -1)).transpose(0, 1).reshape(value.shape)


def by_head(value: Tensor, n_head: int) -> Tensor:
    """The inverse of `by_part`."""
    return value.unflatten(0, (3, n_head, -1)).transpose(0, 1).reshape(value.shape)


def need(package: str) -> None:
    """Raises ExchangeError, with the cure, where a package is not installed."""
    if not importlib.util.find_spec(package):
        raise ExchangeError(f"{package} is missing; pip install 'gptlib[hf]'")


@dataclass(frozen=True)
class Family:
    """A class of `transformers`: its name, its weights' names and its parts."""

    stem: str  # LlamaConfig, LlamaForCausalLM
    names: dict[str, list[str]]
    parts: dict[str, Any]  # of our configuration

    def load(self, kind: str) -> Any:
        """`Config` or `ForCausalLM`."""
        return getattr(importlib.import_module("transformers"), self.stem + kind)


MODERN = {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False}
BLOOM = {
    "norm": "layer",
    "positions": "alibi",
    "mlp": "gelu",
    "activation": "gelu_tanh",
    "norm_embedding": True,
    "bias": True,
}
FAMILIES = {
    "llama": Family("Llama", ROTARY_NAMES, MODERN),
    "mistral": Family("Mistral", ROTARY_NAMES, MODERN),
    "qwen2": Family("Qwen2", ROTARY_NAMES, MODERN | {"qkv_bias": True}),
    "qwen3": Family("Qwen3", ROTARY_NAMES, MODERN | {"qk_norm": True}),
    "bloom": Family("Bloom", BLOOM_NAMES, BLOOM),
}


def family_of(config: GPTConfig) -> str:
    """The class that can hold a model of ours. Raises ExchangeError if none can."""
    fixed = (
        "norm",
        "positions",
        "mlp",
        "bias",
        "norm_embedding",
        "qk_norm",
        "qkv_bias",
    )
    plain, ours = DecoderConfig(), all_fields(config)
    for name, family in FAMILIES.items():
        wanted = {key: getattr(plain, key) for key in fixed} | family.parts
        if all(ours[key] == value for key, value in wanted.items()):
            own_heads = ours["n_kv_head"] or ours["head_size"] or not ours["tied_head"]
            if name != "bloom" or not own_heads:
                return name
    raise ExchangeError(
        "no class of transformers has these parts: "
        + ", ".join(f"{key} {ours[key]}" for key in fixed)
    )


def rope_of(theirs: dict) -> dict[str, Any]:
    """Our settings for the angles. Raises ExchangeError for a way that is not here."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    base = rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ExchangeError(
            f"rope_type is {kind!r}; the models of this book have 'default', 'linear' "
            "or 'llama3'"
        )
    found: dict[str, Any] = {"rope_base": float(base)}
    if kind == "default":
        return found
    found |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        ends = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        if ends != (1.0, 4.0):
            raise ExchangeError(
                f"low_freq_factor and high_freq_factor are {ends}, not (1.0, 4.0)"
            )
        found["rope_original"] = rope["original_max_position_embeddings"]
    return found


def refuse(theirs: dict, allowed: dict[str, tuple]) -> None:
    """Raises ExchangeError for a feature whose value is none of those allowed."""
    for key, values in allowed.items():
        if (value := theirs.get(key, values[0])) not in values:
            raise ExchangeError(
                f"{key} is {value!r}; the models of this book have "
                + " or ".join(map(repr, values))
            )


def our_decoder_config(theirs: dict) -> DecoderConfig:
    """Our configuration for the `config.json` of one of FAMILIES.

    Raises ExchangeError, naming the feature, for what is not here.
    """
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(("gpt2", *FAMILIES))
        raise ExchangeError(f"model_type is {kind!r}; there are {known}")
    parts = FAMILIES[kind].parts
    if kind == "bloom":
        allowed = {"apply_residual_connection_post_layernorm": (False,)}
        refuse(theirs, allowed | {"tie_word_embeddings": (True,)})
        return DecoderConfig(
            **parts,
            n_layer=theirs.get("n_layer") or theirs["num_hidden_layers"],
            n_head=theirs.get("n_head") or theirs["num_attention_heads"],
            n_embd=theirs.get("hidden_size") or theirs["n_embed"],
            block_size=theirs.get("seq_length", 2048),
            vocab_size=theirs["vocab_size"],
            norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        )
    length, windows = theirs["max_position_embeddings"], theirs.get("layer_types") or ()
    window = theirs.get("sliding_window")
    if theirs.get("use_sliding_window", kind == "mistral") and window:
        length = min(length, window)  # no text is longer than the window
    refuse(
        theirs,
        {
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
        },
    )
    if kind != "mistral" and set(windows) - {"full_attention"}:
        length = min(length, window or length)
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    return DecoderConfig(
        **parts,
        n_layer=theirs["num_hidden_layers"],
        n_head=heads,
        n_embd=width,
        block_size=length,
        vocab_size=theirs["vocab_size"],
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        n_inner=theirs["intermediate_size"],
        n_kv_head=theirs.get("num_key_value_heads") or heads,
        head_size=theirs.get("head_dim") or width // heads,
        tied_head=theirs.get("tie_word_embeddings", False),
        **rope_of(theirs),
    )


def their_decoder_config(config: DecoderConfig, n_vocab: int, end_of_text: int) -> Any:
    """The configuration object of `transformers`; end_of_text: the mark's id."""
    name = family_of(config)
    family = FAMILIES[name]
    common = {
        "vocab_size": n_vocab,
        "hidden_size": config.n_embd,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "attention_dropout": config.dropout,
    }
    if name == "bloom":
        shape: dict[str, Any] = {"n_layer": config.n_layer, "n_head": config.n_head}
        shape |= {
            "layer_norm_epsilon": config.norm_eps,
            "seq_length": config.block_size,
        }
        return family.load("Config")(**common, **shape, hidden_dropout=config.dropout)
    rope = {"rope_type": config.rope_scaling, "rope_theta": config.rope_base}
    if config.rope_scaling == "none":
        rope["rope_type"] = "default"
    else:
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = config.rope_original
    return family.load("Config")(
        **common,
        intermediate_size=config.inner_width,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
    )


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raises ExchangeError for a weight that holds a NaN or an infinity."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ExchangeError(
                f"weight {name!r} holds values that are not finite; take another "
                "checkpoint"
            )


def from_family(weights: dict[str, Tensor], config: DecoderConfig, kind: str) -> GPT:
    """A model of ours from a state of `transformers`.

    Raises ExchangeError for a weight that is missing, unknown, of a wrong shape or not
    finite; the message names it.
    """
    check_finite(weights)
    with torch.device("meta"):
        model = GPT(config)
    left, names, found = dict(weights), FAMILIES[kind].names, {}
    if config.tied_head:
        left.pop("lm_head.weight", None)
    for ours, wanted in model.state_dict().items():
        parts = []
        for name in their_names(ours, names):
            if name not in left:
                raise ExchangeError(f"weight {name!r} is missing")
            parts.append(left.pop(name).float())
        value = torch.cat(parts)
        if value.shape != wanted.shape:
            raise ExchangeError(
                f"weight {name!r} makes {ours} of shape {tuple(value.shape)}, not "
                f"{tuple(wanted.shape)}"
            )
        if kind == "bloom" and ".c_attn." in ours:
            value = by_part(value, config.n_head)
        found[ours] = value.contiguous()
    if left:
        raise ExchangeError(f"unknown weight {min(left)!r}; this is no plain {kind}")
    model.load_state_dict(found, assign=True)
    return model.eval()


def to_family(model: GPT, n_vocab: int, end_of_text: int) -> Any:
    """The same model as an object of `transformers`, padding cut off.

    Raises ExchangeError if no class there has its parts.
    """
    config = model.config
    kind = family_of(config)
    assert isinstance(config, DecoderConfig)
    weights: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        value = value.detach().cpu()
        if ours in ("wte.weight", "lm_head.weight"):
            value = value[:n_vocab]
        if kind == "bloom" and ".c_attn." in ours:
            value = by_head(value, config.n_head)
        names = their_names(ours, FAMILIES[kind].names)
        for name, part in split_rows(value, names, config).items():
            weights[name] = part.clone()
    if config.tied_head:
        weights["lm_head.weight"] = next(iter(weights.values()))  # wte comes first
    theirs = FAMILIES[kind].load("ForCausalLM")(
        their_decoder_config(config, n_vocab, end_of_text)
    )
    theirs.load_state_dict(weights)
    return theirs.eval()
