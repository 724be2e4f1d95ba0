"""Sampling: why multinomial and not argmax.

Tangled from book/chapters/10_sampling.md; change it there, not here.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.gpt import GPT
from gptlib.tokenizer import Tokenizer


class SamplingError(GptlibError):
    """Settings that describe no distribution, or tokens that the model cannot read."""


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises SamplingError for a setting that `next_token_probs` cannot use."""
    if not 0 <= temperature < math.inf:
        raise SamplingError(
            f"temperature is {temperature}; choose 0 (greedy) or a positive number"
        )
    if top_k is not None and top_k < 1:
        raise SamplingError(f"top_k is {top_k}; choose at least 1, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise SamplingError(f"top_p is {top_p}; choose in (0, 1], or leave it out")


def next_token_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """(B, V) logits -> (B, V) float32 probabilities to draw the next token from.

    temperature: divides the logits; 0 is greedy. top_k: keep the k most probable
    tokens. top_p: keep the fewest that together have at least probability p.
    n_vocab: ids from here on are padding and get probability 0. Raises SamplingError
    for a setting out of range. Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020
    (top-p).
    """
    check_settings(temperature, top_k, top_p)
    V, logits = logits.shape[-1], logits[..., :n_vocab].float()
    if temperature == 0:
        top_k, temperature = 1, 1.0
    best = logits.amax(-1, keepdim=True)
    logits = (logits - best) / temperature  # the largest is 0, so none overflows
    if top_k is None and top_p is None:
        probs = logits.softmax(-1)
    else:
        n = logits.shape[-1]
        ordered, ids = logits.topk(min(top_k or n, n), dim=-1)  # sorted: (B, k)
        kept = ordered.softmax(-1)
        if top_p is not None:
            before = kept.cumsum(-1) - kept  # probability of the tokens that rank above
            kept = kept.masked_fill(before >= top_p, 0.0)
            kept = kept / kept.sum(-1, keepdim=True)
        probs = torch.zeros_like(logits).scatter(-1, ids, kept)
    return F.pad(probs, (0, V - probs.shape[-1]))  # what is padding is never drawn


class LayerCache:
    """Keys and values of one layer, (B, nh, S, hs), in room for `block_size`."""

    def __init__(self, block_size: int):
        self.block_size, self.length = block_size, 0
        self.k = self.v = torch.empty(0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of T new positions, both (B, nh, T, hs).

        Returns those of all S positions so far, (B, nh, S, hs).
        """
        B, nh, T, hs = k.shape
        if not self.length:
            self.k = k.new_empty(B, nh, self.block_size, hs)
            self.v = torch.empty_like(self.k)
        end = self.length + T
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """One `LayerCache` for each layer of a model."""

    def __init__(self, model: GPT):
        config = model.config
        self.layers = [LayerCache(config.block_size) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Positions held so far."""
        return self.layers[0].length


def draw(
    probs: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """(B, V) probabilities -> (B, 1) ids, each found by one uniform number.

    generator: one for all rows, or a list with one for each row. A probability of 0 is
    never drawn.
    """
    if generator is None or isinstance(generator, torch.Generator):
        sources = [(len(probs), generator)]
    else:
        sources = [(1, g) for g in generator]
    darts = [
        torch.rand(
            n, 1, generator=g, dtype=torch.float64, device=g.device if g else None
        )
        for n, g in sources
    ]
    if probs.device.type == "mps":  # it has no float64
        probs = probs.cpu()
    ends = probs.double().cumsum(-1)  # (B, V): where each token's piece ends
    places = torch.cat(darts).to(ends.device) * ends[:, -1:]  # (B, 1)
    ids = torch.searchsorted(ends, places, right=True)
    # should rounding put a dart on the very end: the last piece that has a width
    return torch.minimum(ids, torch.searchsorted(ends, ends[:, -1:].contiguous()))


def window_start(length: int, block_size: int) -> int:
    """Where the model's context begins in a text of `length` tokens.

    0 while the text fits. Then it moves in jumps of half a block, so that a cache is
    thrown away once in block_size / 2 tokens instead of for each one.
    """
    jump = max(1, block_size // 2)
    return math.ceil(max(0, length - block_size) / jump) * jump


@torch.no_grad()
def stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    use_cache: bool = True,
    **settings,
) -> Iterator[Tensor]:
    """Yield one (B,) tensor of new tokens after another; all else as in `generate`."""
    check_tokens(tokens, model.config.vocab_size)
    was_training = model.training
    model.eval()  # a model in training mode would drop parts of what it reads
    ends = torch.tensor(stop, dtype=tokens.dtype, device=tokens.device)
    stopped = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    cache, start = None, -1
    try:
        for _ in range(max_new_tokens):
            begin = window_start(tokens.shape[1], model.config.block_size)
            if begin != start or not use_cache:
                start, cache = begin, KVCache(model) if use_cache else None
                x = model.hidden(tokens[:, start:], cache)  # (B, T, C)
            else:
                x = model.hidden(tokens[:, -1:], cache)  # (B, 1, C)
            logits = model.head(x[:, -1])  # (B, V): the last position has read all
            new = draw(next_token_probs(logits, **settings), generator)  # (B, 1)
            new = torch.where(stopped, tokens[:, -1:], new.to(tokens.device))
            tokens = torch.cat([tokens, new], dim=1)
            yield new[:, 0]
            if stop:
                stopped |= torch.isin(new, ends)
                if stopped.all():
                    return
    finally:
        model.train(was_training)


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises SamplingError unless tokens are (B, T), T >= 1, in the vocabulary."""
    if tokens.ndim != 2 or not tokens.numel():
        raise SamplingError(
            f"tokens have shape {tuple(tokens.shape)}; give (B, T) with T at least 1, "
            "an end-of-text mark if nothing else"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise SamplingError(
            f"token id {low if low < 0 else high} is outside the vocabulary of "
            f"{vocab_size}; is it another tokenizer's?"
        )


def generate(model: GPT, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Continue each row of tokens (B, T) by up to `max_new_tokens` draws; (B, T + n).

    options: temperature, top_k, top_p, n_vocab as in `next_token_probs`; generator as
    in `draw`; stop: a row that drew one of these ids repeats it, and when all rows have
    stopped, generation ends; use_cache=False reads the text anew for each token. Only
    the last block of a long text is read. Raises SamplingError.
    """
    draws = stream(model, tokens, max_new_tokens, **options)
    return torch.cat([tokens, *(new[:, None] for new in draws)], dim=1)


def seeded(seed: int | None) -> torch.Generator:
    """A generator that begins at `seed`, or somewhere new each time for None."""
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 200,
    *,
    seed: int | None = None,
    **settings,
) -> Iterator[str]:
    """Yield the prompt, then its continuation piece by piece, up to its end-of-text.

    The model reads an end-of-text mark, then the prompt, as at a document's start.
    settings: temperature, top_k, top_p, use_cache, as in `generate`. Raises
    SamplingError.
    """
    ids = [tokenizer.start_of_text, *tokenizer.encode(prompt)]
    tokens = torch.tensor([ids], device=model.device)
    settings |= {"n_vocab": tokenizer.n_vocab, "generator": seeded(seed)}
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield prompt
    for new in stream(model, tokens, max_new_tokens, **settings):
        if new.item() == tokenizer.end_of_text:
            break
        # a token may end inside a character; the decoder keeps its bytes for the next
        yield utf8.decode(tokenizer.decode_bytes(new.tolist()))
    yield utf8.decode(b"", final=True)


def continue_rows(
    model: GPT,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seeds: Sequence[int | None],
    stop: Sequence[int],
    **settings,
) -> list[list[int]]:
    """The new ids of each row, the i-th drawn with `seeds[i]`.

    rows: ids, each row of at least one. Rows of equal length go through the model
    together. A row's answer ends with the first of `stop`, which is there unless
    `max_new_tokens` came first. settings: as in `generate`. Raises SamplingError.
    """
    found: list[list[int]] = [[] for _ in rows]
    settings["stop"] = stop
    for length in sorted({len(row) for row in rows}):
        group = [i for i, row in enumerate(rows) if len(row) == length]
        tokens = torch.tensor([rows[i] for i in group], device=model.device)  # (B, T)
        darts = [seeded(seeds[i]) for i in group]
        drawn = generate(model, tokens, max_new_tokens, generator=darts, **settings)
        for i, ids in zip(group, drawn[:, length:].tolist(), strict=True):
            end = next((j for j, id in enumerate(ids, 1) if id in stop), len(ids))
            found[i] = ids[:end]
    return found


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    *,
    seed: int | None = None,
    **settings,
) -> list[str]:
    """Each prompt with its continuation, the i-th drawn with `seed + i`.

    Prompts of equal length go through the model together, a row each. Arguments and
    errors as in `stream_text`.
    """
    start, end = tokenizer.start_of_text, tokenizer.end_of_text
    rows = [[start, *tokenizer.encode(prompt)] for prompt in prompts]
    settings |= {"n_vocab": tokenizer.n_vocab, "stop": [end]}
    settings["seeds"] = [None if seed is None else seed + i for i in range(len(rows))]
    found = continue_rows(model, rows, max_new_tokens, **settings)
    texts = (tokenizer.decode([i for i in ids if i != end]) for ids in found)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def sample_text(model: GPT, tokenizer: Tokenizer, *args, **options) -> str:
    """The prompt and its continuation as one string; arguments as in `stream_text`."""
    return "".join(stream_text(model, tokenizer, *args, **options))
