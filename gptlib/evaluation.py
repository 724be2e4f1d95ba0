"""Evaluation: what is 3.674?.

Tangled from book/chapters/12_evaluation.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gptlib import GptlibError
from gptlib.corpus import load_corpus
from gptlib.gpt import GPT
from gptlib.objective import bits_per_byte, perplexity
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.files import write_whole
from gptlib.workshop.runs import load_run
from gptlib.workshop.tinywiki import TinyWiki
from gptlib.workshop.token_files import TokenSplit, load_tokens
from gptlib.workshop.watching import errors_in_one_line


class EvaluationError(GptlibError):
    """A protocol that a model cannot follow, or a text that cannot be scored."""


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of windows that score targets 1 .. n_tokens - 1 once.

    A window reads tokens start .. stop - 1 and predicts start + 1 .. stop; it scores
    those from `first scored` on. With stride = context the windows do not overlap; with
    a smaller stride every target has at least context - stride tokens before it, but
    for the first window's.
    """
    if not 1 <= stride <= context:
        raise EvaluationError(
            f"stride is {stride}; choose between 1 and the context of {context}"
        )
    scored = 1  # the first token has nothing before it
    start = 0
    while scored < n_tokens:
        stop = min(start + context, n_tokens - 1)
        yield start, stop, scored
        scored, start = stop + 1, start + stride


def window_rows(
    ids: np.ndarray, spans: Sequence[tuple[int, int, int]], context: int
) -> Tensor:
    """Tokens of each window and the one after, (B, context + 1) int64, then zeros."""
    rows = np.zeros((len(spans), context + 1), np.int64)
    for row, (start, stop, _) in zip(rows, spans, strict=True):
        row[: stop - start + 1] = ids[start : stop + 1]
    return torch.from_numpy(rows)


def protocol(model: GPT, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride, defaults filled in. Raises EvaluationError for a bad one."""
    longest = model.config.block_size
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise EvaluationError(
            f"context is {context}; choose between 1 and the block_size of {longest}"
        )
    stride = context if stride is None else stride
    list(windows(0, context, stride))  # complains of a stride out of range
    return context, stride


@torch.no_grad()
def token_losses(
    model: GPT,
    ids: np.ndarray,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> np.ndarray:
    """Loss in nats of every token of a stream but the first: (n_tokens - 1,) float64.

    context: tokens that a window reads (default: the model's block_size). stride: how
    far it moves (default: context). The result does not depend on batch_size beyond
    rounding. Raises EvaluationError for an empty stream and sizes out of range.
    """
    context, stride = protocol(model, context, stride)
    if len(ids) < 1 or batch_size < 1:
        raise EvaluationError(
            f"{len(ids)} tokens in batches of {batch_size}; both must be at least 1"
        )
    spans = list(windows(len(ids), context, stride))
    losses = np.full(len(ids) - 1, np.nan)  # NaN: what is not scored below will show
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(losses), unit="token", unit_scale=True, disable=not progress)
    for first in range(0, len(spans), batch_size):
        group = spans[first : first + batch_size]
        tokens = window_rows(ids, group, context).to(model.device)  # (B, T + 1)
        hidden = model.hidden(tokens[:, :-1])  # (B, T, C)
        for i, (start, stop, scored) in enumerate(group):
            part = slice(scored - 1 - start, stop - start)
            logits = model.head(hidden[i, part]).float()
            found = F.cross_entropy(logits, tokens[i, 1:][part], reduction="none")
            losses[scored - 1 : stop] = found.double().cpu().numpy()
            bar.update(stop + 1 - scored)
    bar.close()
    model.train(was_training)
    return losses


@dataclass(frozen=True)
class Evaluation:
    """Losses of a split by document, and every unit that follows from them.

    Every token of the text is scored once, the first of a document after its
    end-of-text mark. The marks themselves are not text and are not scored. Windows run
    across documents, unless `separate`.
    """

    corpus: str
    split: str
    context: int
    stride: int
    step: int  # of the run that was evaluated
    nats: tuple[float, ...]  # of each document
    tokens: tuple[int, ...]  # scored in each document
    text_bytes: int
    words: int  # separated by white space, and one line end per line
    floor: float | None = None  # TinyWiki's entropy in nats per token, if it is that
    blocks: tuple[float, ...] = ()  # mean loss of each stretch of `context` tokens
    separate: bool = False  # each document was read without the one before it

    @property
    def nats_per_token(self) -> float:
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        return perplexity(math.fsum(self.nats) / self.words)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats_per_token, sum(self.tokens), self.text_bytes)

    def interval(
        self, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of nats per token over documents.

        Source: Efron and Tibshirani 1993, chapter 13.
        """
        kept = np.array(self.tokens) > 0  # an empty document says nothing
        nats, tokens = np.array(self.nats)[kept], np.array(self.tokens)[kept]
        rng = np.random.default_rng(seed)
        picks = (rng.integers(len(nats), size=len(nats)) for _ in range(draws))
        means = np.array([nats[pick].sum() / tokens[pick].sum() for pick in picks])
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def __str__(self) -> str:
        n, documents = sum(self.tokens), len(self.tokens)
        between = "one document, no interval"
        if documents > 1:
            low, high = self.interval()
            between = f"95% over documents: {low:.4f} to {high:.4f}"
        where = "each document apart" if self.separate else "across documents"
        lines = [
            f"{Path(self.corpus).name}, {self.split}: {n:,} tokens of {documents:,} "
            f"documents, step {self.step}",
            f"context {self.context}, stride {self.stride}, {where}",
            f"nats per token     {self.nats_per_token:.4f}   ({between})",
            f"token perplexity   {self.perplexity:.2f}",
            f"word perplexity    {self.word_perplexity:.2f}   "
            f"({self.words:,} words and line ends)",
            f"bits per byte      {self.bits_per_byte:.4f}   "
            f"({self.text_bytes:,} bytes)",
        ]
        if self.floor is not None:
            lines.append(f"entropy floor      {self.floor:.4f}   nats per token")
        return "\n".join(lines)


def evaluate(
    model: GPT,
    split: TokenSplit,
    tokenizer: Tokenizer,
    *,
    corpus: str,
    name: str = "validation",
    step: int = 0,
    context: int | None = None,
    stride: int | None = None,
    separate: bool = False,
    batch_size: int = 8,
    max_documents: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on a split of a token file.

    separate: read each document without the ones before it. max_documents: only the
    first so many. Raises EvaluationError for an empty split, a protocol that does not
    fit, and losses that are not finite.
    """
    context, stride = protocol(model, context, stride)
    ids = np.asarray(split.ids)
    marks = np.flatnonzero(ids == split.end_of_text)
    lines = split.record.get("lines")
    if max_documents is not None and max_documents < len(marks) - 1:
        marks, lines = marks[: max(0, max_documents) + 1], None
        ids = ids[: marks[-1] + 1]
    if len(ids) - len(marks) < 1:
        raise EvaluationError(
            f"{corpus}, split {name}: no text in it; choose another split, or more "
            "documents"
        )
    spans = list(zip(marks[:-1], marks[1:] + 1, strict=True))  # both marks included
    options = {"context": context, "stride": stride, "batch_size": batch_size}
    parts = [ids[a:b] for a, b in spans] if separate else [ids]
    losses = np.concatenate(
        [token_losses(model, part, progress=progress, **options) for part in parts]
    )  # losses[i] belongs to token i + 1
    if not np.isfinite(losses).all():
        raise EvaluationError(
            f"{corpus}, split {name}: the loss is not finite; the weights of step "
            f"{step} are damaged or diverged: evaluate another checkpoint (--which)"
        )
    own = [losses[a : b - 2] for a, b in spans]  # without the mark at the end
    texts = [tokenizer.decode_bytes(ids[a + 1 : b - 1].tolist()) for a, b in spans]
    if lines is None:
        lines = sum(text.count(b"\n") for text in texts)
    tokens = tuple(map(len, own))
    floor = None
    if corpus == "tinywiki":
        floor = tinywiki_floor(name, len(tokens)) / sum(tokens)
    whole = losses[: len(losses) // context * context].reshape(-1, context)
    return Evaluation(
        corpus=corpus,
        split=name,
        context=context,
        stride=stride,
        step=step,
        nats=tuple(math.fsum(part) for part in own),
        tokens=tokens,
        text_bytes=sum(map(len, texts)),
        words=sum(len(text.split()) for text in texts) + lines,
        floor=floor,
        blocks=tuple(whole.mean(1).tolist()),
        separate=separate,
    )


def tinywiki_floor(split: str, documents: int) -> float:
    """Nats that a split's first articles cost a reader who knows all there is."""
    articles = zip(TinyWiki().articles(split), range(documents), strict=False)
    return math.fsum(article.nats_floor for article, _ in articles)


def read_evaluation(path: Path | str) -> Evaluation:
    """What `--out` wrote. Raises EvaluationError if it is not an evaluation."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return Evaluation(**values | lists)
    except (TypeError, AttributeError, json.JSONDecodeError):
        raise EvaluationError(
            f"{path}: not an evaluation; write one with `gptlib evaluate --out`"
        ) from None


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluate a trained model on every token of a split."""

    run: Path  # the --out folder of a training run
    corpus: str | None = None  # default: the corpus it was trained on
    split: str = "validation"
    which: str = "best"  # checkpoint: best or last
    context: int | None = None  # tokens; default: the model's block_size
    stride: int | None = None  # tokens; default: context
    separate: bool | None = None  # each document apart; default: as in training
    batch_size: int = 8
    max_documents: int | None = None  # only the first so many
    device: str = "auto"
    out: Path | None = None  # write the losses of each document here, as JSON


def evaluate_run(options: EvaluationOptions, *, progress: bool = True) -> Evaluation:
    """Evaluate as the command line does. Raises GptlibError's subclasses."""
    run = load_run(options.run, options.which, device=options.device)
    protocol(run.model, options.context, options.stride)  # before the corpus is read
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    separate = options.separate
    if separate is None:
        separate = run.config.crops == "documents"
    corpus = options.corpus or run.config.corpus
    tokens = load_tokens(load_corpus(corpus), run.tokenizer, progress=progress)
    result = evaluate(
        run.model,
        tokens.split(options.split),
        run.tokenizer,
        corpus=corpus,
        name=options.split,
        step=run.step,
        context=options.context,
        stride=options.stride,
        separate=separate,
        batch_size=options.batch_size,
        max_documents=options.max_documents,
        progress=progress,
    )
    if options.out:
        write_whole(options.out, json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def main() -> None:
    """`gptlib evaluate --run RUN`."""
    with errors_in_one_line():
        print(evaluate_run(tyro.cli(EvaluationOptions)))


if __name__ == "__main__":
    main()
