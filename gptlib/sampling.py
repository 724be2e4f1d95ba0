"""Sampling: why multinomial and not argmax.

Tangled from book/chapters/10_sampling.md; change it there, not here.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from gptlib.gpt import GPT
from gptlib.training import LoadedRun, errors_in_one_line, load_run


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError, naming the value, for settings that describe no distribution."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature}; it must be above 0 and finite (top_k=1 is greedy)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"top_k is {top_k}; it must be at least 1 (1 is greedy), or None for all tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p is {top_p}; it must be in (0, 1], or None for all tokens"
        )


def next_token_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """(B, V) logits -> (B, V) float32 probabilities to draw the next token from; (B, n_vocab) if that is less.

    n_vocab: ids from here on are padding; they are cut off. top_k keeps the k most probable tokens,
    top_p the fewest that together have at least probability p. Sources: Fan et al. 2018 (top-k),
    Holtzman et al. 2020 (top-p). Raises ValueError for settings that describe no distribution.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.float()
    if n_vocab is not None and n_vocab < logits.shape[-1]:
        logits = logits[:, :n_vocab]
    logits = (
        logits - logits.amax(-1, keepdim=True)
    ) / temperature  # the largest is 0, so none overflows
    if top_k is None and top_p is None:
        return logits.softmax(-1)
    size = logits.shape[-1]
    best, ids = logits.topk(
        min(top_k or size, size), dim=-1
    )  # sorted, so top_k=1 keeps one even in a tie
    kept = best.softmax(-1)
    if top_p is not None:
        before = kept.cumsum(-1) - kept  # probability of the tokens that rank above
        kept = kept.masked_fill(before >= top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, ids, kept)


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) probabilities -> (B, 1) ids, each found by one uniform number; a zero is never drawn."""
    if probs.device.type == "mps":
        return torch.multinomial(probs, 1, generator=generator)
    ends = probs.double().cumsum(-1)  # (B, V): where each token's piece ends
    darts = torch.rand(
        len(probs), 1, generator=generator, dtype=torch.float64, device=probs.device
    )
    ids = torch.searchsorted(ends, darts * ends[:, -1:], right=True)
    last = torch.searchsorted(
        ends, ends[:, -1:].contiguous()
    )  # should rounding ever put the dart on the very end
    return torch.minimum(ids, last)


class LayerCache:
    """Keys and values of one layer, (B, nh, S, hs), in room for `block_size` positions."""

    def __init__(self, block_size: int):
        self.block_size, self.length = block_size, 0
        self.k = self.v = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of T new positions; returns those of all S so far."""
        B, nh, T, hs = k.shape
        if self.k is None:
            self.k, self.v = (k.new_empty(B, nh, self.block_size, hs) for _ in range(2))
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


def window_start(length: int, block_size: int) -> int:
    """Where the model's context begins in a text of `length` tokens.

    0 while the text fits. Then it moves in jumps of half a block, so that a cache is thrown away
    once in block_size / 2 tokens instead of for each one.
    """
    jump = max(1, block_size // 2)
    return -(-max(0, length - block_size) // jump) * jump


@torch.no_grad()
def stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_vocab: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield one (B,) int64 tensor of new tokens after another; arguments as in `generate`."""
    check_sampling(temperature, top_k, top_p)
    check_tokens(tokens, model.config.vocab_size)
    block_size, cache, start = model.config.block_size, None, -1
    for _ in range(max_new_tokens):
        moved = window_start(tokens.shape[1], block_size) != start
        if moved or not use_cache:
            start = window_start(tokens.shape[1], block_size)
            cache = KVCache(model) if use_cache else None
            x = model.hidden(tokens[:, start:], cache)  # (B, T, C)
        else:
            x = model.hidden(tokens[:, -1:], cache)  # (B, 1, C)
        logits = model.head(
            x[:, -1]
        )  # (B, V): the last position has read all the others
        probs = next_token_probs(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, n_vocab=n_vocab
        )
        new = draw(probs, generator)  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)
        yield new[:, 0]


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless tokens are (B, T), at least one to a row, and all in the vocabulary."""
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; give (B, T) with T at least 1, an end-of-text mark if nothing else"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}; is it another tokenizer's?"
        )


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_vocab: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of tokens (B, T) by `max_new_tokens` draws; returns (B, T + max_new_tokens).

    top_k=1 is greedy. n_vocab: size of the tokenizer's vocabulary, so that padded ids are never drawn.
    generator: a seeded `torch.Generator` on the model's device. Only the last block of a long text is
    read. Raises ValueError for a temperature <= 0, top_k < 1, top_p outside (0, 1] and ids outside the
    vocabulary.
    """
    draws = stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        n_vocab=n_vocab, generator=generator, use_cache=use_cache,
    )  # fmt: skip
    return torch.cat([tokens, *(new[:, None] for new in draws)], dim=1)


@dataclass(frozen=True)
class SamplingOptions:
    """Continue a prompt with a trained model."""

    run: Path  # the --out folder of a training run
    prompt: str = ""  # empty: begin a new document
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: different every time
    samples: int = 1
    device: str = "auto"


def main() -> None:
    """`python -m gptlib.sampling --run RUN --prompt TEXT`."""
    options = tyro.cli(SamplingOptions)
    with errors_in_one_line():
        check_sampling(options.temperature, options.top_k, options.top_p)
        run = load_run(options.run, device=options.device)
        generator = torch.Generator(run.model.device)
        generator.seed() if options.seed is None else generator.manual_seed(
            options.seed
        )
        for _ in range(options.samples):
            print_sample(run, options, generator)


def print_sample(
    run: LoadedRun, options: SamplingOptions, generator: torch.Generator
) -> None:
    """Write a continuation to standard output as it is drawn; ends at the end-of-text mark."""
    ids = [run.tokenizer.end_of_text, *run.tokenizer.encode(options.prompt)]
    tokens = torch.tensor([ids], device=run.model.device)
    utf8 = codecs.getincrementaldecoder("utf-8")(
        errors="replace"
    )  # a token may end inside a character
    sys.stdout.write(options.prompt)
    draws = stream(
        run.model, tokens, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, n_vocab=run.tokenizer.n_vocab, generator=generator,
    )  # fmt: skip
    for new in draws:
        if new.item() == run.tokenizer.end_of_text:
            break
        sys.stdout.write(utf8.decode(run.tokenizer.decode_bytes([new.item()])))
        sys.stdout.flush()
    sys.stdout.write(utf8.decode(b"", final=True) + "\n")


if __name__ == "__main__":
    main()
