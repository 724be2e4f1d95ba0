"""Exchange: to transformers and back.

Tangled from book/chapters/13_exchange.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlib.corpus import has_network
from gptlib.decoder import DecoderConfig
from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import Tokenizer
from gptlib.training import TrainConfig, TrainState, optimizer_of
from gptlib.workshop.checkpoints import Checkpoints
from gptlib.workshop.devices import describe_code, describe_machine
from gptlib.workshop.families import (
    FAMILIES,
    check_finite,
    family_of,
    from_family,
    need,
    our_decoder_config,
    refuse,
    to_family,
)
from gptlib.workshop.files import write_whole
from gptlib.workshop.gguf_files import write_gguf
from gptlib.workshop.run_folders import Run, load_run
from gptlib.workshop.tokenizer_json import (
    ExchangeError,
    ForeignTokenizer,
    foreign_tokenizer,
    from_tokenizer_json,
    read_json,
    to_fast_tokenizer,
)
from gptlib.workshop.watching import errors_in_one_line, read_options, read_rows


LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers: transposed
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours -> theirs


def to_gpt2_weights(model: GPT, n_vocab: int) -> dict[str, Tensor]:
    """Our weights under transformers' names, in its shapes, on the CPU.

    Linear layers are (inputs, outputs), missing biases zeros; padding is cut off.
    """
    weights = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name == "wte.weight":
            value = value[:n_vocab]
        turned = value.T if name.endswith(LINEAR) else value
        weights[f"transformer.{name}"] = torch.clone(turned.contiguous())
    for name in list(weights):
        if name.endswith("weight") and ".wte." not in name and ".wpe." not in name:
            width = weights[name].shape[-1]  # once transposed, outputs come last
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(width))
    return weights


def gpt2_config(config: GPTConfig, n_vocab: int, end_of_text: int):
    """The `transformers.GPT2Config` of a model of ours; end_of_text: the mark's id."""
    from transformers import GPT2Config

    same = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    dropped = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return GPT2Config(
        **same | dict.fromkeys(dropped, config.dropout),
        vocab_size=n_vocab,
        n_positions=config.block_size,
        activation_function=ACTIVATION_NAMES[config.activation],
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODEL_CARD = """---
library_name: transformers
tags: [{kind}, from-scratch]
---
# {name}

A {kind} of {parameters:,} parameters (positions not counted), trained with gptlib on
{corpus}: {step:,} of {steps:,} steps of {tokens:,} tokens. Validation loss {loss} nats
per token, on fixed random crops. Shape: {n_layer} layers, {n_head} heads, {n_embd}
wide, context {block_size}; tokenizer {tokenizer}, {n_vocab:,} tokens. It continues text
in the manner of its corpus and knows little else.

~~~json
{config}
~~~
"""


def model_card(run: Run) -> str:
    """The README of an exported model."""
    losses = [
        row["validation_loss"]
        for row in read_rows(run.path / "metrics.jsonl")
        if row.get("step") == run.step and "validation_loss" in row
    ]
    shape = dataclasses.asdict(run.model.config) | {"n_vocab": run.tokenizer.n_vocab}
    config = run.model.config
    kind = family_of(config) if isinstance(config, DecoderConfig) else "gpt2"
    return MODEL_CARD.format(
        name=run.path.name,
        kind=kind,
        parameters=run.model.n_parameters(),
        corpus=Path(run.config.corpus).name,
        step=run.step,
        steps=run.config.steps,
        tokens=run.config.tokens_per_step,
        loss=f"{losses[-1]:.4f}" if losses else "not measured",
        tokenizer=run.tokenizer.name,
        config=json.dumps(dataclasses.asdict(run.config), indent=1),
        **shape,
    )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context that fills a scratch folder; at its end the folder becomes `out`.

    Whole or not at all. Raises ExchangeError if there is an `out`.
    """
    if out.exists():
        raise ExchangeError(f"{out} exists; choose another --out or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_run(run: Run, out: Path | str, *, dtype: str = "fp32") -> Path:
    """Write a run as a folder that `AutoModelForCausalLM` and `AutoTokenizer` open.

    Raises ExchangeError if the folder exists, the dtype is unknown or a weight is not
    finite; then nothing is written.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ExchangeError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    need("transformers")
    from transformers import GenerationConfig, GPT2LMHeadModel

    check_finite(run.model.state_dict())
    n_vocab, end = run.tokenizer.n_vocab, run.tokenizer.end_of_text
    theirs: Any
    if isinstance(run.model.config, DecoderConfig):
        theirs = to_family(run.model, n_vocab, end)
    else:
        weights = to_gpt2_weights(run.model, n_vocab)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        theirs = GPT2LMHeadModel(gpt2_config(run.model.config, n_vocab, end))
        theirs.load_state_dict(weights)
    with new_folder(out) as scratch:
        theirs.to(DTYPES[dtype]).save_pretrained(scratch)
        tokenizer, block = run.tokenizer, run.model.config.block_size
        if isinstance(tokenizer, ForeignTokenizer):
            fast = tokenizer.to_fast(block)
        else:
            fast = to_fast_tokenizer(tokenizer, block)
        fast.save_pretrained(scratch)
        ids = {"bos_token_id": run.tokenizer.start_of_text, "eos_token_id": end}
        ids |= {"pad_token_id": end}
        GenerationConfig(**ids, do_sample=True).save_pretrained(scratch)
        (scratch / "README.md").write_text(model_card(run), encoding="utf-8")
    return out


def from_gpt2_weights(weights: dict[str, Tensor], config: GPTConfig) -> GPT:
    """The inverse of `to_gpt2_weights`, strict.

    An unknown weight, a missing one, a wrong shape, and a value that is not finite
    raise ExchangeError, which names the weight.
    """
    model = GPT(config)
    wanted, found = model.state_dict(), plain_names(weights)
    for name in [*found, *wanted]:
        if name not in wanted:
            raise ExchangeError(f"unknown weight {name!r}; this is not a plain GPT-2")
        if name not in found:
            raise ExchangeError(f"weight {name!r} is missing")
        shape, right = tuple(found[name].shape), tuple(wanted[name].shape)
        table = name == "wte.weight" and len(shape) == 2  # may have fewer rows
        if shape != right and not (
            table and shape[0] <= right[0] and shape[1:] == right[1:]
        ):
            raise ExchangeError(f"weight {name!r} has shape {shape}, not {right}")
    check_finite(found)
    padded = torch.zeros_like(wanted["wte.weight"])  # rows of padding stay 0
    padded[: len(found["wte.weight"])] = found["wte.weight"]
    found["wte.weight"] = padded
    model.load_state_dict({name: value.float() for name, value in found.items()})
    return model.eval()


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' weights under our names, linear layers (outputs, inputs) again.

    Raises ExchangeError for an output layer that is not the table of tokens.
    """
    table = weights.get("transformer.wte.weight", weights.get("wte.weight"))
    found = {}
    for name, value in weights.items():
        short = name.removeprefix("transformer.")
        if short.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old checkpoints carry the causal mask as a buffer
        if short == "lm_head.weight":
            if table is None or not torch.equal(value, table):
                raise ExchangeError(
                    "lm_head.weight differs from wte.weight; a model with an untied "
                    "head is not a GPT of this book"
                )
            continue
        turned = short.endswith(LINEAR) and value.dim() == 2
        found[short] = value.T.contiguous() if turned else value
    return found


PLAIN = {  # what every model of this book has
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}


def our_config(theirs: dict, *, vocab_size: int | None = None) -> GPTConfig:
    """Our configuration for a GPT-2 `config.json`.

    Raises ExchangeError, naming the feature, for what GPT-2 has not.
    """
    # what a file leaves out is as in GPT-2, but for its kind
    given = {"model_type": None, "activation_function": "gelu_new", "n_inner": None}
    theirs = given | theirs
    get = theirs.get
    width = get("n_embd", 768)
    ours = {name: key for key, name in ACTIVATION_NAMES.items()}
    ours["gelu_pytorch_tanh"] = "gelu_tanh"
    allowed: dict[str, tuple] = {key: (value,) for key, value in PLAIN.items()}
    allowed |= {"n_inner": (None, 4 * width), "activation_function": tuple(ours)}
    refuse(theirs, allowed)
    return GPTConfig(
        n_layer=get("n_layer", 12),
        n_head=get("n_head", 12),
        n_embd=width,
        block_size=get("n_positions", 1024),
        bias=True,
        vocab_size=vocab_size or get("vocab_size", 50257),
        dropout=0.0,
        activation=ours[theirs["activation_function"]],
    )


def find_file(source: str, name: str) -> Path:
    """A file of a model, in a folder or fetched from the hub. Raises ExchangeError."""
    from transformers.utils import cached_file

    offline = not Path(source).is_dir() and not has_network()
    try:
        found = cached_file(source, name, local_files_only=offline)
    except (OSError, ValueError):
        found = None
    if not found:
        raise ExchangeError(
            f"{source}: no {name} there; give a transformers model folder, or a hub "
            "name such as gpt2"
        )
    return Path(found)


def import_model(source: str) -> tuple[GPT, Tokenizer]:
    """A checkpoint of GPT-2's kind or of FAMILIES, from a folder or the hub, as ours.

    Raises ExchangeError naming the weight, the feature or the file that is wrong.
    """
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ExchangeError(f"{source}: no such folder; give a transformers folder")
    need("transformers")
    from transformers import GPT2LMHeadModel

    stored = read_json(find_file(source, "config.json"))
    kind = str(stored.get("model_type"))
    family = FAMILIES.get(kind)
    try:
        config = (our_config if kind == "gpt2" else our_decoder_config)(stored)
    except ExchangeError as error:
        raise ExchangeError(f"{source}, config.json: {error}") from None
    except KeyError as error:
        raise ExchangeError(f"{source}, config.json: {error} is missing") from None
    found = find_file(source, "tokenizer.json")
    name = Path(source).name
    if family:
        settings = read_json(find_file(source, "tokenizer_config.json"))
        text = found.read_text(encoding="utf-8")
        tokenizer = foreign_tokenizer(text, name, settings, stored)
    else:
        tokenizer = from_tokenizer_json(found, name)
    if tokenizer.n_vocab > config.vocab_size:
        raise ExchangeError(
            f"{source}: its tokenizer has {tokenizer.n_vocab} ids and the model only "
            f"{config.vocab_size}; they do not belong together"
        )
    try:
        model_class = family.load("ForCausalLM") if family else GPT2LMHeadModel
        loaded: Any = model_class.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=Path(source).is_dir() or not has_network(),
        )
        theirs, told = loaded
    except Exception as error:  # whatever its readers raise for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExchangeError(
            f"{source}: its weights cannot be read ({reason[:100]}); fetch or export "
            "the model again"
        ) from None
    for problem in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, told[f"{problem}_keys"]))
        if names:
            raise ExchangeError(
                f"{source}: {problem} weight {names[0]!r}, no plain "
                f"{family.stem if family else 'GPT-2'}"
            )
    if isinstance(config, DecoderConfig):
        return from_family(theirs.state_dict(), config, kind), tokenizer
    return from_gpt2_weights(theirs.state_dict(), config), tokenizer


def crop_block_size(model: GPT, block_size: int) -> GPT:
    """The same model with a context of so many tokens; later positions are dropped.

    Raises ExchangeError unless block_size is between 1 and the model's.
    """
    if not 1 <= block_size <= model.config.block_size:
        raise ExchangeError(
            f"block_size {block_size} is not between 1 and the model's "
            f"{model.config.block_size}"
        )
    state = model.state_dict()
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][:block_size]
    cropped = GPT(dataclasses.replace(model.config, block_size=block_size))
    cropped.load_state_dict(state)
    return cropped.train(model.training)


def save_imported(model: GPT, tokenizer: Tokenizer, source: str, out: Path) -> None:
    """Make a run folder of a model, which sampling, evaluation and --init accept.

    source: where it came from, for the record. Raises ExchangeError if `out` exists.
    """
    corpus = f"imported from {source}"
    config = TrainConfig(model.config, corpus, tokenizer.name, steps=1)
    record = {
        "config": dataclasses.asdict(config),
        "machine": describe_machine(model.device),
        "code": describe_code(),
        "tokenizer_hash": tokenizer.hash,
        "data": {},
    }
    with new_folder(Path(out)) as scratch:
        tokenizer.save(scratch / "tokenizer.json")
        write_whole(scratch / "run.json", json.dumps(record, indent=1) + "\n")
        state = TrainState(model, optimizer_of(model, config), step=1)
        Checkpoints(scratch / "checkpoints").save(1, state.state_dict())


@dataclass(frozen=True)
class Export:
    """Write a run as a transformers folder, or as a GGUF file for llama.cpp."""

    run: Path  # the --out folder of a training run
    out: Path  # a new folder, or a new FILE.gguf
    which: str = "best"  # checkpoint: best or last
    format: str = "transformers"  # or gguf
    dtype: str = "fp32"  # or bf16, fp16; gguf: f32, f16, q8_0

    def __call__(self) -> None:
        if self.format not in ("transformers", "gguf"):
            raise ExchangeError(
                f"unknown format {self.format!r}; there are transformers and gguf"
            )
        run = load_run(self.run, self.which)
        if self.format == "transformers":
            export_run(run, self.out, dtype=self.dtype)
            return
        dtype, name = self.dtype.replace("fp", "f"), run.path.resolve().name
        write_gguf(run.model, run.tokenizer, self.out, dtype=dtype, name=name)


@dataclass(frozen=True)
class Import:
    """Make a run folder of a transformers model: GPT-2, LLaMA, Mistral, Qwen, BLOOM."""

    model: str  # a folder, or a hub name such as gpt2
    out: Path
    block_size: int | None = None  # crop the context

    def __call__(self) -> None:
        model, tokenizer = import_model(self.model)
        if self.block_size is not None:
            model = crop_block_size(model, self.block_size)
        save_imported(model, tokenizer, self.model, self.out)


def main() -> None:
    """`gptlib export --run RUN --out FOLDER` and `gptlib import --model NAME`."""
    with errors_in_one_line():
        command = read_options(Export | Import)
        command()
        print(f"wrote {command.out}")


if __name__ == "__main__":
    main()
