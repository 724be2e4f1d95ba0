"""BERT: the mask taken away.

Tangled from book/chapters/25_bert.md; change it there, not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.batches import Batches, crop_offsets
from gptlib.block import Block
from gptlib.gpt import GPT, GPTConfig
from gptlib.multi_head import CausalSelfAttention
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.tinywiki import KINDS, TinyWiki


class BertError(GptlibError):
    """Something that a model without a mask cannot be made of, or cannot do."""


class FullAttention(CausalSelfAttention):
    """Self-attention without the mask, (B, T, C) -> (B, T, C): all read all.

    Source: Devlin et al. 2018, section 3.
    """

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep: (B, T) bool, False at padding, which nobody reads."""
        if keep is not None and not isinstance(keep, Tensor):
            raise BertError(
                "a model that reads both sides has no cache, since each new token "
                "changes all positions; call it without one"
            )
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        shape = (B, T, self.n_head, C // self.n_head)
        q, k, v = (z.view(shape).transpose(1, 2) for z in (q, k, v))  # (B, nh, T, hs)
        mask = None if keep is None else keep[:, None, None]  # (B, 1, 1, T), of keys
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class EncoderBlock(Block):
    """The block of chapter 6 with `FullAttention`, (B, T, C) -> (B, T, C)."""

    def __init__(self, c: GPTConfig):
        same: dict[str, Any] = {"bias": c.bias, "dropout": c.dropout}
        super().__init__(c.n_embd, c.n_head, activation=c.activation, **same)
        self.attn = FullAttention(c.n_embd, c.n_head, **same)
        self.add_module("ln_1", c.norm_layer())
        self.add_module("ln_2", c.norm_layer())


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(GPTConfig):
    """Shape of a GPT whose positions read both sides, and the id that hides a token."""

    mask_token: int

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mask_token < self.vocab_size:
            raise BertError(
                f"mask_token is {self.mask_token}; it must be an id below "
                f"{self.vocab_size}"
            )

    def block(self, layer: int) -> nn.Module:
        return EncoderBlock(self)


def mask_token(tokenizer: Tokenizer) -> int:
    """The id that hides a token: that of a byte that no text contains.

    Raises BertError if the tokenizer has no such token.
    """
    found = tokenizer.ranks.get(b"\xfb")
    if found is None:
        raise BertError(
            f"tokenizer {tokenizer.name!r} has no token for the byte 0xFB, which hides "
            "a token; use one that has all 256 bytes, as bpe-N and gpt2 do"
        )
    return found


def _uniform(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Float64 numbers in [0, 1) of this shape: a function of seed and step."""
    key = np.array([seed, step], np.uint64)
    bits = np.random.Philox(key=key, counter=2**128).random_raw(math.prod(shape))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53).view(shape)


def hide(
    tokens: Tensor,
    mask_token: int,
    n_vocab: int,
    *,
    seed: int,
    step: int,
    share: float = 0.15,
    parts: tuple[float, float] = (0.8, 0.1),
) -> tuple[Tensor, Tensor]:
    """What the model reads, and which tokens it must predict, both (B, T).

    Each token is chosen with probability `share`. A chosen one is hidden with
    probability parts[0], and with parts[1] it becomes any token. A function of seed and
    step. Source: Devlin et al. 2018, section 3.1.
    """
    if not 0 < share <= 1 or min(parts) < 0 or sum(parts) > 1:
        raise BertError(
            f"share is {share} and parts are {parts}; a share is above 0 and at most "
            "1, and two parts sum to 1 at most"
        )
    one, two, three = _uniform(seed, step, (3, *tokens.shape))
    chosen = one < share
    any_token = (three * n_vocab).long()
    read = torch.where(chosen & (two < parts[0]), mask_token, tokens)
    changed = chosen & (two >= parts[0]) & (two < sum(parts))
    return torch.where(changed, any_token, read), chosen


@dataclass(frozen=True)
class MaskedBatches:
    """Batches to fill in: tokens read, the true ones, and weights, all (B, T).

    Windows are those of `batches`. Only chosen tokens have a weight; the loss of a step
    is the mean over them, however the step is divided into micro-batches.
    """

    batches: Batches
    mask_token: int
    n_vocab: int
    share: float = 0.15
    parts: tuple[float, float] = (0.8, 0.1)

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size

    def offsets(self, step: int) -> np.ndarray:
        return self.batches.offsets(step)

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The step's windows in groups, as `Batches` gives them."""
        ((tokens, _),) = self.batches.micro_batches(step, self.batch_size)  # (B, T)
        read, chosen = hide(
            tokens,
            self.mask_token,
            self.n_vocab,
            seed=self.batches.seed,
            step=step,
            share=self.share,
            parts=self.parts,
        )
        weights = chosen * (self.batch_size / chosen.sum().clamp(min=1))
        first, stride = rank * micro_batch_size, world_size * micro_batch_size
        for start in range(first, self.batch_size, stride):
            group = slice(start, start + micro_batch_size)
            size = len(tokens[group])
            yield read[group], tokens[group], weights[group] / size


@torch.no_grad()
def hidden_log_probs(
    model: GPT, rows: Sequence[tuple[list[int], int, int]], batch_size: int = 64
) -> Tensor:
    """Log-probability in nats of one token at one place of each text, (n,).

    rows: (ids, place, token), the ids as the model reads them.
    """
    asked: dict = {}  # what is asked for several tokens is computed once
    for i, (ids, place, token) in enumerate(rows):
        asked.setdefault((tuple(ids), place), []).append((i, token))
    texts, found = sorted(asked, key=lambda text: len(text[0])), torch.zeros(len(rows))
    while texts:
        length = len(texts[0][0])
        group = [text for text in texts[:batch_size] if len(text[0]) == length]
        texts = texts[len(group) :]
        rows_of, places = zip(*group)
        hidden = model.hidden(torch.tensor(rows_of, device=model.device))  # (B, T, C)
        picked = hidden[torch.arange(len(group)), torch.tensor(places)]  # (B, C)
        log_probs = model.head(picked).float().log_softmax(-1).cpu()
        for text, row in zip(group, log_probs):
            for i, token in asked[text]:
                found[i] = row[token]
    return found


def mask_of(model: GPT) -> int:
    """The id that hides a token. Raises BertError if the model is no encoder."""
    if not isinstance(model.config, EncoderConfig):
        raise BertError("this model has a causal mask; an encoder fills in blanks")
    return model.config.mask_token


Blank = tuple[Sequence[int], Sequence[int], Sequence[int]]  # left, filling, right


def blank_log_probs(model: GPT, blanks: Sequence[Blank]) -> Tensor:
    """Log-probability of each filling between its left and right, (n,) nats.

    A filling's tokens are predicted from left to right, the later ones hidden, so that
    a long word does not help itself. Its number of tokens is given. What is longer than
    the block loses its end. Raises BertError if a filling does not fit.
    """
    mask, size = mask_of(model), model.config.block_size
    rows, owner = [], []
    for number, (left, filling, right) in enumerate(blanks):
        if (end := len(left) + len(filling)) > size:
            raise BertError(f"a blank ends at {end}, the block at {size}; cut its left")
        for i, token in enumerate(filling):
            later = [mask] * (len(filling) - i)
            ids = [*left, *filling[:i], *later, *right][:size]
            rows.append((ids, len(left) + i, token))
            owner.append(number)
    found = torch.zeros(len(blanks))
    return found.index_add(0, torch.tensor(owner), hidden_log_probs(model, rows))


def pseudo_log_probs(model: GPT, ids: Sequence[int]) -> Tensor:
    """Log-probability of each token given all the others, (T,) nats.

    Source: Salazar et al. 2020.
    """
    mask = mask_of(model)
    rows = [([*ids[:i], mask, *ids[i + 1 :]], i, ids[i]) for i in range(len(ids))]
    return hidden_log_probs(model, rows)


class Classifier(nn.Module):
    """A model that reads, and a linear layer on one of its positions.

    place: 0, the first, for a model that reads both sides; -1, the last, for a GPT.
    Sources: Devlin et al. 2018, section 4; Radford et al. 2018, section 3.2.
    """

    def __init__(self, model: GPT, n_classes: int, place: int):
        super().__init__()
        self.model, self.place = model, place
        self.out = nn.Linear(model.config.n_embd, n_classes)
        for p in self.out.parameters():  # at first all classes are equally likely
            nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, n_classes) logits."""
        return self.out(self.model.hidden(tokens)[:, self.place])

    @property
    def device(self) -> torch.device:
        return self.model.device


def class_loss(model: Classifier, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the labels (B,)."""
    return F.cross_entropy(model(tokens).float(), labels)


@dataclass(frozen=True)
class LabelledBatches:
    """Texts (N, T) and labels (N,) in batches that depend on (seed, step) alone."""

    tokens: Tensor
    labels: Tensor
    batch_size: int
    seed: int

    def offsets(self, step: int) -> np.ndarray:
        return crop_offsets(self.seed, step, self.batch_size, len(self.tokens))

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        picks = torch.from_numpy(self.offsets(step))
        first, stride = rank * micro_batch_size, world_size * micro_batch_size
        for start in range(first, self.batch_size, stride):
            group = picks[start : start + micro_batch_size]
            yield self.tokens[group], self.labels[group]


KIND_WORDS = {*KINDS, *(f"{kind}s" for kind in KINDS), "singer"}


def kind_examples(
    tokenizer: Tokenizer, split: str, n: int, *, length: int = 16, show: bool = True
) -> tuple[Tensor, Tensor]:
    """The first tokens of n articles, (n, length), and their kinds, (n,) of KINDS.

    The title is left out. Its words and the kinds' names are hidden by `mask_token`;
    without `show` they are left out too.
    """
    rows, labels = [], []
    for number in range(n):
        article = TinyWiki(0).article(split, number)
        names = KIND_WORDS | {word.lower() for word in article.title.split()}
        ids = [tokenizer.end_of_text]
        for word in article.text.split(" = \n \n ", 1)[1].split(" "):
            if word.lower() not in names:
                ids += tokenizer.encode(" " + word)
            elif show:
                ids.append(mask_token(tokenizer))
            if len(ids) >= length:
                break
        rows.append(ids[:length])
        labels.append(KINDS.index(article.subject.kind))
    return torch.tensor(rows), torch.tensor(labels)
