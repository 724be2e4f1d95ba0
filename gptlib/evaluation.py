"""Evaluation: what is 3.674?.

Tangled from book/chapters/12_evaluation.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gptlib import GptlibError
from gptlib.corpus import Piece, load_corpus
from gptlib.gpt import GPT
from gptlib.objective import bits_per_byte, perplexity
from gptlib.tokenizer import Tokenizer
from gptlib.training import TrainConfig
from gptlib.workshop.counting import LAID, lay_out, protocol_table, protocols
from gptlib.workshop.devices import pick_device
from gptlib.workshop.files import write_whole
from gptlib.workshop.run_folders import Run, load_run
from gptlib.workshop.tinywiki import TinyWiki
from gptlib.workshop.token_files import TokenSplit, load_tokens
from gptlib.workshop.watching import errors_in_one_line, read_options


class EvaluationError(GptlibError):
    """A protocol that a model cannot follow, or a text that cannot be scored."""


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of windows that score targets 1 .. n_tokens - 1 once.

    A window reads tokens start .. stop - 1 and predicts start + 1 .. stop; it scores
    those from `first scored` on. With stride = context the windows do not overlap; with
    a smaller stride every target has at least context - stride tokens before it, but
    for the first window's. Raises EvaluationError for a stride outside 1 .. context.
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
    lines: int = 0  # of the words: line ends

    @property
    def nats_per_token(self) -> float:
        """Mean of all tokens that were scored."""
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """Per word, each line end counted as a word (Merity et al. 2017)."""
        return perplexity(math.fsum(self.nats) / self.words)

    @property
    def plain_word_perplexity(self) -> float:
        """Per word, line ends not counted as words."""
        return perplexity(math.fsum(self.nats) / (self.words - self.lines))

    @property
    def bits_per_byte(self) -> float:
        """Per byte of the text in UTF-8."""
        return bits_per_byte(self.nats_per_token, sum(self.tokens), self.text_bytes)

    def interval(
        self, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval (low, high) of nats per token over documents.

        level: of the resampled means between the two. draws: how many means. Source:
        Efron and Tibshirani 1993, chapter 13.
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


def evaluation_of(values: dict) -> Evaluation:
    """The inverse of `dataclasses.asdict`, lists for tuples."""
    lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Evaluation(**values | lists)


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
    padded: bool = False,
    window_means: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on a split of a token file, or of `lay_out`.

    context, stride: tokens, as in `token_losses`. batch_size: windows at a time.
    corpus, name, step: for the result; on "tinywiki" its floor is computed too.
    separate: read each document without the ones before it. max_documents: only the
    first so many. padded: read each document alone, filled up with marks, and count
    these too. window_means: the mean of the windows' means, as some programs have it.
    Raises EvaluationError for an empty split, a protocol that does not fit, and losses
    that are not finite.
    """
    context, stride = protocol(model, context, stride)
    separate = separate or padded
    ids = np.asarray(split.ids)
    marks, record = np.flatnonzero(ids == split.end_of_text), split.record
    if max_documents is not None and max_documents < len(marks) - 1:
        marks, record = marks[: max(0, max_documents) + 1], {}
        ids = ids[: marks[-1] + 1]
    if len(ids) - len(marks) < 1:
        raise EvaluationError(
            f"{corpus}, split {name}: no text in it; choose another split, or more "
            "documents"
        )
    spans = list(zip(marks[:-1], marks[1:] + 1, strict=True))  # both marks included
    options = {"context": context, "stride": stride, "batch_size": batch_size}
    parts = [ids[a:b] for a, b in spans] if separate else [ids]
    if padded:
        parts = [np.pad(x, (0, (1 - len(x)) % context), mode="edge") for x in parts]
    found = [token_losses(model, part, progress=progress, **options) for part in parts]
    if window_means:
        found = [mean_of_windows(each, context, stride) for each in found]
    losses = np.concatenate(found)  # losses[i] belongs to token i + 1
    if not np.isfinite(losses).all():
        raise EvaluationError(
            f"{corpus}, split {name}: the loss is not finite; the weights of step "
            f"{step} are damaged or diverged: evaluate another checkpoint (--which)"
        )
    own = [losses[a : b - 2] for a, b in spans]  # without the mark at the end
    own = found if padded else own
    texts = [tokenizer.decode_bytes(ids[a + 1 : b - 1].tolist()) for a, b in spans]
    counted = {
        "lines": sum(text.count(b"\n") for text in texts),
        "words": sum(len(text.split()) for text in texts),
        "text_bytes": sum(map(len, texts)),
    } | record
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
        text_bytes=counted["text_bytes"],
        words=counted["words"] + counted["lines"],
        floor=floor,
        blocks=tuple(whole.mean(1).tolist()),
        separate=separate,
        lines=counted["lines"],
    )


def mean_of_windows(losses: np.ndarray, context: int, stride: int) -> np.ndarray:
    """(n,) losses, all replaced by the mean of the windows' means."""
    spans = windows(len(losses) + 1, context, stride)
    means = [losses[first - 1 : stop].mean() for _, stop, first in spans]
    return np.full(len(losses), np.mean(means))


def tinywiki_floor(split: str, documents: int) -> float:
    """Nats that a split's first articles cost a reader who knows all there is."""
    articles = zip(TinyWiki().articles(split), range(documents), strict=False)
    return math.fsum(article.nats_floor for article, _ in articles)


def read_evaluation(path: Path | str) -> Evaluation:
    """What `--out` wrote. Raises EvaluationError if it is not an evaluation."""
    try:
        return evaluation_of(json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, AttributeError, json.JSONDecodeError):
        raise EvaluationError(
            f"{path}: not an evaluation; write one with `gptlib evaluate --out`"
        ) from None


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluate a trained model on every token of a split."""

    run: Path | None = None  # the --out folder of a training run
    weights: str | None = None  # or a transformers model, such as gpt2
    corpus: str | None = None  # default: the corpus it was trained on
    split: str = "validation"
    which: str = "best"  # checkpoint: best or last
    context: int | None = None  # tokens; default: the model's block_size
    stride: int | None = None  # tokens; default: context
    separate: bool | None = None  # each document apart; default: as in training
    layout: str = "articles"  # or rows, file, spaced: what is a document
    detokenised: bool = False  # WikiText's words and signs joined again
    padded: bool = False  # documents filled up with marks, all counted
    window_means: bool = False  # the mean of the windows' means
    max_tokens: int | None = None  # only the first so many
    max_documents: int | None = None  # only the first so many
    all_protocols: bool = False  # a table of the ways of counting in use
    batch_size: int = 8
    device: str = "auto"
    out: Path | None = None  # write the losses of each document here, as JSON


Weights = Callable[[str], tuple[GPT, Tokenizer]]


def open_model(options: EvaluationOptions, open_weights: Weights | None) -> Run:
    """The run, or the weights, that the command line names.

    Raises EvaluationError unless there is one of the two; else as `load_run`.
    """
    if (options.run is None) == (options.weights is None):
        raise EvaluationError("give either --run FOLDER or --weights NAME")
    if options.run:
        return load_run(options.run, options.which, device=options.device)
    if open_weights is None:
        raise EvaluationError("--weights is an option of the command `gptlib evaluate`")
    device = pick_device(options.device)  # before the first tensor
    model, tokenizer = open_weights(str(options.weights))
    model = model.to(device).eval()
    config = TrainConfig(model.config)  # its corpus: WikiText-103
    return Run(Path(str(options.weights)), model, tokenizer, config, step=0)


def settings_of(options: EvaluationOptions, run: Run, *names: str) -> dict:
    """What `evaluate` gets from the command line, before a corpus is read.

    Raises EvaluationError for a protocol that the model cannot follow.
    """
    protocol(run.model, options.context, options.stride)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    corpus = options.corpus or run.config.corpus
    named = {name: getattr(options, name) for name in ("context", "batch_size", *names)}
    settings = {"name": options.split, "step": run.step, "progress": True}
    return settings | {"corpus": corpus} | named


def evaluate_run(
    options: EvaluationOptions, *, open_weights: Weights | None = None
) -> Evaluation:
    """Evaluate as the command line does. Raises GptlibError's subclasses.

    open_weights: opens what `--weights` names.
    """
    run = open_model(options, open_weights)
    names = ("stride", "separate", "max_documents", "padded", "window_means")
    settings = settings_of(options, run, *names)
    if settings["separate"] is None:
        settings["separate"] = run.config.crops == "documents"
    corpus = load_corpus(settings["corpus"])
    laid = {name: getattr(options, name) for name in LAID}
    if options.run and list(laid.values()) == ["articles", False, None]:
        tokens = load_tokens(corpus, run.tokenizer, progress=True)
        split = tokens.split(options.split)
    else:  # no other split is read
        split = lay_out(corpus.pieces(options.split), run.tokenizer, **laid)
    result = evaluate(run.model, split, run.tokenizer, **settings)
    if options.out:
        write_whole(options.out, json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def all_protocols(
    model: GPT, pieces: Iterable[Piece], tokenizer: Tokenizer, **options
) -> dict[str, Evaluation]:
    """A text evaluated in each of the ways in use, by name; documents put together.

    options: as in `evaluate`. Raises EvaluationError.
    """
    pieces, results = list(pieces), {}
    context, _ = protocol(model, options.get("context"), None)
    for name, way in protocols(context).items():
        laid = {key: way.pop(key) for key in LAID if key in way}
        split = lay_out(pieces, tokenizer, **laid)
        found = evaluate(model, split, tokenizer, **options | way)
        nats, tokens = math.fsum(found.nats), sum(found.tokens)
        results[name] = dataclasses.replace(
            found, nats=(nats,), tokens=(tokens,), blocks=()
        )
    return results


def evaluate_protocols(
    options: EvaluationOptions, *, open_weights: Weights | None = None
) -> dict[str, Evaluation]:
    """`--all-protocols`: one model on one split, counted in each way in use.

    Raises GptlibError's subclasses.
    """
    run = open_model(options, open_weights)
    settings = settings_of(options, run)
    pieces = load_corpus(settings["corpus"]).pieces(options.split)
    pieces = islice(pieces, options.max_documents)
    results = all_protocols(run.model, pieces, run.tokenizer, **settings)
    if options.out:
        stored = {name: dataclasses.asdict(one) for name, one in results.items()}
        write_whole(options.out, json.dumps(stored, indent=1) + "\n")
    return results


def main(open_weights: Weights | None = None) -> None:
    """`gptlib evaluate --run RUN`."""
    with errors_in_one_line():
        options = read_options(EvaluationOptions)
        if options.all_protocols:
            results = evaluate_protocols(options, open_weights=open_weights)
            print(protocol_table(results))
        else:
            print(evaluate_run(options, open_weights=open_weights))


if __name__ == "__main__":
    main()
