"""The model answers inside the page.

Tangled from book/chapters/15_page.md; change it there, not here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptlib import GptlibError
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import sample_texts
from gptlib.tokenizer import GPT2_PATTERN, Tokenizer
from gptlib.workshop.families import check_finite
from gptlib.workshop.files import write_whole
from gptlib.workshop.run_folders import load_run
from gptlib.workshop.watching import errors_in_one_line, read_options


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(R, C) float -> (R,) float32 scales, (R, C) uint8: so many bits for a weight.

    Weight = (number - 2 ** (bits - 1)) * scale, and the largest of a row is exact.
    """
    half = 2 ** (bits - 1)
    scales = (weight.abs().amax(1) / (half - 1)).clamp_min(1e-20)  # (R,)
    numbers = (weight / scales[:, None]).round() + half
    return scales, numbers.to(torch.uint8)


def dequantise(scales: Tensor, numbers: Tensor, bits: int) -> Tensor:
    """What the page computes with: (R, C) float32."""
    return (numbers.float() - 2 ** (bits - 1)) * scales[:, None]


class PageError(GptlibError):
    """A model that no page can hold, or a weight file that is damaged."""


@dataclass(frozen=True)
class Moment:
    """A model at one step of its training, and how exactly the page keeps it."""

    step: int
    model: GPT
    bits: int = 8  # for each weight

    def __post_init__(self):
        if self.bits not in (4, 6, 8):
            raise PageError(f"bits is {self.bits}; choose 4, 6 or 8")


def pack(weight: Tensor, bits: int) -> bytes:
    """A vector as it is; a matrix as the scales of its rows, then its numbers."""
    if weight.ndim == 1:
        return weight.numpy().astype("<f4").tobytes()
    scales, numbers = quantise(weight, bits)
    each = np.unpackbits(numbers.numpy()[..., None], axis=-1)[..., 8 - bits :]
    return scales.numpy().astype("<f4").tobytes() + np.packbits(each).tobytes()


def unpack(data: bytes, rows: int, columns: int, bits: int) -> tuple[Tensor, int]:
    """The tensor that `pack` wrote at the beginning of `data`, and its length there."""
    first = np.frombuffer(data, "<f4", rows).astype(np.float32)
    if not columns:
        return torch.tensor(first), 4 * rows
    size = -(-rows * columns * bits // 8)
    packed = np.frombuffer(data, np.uint8, size, 4 * rows)
    each = np.unpackbits(packed)[: rows * columns * bits].reshape(rows, columns, bits)
    places = 2 ** np.arange(bits)[::-1]
    numbers = torch.tensor((each * places).sum(-1).astype(np.uint8))
    return dequantise(torch.tensor(first), numbers, bits), 4 * rows + size


FORMAT = "gptlib-page 1"
LIMIT = 30_000_000  # parameters


def export_page_weights(
    path: Path,
    moments: Sequence[Moment],
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[str] = ("", "The river", "In the village of"),
    **settings,
) -> int:
    """Write one weight file for the page; returns its size in bytes.

    moments: models of one shape. prompts: the last model continues each; the page shows
    these texts where no script runs. settings: as in `sample_texts`. Raises PageError.
    """
    config = moments[-1].model.config
    if type(config) is not GPTConfig:
        raise PageError("the page knows GPT-2's parts only; this model has others")
    size = moments[-1].model.n_parameters(include_positions=True)
    if size > LIMIT:
        raise PageError(
            f"the model has {size:,} parameters, too many for a page (at most "
            f"{LIMIT:,}); a page of it would have about {size * 4 / 3e6:.0f} MB"
        )
    if tokenizer.pattern != GPT2_PATTERN:
        raise PageError(f"{tokenizer.name}: its split pattern is not GPT-2's")
    if any(moment.model.config != config for moment in moments):
        raise PageError("the moments have models of several shapes; give one file each")
    packed: list[str] = []
    tensors: list[list] = []
    for moment in moments:
        tensors, line = pack_all(moment.model.state_dict(), moment.bits)
        packed.append(line)
    settings = {"max_new_tokens": 60, "temperature": 0.7, "seed": 0} | settings
    texts = sample_texts(moments[-1].model, tokenizer, prompts, **settings)
    header = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "parameters": size,
        "tokens": [
            t.decode("latin-1")
            for t in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
        ],
        "tensors": tensors,
        "moments": [{"step": m.step, "bits": m.bits} for m in moments],
        "examples": texts,
    }
    return write_lines(path, [json.dumps(header), *packed])


def pack_all(weights: dict[str, Tensor], bits: int) -> tuple[list[list], str]:
    """Name, rows and columns of each tensor, and all of them in base64."""
    weights = {name: value.detach().cpu() for name, value in weights.items()}
    check_finite(weights)
    shapes = [
        [name, len(value), value.shape[1] if value.ndim == 2 else 0]
        for name, value in weights.items()
    ]
    data = b"".join(pack(value, bits) for value in weights.values())
    return shapes, base64.b64encode(data).decode()


def unpack_all(shapes: list[list], line: str, bits: int) -> dict[str, Tensor]:
    """The inverse of `pack_all`, with the values that the page has."""
    data, weights = base64.b64decode(line), {}
    for name, rows, columns in shapes:
        weights[name], used = unpack(data, rows, columns, bits)
        data = data[used:]
    return weights


def write_lines(path: Path, lines: list[str]) -> int:
    """Write a weight file of these strings; returns its size in bytes."""
    check = zlib.crc32("\n".join(lines).encode())
    strings = ",\n".join(json.dumps(line) for line in lines)
    text = f"gptWeights([\n{strings}\n], {check});\n".replace("<", "\\u003c")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), text)
    return len(text)


def read_lines(path: Path) -> list[str]:
    """The strings of a weight file. Raises PageError if it is damaged."""
    try:
        text = Path(path).read_text(encoding="ascii")
        head, _, check = text.rpartition("], ")
        lines = json.loads(head.removeprefix("gptWeights(") + "]")
        whole = zlib.crc32("\n".join(lines).encode()) == int(check.rstrip(");\n"))
    except (OSError, ValueError) as error:
        raise PageError(f"{path}: no weight file ({error}); write it again") from None
    if not whole:
        raise PageError(f"{path}: damaged, its checksum is wrong; write it again")
    return lines


def read_page_weights(path: Path) -> tuple[dict, Tokenizer, list[GPT]]:
    """Header, tokenizer and models of a weight file, as the page has them."""
    lines = read_lines(path)
    header = json.loads(lines[0])
    ranks = {t.encode("latin-1"): rank for rank, t in enumerate(header["tokens"])}
    models: list[GPT] = []
    for moment, line in zip(header["moments"], lines[1:]):
        changes = moment.get("changes")
        weights = unpack_all(changes or header["tensors"], line, moment["bits"])
        if changes:
            parts, weights = weights, models[-1].state_dict()
            for name in (key[:-2] for key in parts if key.endswith(" B")):
                weights[name] = weights[name] + parts[f"{name} B"] @ parts[f"{name} A"]
        models.append(GPT(GPTConfig(**header["config"])).eval())
        models[-1].load_state_dict(weights)
    return header, Tokenizer("page", ranks), models


def add_answers(
    path: Path,
    step: int,
    changes: dict[str, tuple[Tensor, Tensor]],
    known: dict[str, str],
    *,
    bits: int = 8,
) -> int:
    """Add a moment that answers questions to a weight file; returns the file's size.

    changes: by weight a pair B (m, r), A (r, n) whose product is added to the last
    moment's weight. known: the true answer to each question that the page can mark.
    """
    lines = read_lines(path)
    header = json.loads(lines[0])
    parts = {
        f"{name} {key}": value
        for name, pair in changes.items()
        for key, value in zip("BA", pair, strict=True)
    }
    shapes, line = pack_all(parts, bits)
    moment = {"step": step, "bits": bits, "mode": "ask", "changes": shapes}
    header |= {"moments": [*header["moments"], moment], "known": known}
    return write_lines(path, [json.dumps(header), *lines[1:], line])


def web_file(name: str) -> str:
    """A file of the page's program: `page.js`, `view.js`, `start.js`, `view.css`."""
    return files("gptlib").joinpath("web", name).read_text(encoding="utf-8")


def page_body(header: dict, *, weights: str = "", form: str = "whole") -> str:
    """The element that the page's program fills; until then it shows examples.

    weights: address of the weight file, if it is loaded when needed. form: `whole`, or
    `small` for prompt and text alone.
    """
    examples = "".join(
        f"<blockquote><pre>{html.escape(text.strip())}</pre></blockquote>"
        for text in header["examples"][: 1 if form == "small" else None]
    )
    address = f' data-weights="{html.escape(weights)}"' if weights else ""
    return (
        f'<div class="gpt-page" data-form="{form}"{address}>\n<p>Written by the model '
        f"before; with JavaScript the page writes itself.</p>\n{examples}\n</div>"
    )


def write_page(path: Path, weights: Path, title: str) -> int:
    """One HTML file from a weight file, complete in itself; returns its size."""
    header, _, _ = read_page_weights(weights)
    names = ("start.js", "page.js", "view.js")
    scripts = [*map(web_file, names), Path(weights).read_text(encoding="ascii")]
    hashes = [hashlib.sha256(text.encode()).digest() for text in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(h).decode()}'" for h in hashes)
    style, title = web_file("view.css"), html.escape(title)
    text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src {allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body class="gpt-alone"><main><h1>{title}</h1>
{page_body(header)}
</main>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body></html>
"""
    write_whole(Path(path), text)
    return len(text.encode())


@dataclass(frozen=True)
class PageOptions:
    """Write a run as one HTML file in which the model answers, without a network."""

    run: Path  # the --out folder of a training run
    out: Path  # the file to write, such as page.html
    bits: int = 8  # for each weight: 4, 6 or 8
    which: str = "best"  # checkpoint: best or last
    title: str = "A language model in a page"


def write_run_page(options: PageOptions) -> str:
    """Write the page; returns a line that says how large it is. Raises PageError."""
    run = load_run(options.run, options.which)
    weights = options.out.with_name(options.out.name + ".weights.js")
    try:
        moment = Moment(run.step, run.model, options.bits)
        export_page_weights(weights, [moment], run.tokenizer)
        size = write_page(options.out, weights, options.title)
    finally:
        weights.unlink(missing_ok=True)
    n = run.model.n_parameters(include_positions=True)
    return (
        f"wrote {options.out}: {size / 1e6:.1f} MB for {n:,} parameters of "
        f"{options.bits} bits (a page takes at most {LIMIT:,})"
    )


def main() -> None:
    """`gptlib page --run RUN --out page.html`."""
    with errors_in_one_line():
        print(write_run_page(read_options(PageOptions)))


if __name__ == "__main__":
    main()
