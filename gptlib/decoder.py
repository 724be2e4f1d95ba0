"""From GPT-2 to LLaMA and BLOOM, one change at a time.

Tangled from book/chapters/24_decoder.md; change it there, not here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.attention import causal_attention
from gptlib.block import MLP, Block
from gptlib.gpt import GPTConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + hs / 2]) of (..., T, hs) by its angle.

    cos, sin: (T, hs / 2). Source: Su et al. 2021.
    """
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.to(x.dtype)


def alibi_slopes(n_head: int) -> Tensor:
    """The slope of each head, (n_head,); for 8 heads 1/2, 1/4, ..., 1/256.

    For 12 heads: those of 8, then every second one of 16. Press et al. 2022.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_head - power)]
    return torch.tensor(slopes, device="cpu")


def alibi_bias(slopes: Tensor, T: int, S: int) -> Tensor:
    """(nh, T, S): minus slope times distance; minus infinity for the future.

    The queries are those of the last T of S positions.
    """
    s = torch.arange(S, device=slopes.device)
    t = torch.arange(S - T, S, device=slopes.device)
    distance = t[:, None] - s  # (T, S)
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf"))


class SwiGLU(nn.Module):
    """A gated MLP, (B, T, C) -> (B, T, C). One matmul makes gates and values.

    Source: Shazeer 2020.
    """

    def __init__(
        self, n_embd: int, n_inner: int, *, bias: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 2 * n_inner, bias=bias)
        self.c_proj = nn.Linear(n_inner, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.c_fc(x).chunk(2, dim=-1)  # (B, T, n_inner) each
        return self.dropout(self.c_proj(F.silu(gate) * value))


def rotary_speeds(
    head_size: int, base: float, scaling: str, factor: float, original: int
) -> Tensor:
    """Radians per position of each pair, (head_size / 2,) float64.

    scaling: none; linear, all divided by `factor`; llama3, only pairs that turn less
    than once in `original` positions, with a passage up to four turns. Sources: Su et
    al. 2021; Chen et al. 2023; Grattafiori et al. 2024.
    """
    i = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu")
    speeds = base ** (-i / head_size)
    if scaling == "linear":
        return speeds / factor
    if scaling == "llama3":
        turns = original * speeds / (2 * math.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)
        return kept * speeds + (1 - kept) * speeds / factor
    return speeds


@functools.cache
def rotary_table(length: int, *options) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, head_size / 2) float32, of `rotary_speeds`."""
    places = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = places[:, None] * rotary_speeds(*options)
    return angles.cos().float(), angles.sin().float()


class DecoderAttention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), of a `DecoderConfig`.

    Rotary positions, ALiBi, norms of queries and keys, fewer heads of keys and values.
    Source of the groups: Ainslie et al. 2023.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    cos: Tensor
    sin: Tensor
    slopes: Tensor

    def __init__(self, c: "DecoderConfig"):
        super().__init__()
        hs, self.dropout, self.positions = c.head_width, c.dropout, c.positions
        self.split = [c.n_head * hs, c.kv_heads * hs, c.kv_heads * hs]
        self.head_size, self.group = hs, c.n_head // c.kv_heads
        self.c_attn = nn.Linear(c.n_embd, sum(self.split), bias=c.bias or c.qkv_bias)
        self.c_proj = nn.Linear(c.n_head * hs, c.n_embd, bias=c.bias)
        self.resid_dropout = nn.Dropout(c.dropout)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(hs, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(hs, eps=c.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        if c.positions == "rotary":  # buffers move with the model, and are not saved
            scaling = c.rope_scaling, c.rope_factor, c.rope_original
            cos, sin = rotary_table(c.block_size, hs, c.rope_base, *scaling)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if c.positions == "alibi":
            self.register_buffer("slopes", alibi_slopes(c.n_head), persistent=False)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        """cache: as in `CausalSelfAttention`; it holds unrepeated, rotated keys."""
        B, T, _ = x.shape
        parts = self.c_attn(x).split(self.split, dim=2)
        q, k, v = (
            z.view(B, T, -1, self.head_size).transpose(1, 2) for z in parts
        )  # (B, nh, T, hs), (B, nkv, T, hs) twice
        q, k = self.q_norm(q), self.k_norm(k)
        if self.positions == "rotary":
            start = 0 if cache is None else cache.length
            cos, sin = self.cos[start : start + T], self.sin[start : start + T]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nkv, S, hs) with S >= T
        if self.group > 1:  # query head h reads keys h // group
            k, v = (z.repeat_interleave(self.group, dim=1) for z in (k, v))
        dropout = self.dropout if self.training else 0.0
        if self.positions == "alibi":
            bias = alibi_bias(self.slopes, T, k.shape[2]).to(q.dtype)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout
            )
        else:
            y = causal_attention(q, k, v, dropout=dropout)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.resid_dropout(self.c_proj(y))


class DecoderBlock(Block):
    """The block of chapter 6 with the parts of a `DecoderConfig`.

    With `norm_embedding`, the first block begins with a norm, as in BLOOM.
    """

    def __init__(self, c: "DecoderConfig", layer: int):
        nn.Module.__init__(self)  # not Block's: other parts
        first = layer == 0 and c.norm_embedding
        self.ln_0 = c.norm_layer() if first else nn.Identity()
        self.add_module("ln_1", c.norm_layer())
        self.add_module("attn", DecoderAttention(c))
        self.add_module("ln_2", c.norm_layer())
        self.add_module("mlp", c.new_mlp())

    def forward(self, x: Tensor, cache=None) -> Tensor:
        return super().forward(self.ln_0(x), cache)


CHOICES = {
    "norm": ("layer", "rms"),
    "positions": ("learned", "rotary", "alibi"),
    "mlp": ("gelu", "swiglu"),
    "rope_scaling": ("none", "linear", "llama3"),
}


@dataclass(frozen=True)
class DecoderConfig(GPTConfig):
    """Shape and parts of a decoder. The defaults are GPT-2's parts."""

    norm: str = "layer"  # layer or rms
    norm_eps: float = 1e-5
    positions: str = "learned"  # learned, rotary or alibi
    rope_base: float = 10_000.0  # larger: slower angles
    rope_scaling: str = "none"  # none, linear or llama3
    rope_factor: float = 1.0
    rope_original: int = 8192  # llama3: the context before it was made longer
    mlp: str = "gelu"  # gelu or swiglu
    n_inner: int | None = None  # width in a swiglu; None: 8/3 n_embd
    n_kv_head: int | None = None  # heads of keys and values; None: n_head
    head_size: int | None = None  # None: n_embd / n_head
    qkv_bias: bool = False  # their biases even if bias is off
    qk_norm: bool = False  # an RMSNorm of each query and key
    norm_embedding: bool = False  # a norm before the first block
    tied_head: bool = True  # the head is the token table

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                there = ", ".join(known)
                raise GptlibError(f"unknown {name} {value!r}; choose {there}")
        for name in ("n_inner", "n_kv_head", "head_size", "rope_original"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise GptlibError(f"{name} is {value}; it must be at least 1")
        for name in ("norm_eps", "rope_base", "rope_factor"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise GptlibError(f"{name} is {value}; it must be above 0")
        if self.n_head % self.kv_heads:
            raise GptlibError(
                f"n_head {self.n_head} is no multiple of n_kv_head {self.kv_heads}; "
                "every head of keys serves a group of equal size"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise GptlibError(
                f"head size {self.head_width} is odd; rotary positions turn pairs, so "
                "choose an even one"
            )
        if self.n_inner is not None and self.mlp != "swiglu":
            raise GptlibError(
                f"n_inner is {self.n_inner}; only mlp swiglu has a free inner width"
            )

    @property
    def head_width(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner_width(self) -> int:
        """Width inside the MLP; for a swiglu a multiple of 8 at or above 8/3 n_embd."""
        if self.mlp == "gelu":
            return 4 * self.n_embd
        return self.n_inner or 8 * math.ceil(self.n_embd / 3)

    def block(self, layer: int) -> nn.Module:
        return DecoderBlock(self, layer)

    def norm_layer(self) -> nn.Module:
        if self.norm == "rms":
            return nn.RMSNorm(self.n_embd, eps=self.norm_eps)
        return nn.LayerNorm(self.n_embd, eps=self.norm_eps, bias=self.bias)

    def position_table(self) -> nn.Embedding | None:
        return super().position_table() if self.positions == "learned" else None

    def untied_head(self) -> nn.Linear | None:
        if self.tied_head:
            return None
        return nn.Linear(self.n_embd, self.vocab_size, bias=False)

    def new_mlp(self) -> nn.Module:
        """A new MLP, (B, T, C) -> (B, T, C)."""
        options: dict[str, Any] = {"bias": self.bias, "dropout": self.dropout}
        if self.mlp == "swiglu":
            return SwiGLU(self.n_embd, self.inner_width, **options)
        return MLP(self.n_embd, activation=self.activation, **options)


def all_fields(config: GPTConfig) -> dict:
    """Every field of `DecoderConfig`, with GPT-2's parts for a `GPTConfig`."""
    return asdict(DecoderConfig(**asdict(config)))


def model_config(values: dict) -> GPTConfig:
    """The configuration with these fields; a `GPTConfig` if all parts are GPT-2's."""
    config = DecoderConfig(**values)
    own = {f.name: f.default for f in fields(DecoderConfig)}
    shape = {f.name for f in fields(GPTConfig)}
    changed = [n for n in own.keys() - shape if getattr(config, n) != own[n]]
    if changed:
        return config
    return GPTConfig(**{name: getattr(config, name) for name in shape})


def halves_from_neighbours(weight: Tensor, n_head: int) -> Tensor:
    """Reorder rows (n_head * hs, ...) of queries or keys for the layout of `rotate`.

    From pairs of neighbours, as in LLaMA's own files, to pairs of halves.
    """
    pairs = weight.unflatten(0, (n_head, -1, 2))  # (nh, hs / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(weight.shape)


def neighbours_from_halves(weight: Tensor, n_head: int) -> Tensor:
    """The inverse of `halves_from_neighbours`."""
    halves = weight.unflatten(0, (n_head, 2, -1))  # (nh, 2, hs / 2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)
