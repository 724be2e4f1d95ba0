"""Exchange: to transformers and back.

Tangled from book/chapters/13_exchange.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from gptlib.gpt import GPT, GPTConfig
from gptlib.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from gptlib.training import (
    LoadedRun,
    TrainConfig,
    TrainState,
    errors_in_one_line,
    load_run,
    optimizer_of,
)
from gptlib.workshop.checkpoints import Checkpoints, write_text
from gptlib.workshop.devices import describe_machine
from gptlib.workshop.watching import read_rows


LINEAR = (
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
)  # transformers stores these transposed (Conv1D)
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours -> theirs


class ExchangeError(ValueError):
    """A model that cannot be exported or imported; the message names the key or feature."""


def to_gpt2_weights(model: GPT, n_vocab: int) -> dict[str, Tensor]:
    """Our weights under transformers' names and shapes: transposed, biases filled with zeros, padding cropped."""
    weights = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name == "wte.weight":
            value = value[:n_vocab]
        weights[f"transformer.{name}"] = (
            value.T.contiguous() if name.endswith(LINEAR) else value.clone()
        )
    for name in [
        name
        for name in weights
        if name.endswith("weight") and ".wte." not in name and ".wpe." not in name
    ]:
        width = weights[name].shape[-1]  # after the transposition, outputs come last
        weights.setdefault(name.replace("weight", "bias"), torch.zeros(width))
    return weights


def gpt2_config(config: GPTConfig, n_vocab: int, end_of_text: int):
    """The `transformers.GPT2Config` of one of our models."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=n_vocab,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function=ACTIVATION_NAMES[config.activation],
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: its own where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a table of ranks: each token's two halves, found by encoding it with the earlier ranks."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def to_fast_tokenizer(tokenizer: Tokenizer, block_size: int):
    """A `transformers.PreTrainedTokenizerFast` that gives the same ids on all text. Needs GPT-2's split pattern.

    By transformers' custom the words `<|endoftext|>` in a text become the mark; with
    `split_special_tokens=True` they are ordinary text, as `Tokenizer.encode` has them.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    if tokenizer.pattern != GPT2_PATTERN:
        raise ExchangeError(
            f"tokenizer {tokenizer.name!r} does not split text as GPT-2 does; it cannot be exported"
        )
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks)]
    fast = FastTokenizer(
        models.BPE(
            vocab=vocabulary | {END_OF_TEXT: tokenizer.end_of_text}, merges=merges
        )
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
        model_max_length=block_size, clean_up_tokenization_spaces=False,
    )  # fmt: skip


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MODEL_CARD = """---
library_name: transformers
tags: [gpt2, from-scratch]
---
# {name}

A GPT-2 of {parameters:,} parameters (positions not counted), trained with gptlib.

| what | value |
|---|---|
| corpus | {corpus} |
| steps | {step:,} of {steps:,}, {tokens:,} tokens each |
| validation loss | {loss} nats per token, on fixed random crops |
| shape | {n_layer} layers, {n_head} heads, {n_embd} wide, context {block_size} |
| tokenizer | {tokenizer}, {n_vocab:,} tokens |

It continues text in the manner of its corpus and knows little else. Configuration:

~~~json
{config}
~~~
"""


def model_card(run: LoadedRun) -> str:
    """The README of an exported model."""
    rows = [
        r
        for r in read_rows(run.path / "metrics.jsonl")
        if r.get("step") == run.step and "validation_loss" in r
    ]
    return MODEL_CARD.format(
        name=run.path.name,
        parameters=run.model.n_parameters(),
        corpus=Path(run.config.corpus).name,
        step=run.step,
        steps=run.config.steps,
        tokens=run.config.tokens_per_step,
        loss=f"{rows[-1]['validation_loss']:.4f}" if rows else "not measured",
        tokenizer=run.tokenizer.name,
        n_vocab=run.tokenizer.n_vocab,
        config=json.dumps(dataclasses.asdict(run.config), indent=1),
        **{
            k: getattr(run.model.config, k)
            for k in ("n_layer", "n_head", "n_embd", "block_size")
        },
    )


def export_run(run: LoadedRun, out: Path, *, dtype: str = "fp32") -> Path:
    """Write a run as a folder that `AutoModelForCausalLM` and `AutoTokenizer` open; whole or not at all.

    Raises ExchangeError if the folder exists, the dtype is unknown or a weight is not finite.
    """
    out = Path(out)
    if out.exists():
        raise ExchangeError(f"{out} exists; choose another --out or delete it")
    if dtype not in DTYPES:
        raise ExchangeError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    try:
        from transformers import GenerationConfig, GPT2LMHeadModel
    except ImportError:
        raise ExchangeError(
            "the library transformers is not installed; pip install transformers"
        ) from None
    for name, value in run.model.state_dict().items():
        if not torch.isfinite(value).all():
            raise ExchangeError(
                f"weight {name!r} holds values that are not finite; export another checkpoint"
            )
    n_vocab, end = run.tokenizer.n_vocab, run.tokenizer.end_of_text
    config = gpt2_config(run.model.config, n_vocab, end)
    theirs = GPT2LMHeadModel(config)
    theirs.load_state_dict(
        to_gpt2_weights(run.model, n_vocab)
        | {"lm_head.weight": run.model.wte.weight.detach().cpu()[:n_vocab]}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        theirs.to(DTYPES[dtype]).save_pretrained(scratch)
        to_fast_tokenizer(run.tokenizer, run.model.config.block_size).save_pretrained(
            scratch
        )
        GenerationConfig(
            bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=True
        ).save_pretrained(scratch)
        (scratch / "README.md").write_text(model_card(run), encoding="utf-8")
        scratch.chmod(0o755)
        os.replace(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return out


def from_gpt2_weights(weights: dict[str, Tensor], config: GPTConfig) -> GPT:
    """The inverse, strict: an unknown key, a missing one or a wrong shape raises ExchangeError naming it."""
    model = GPT(config)
    wanted = model.state_dict()
    found = plain_names(weights)
    for name in [*found, *wanted]:
        if name not in wanted:
            raise ExchangeError(f"unknown weight {name!r}; this is not a plain GPT-2")
        if name not in found:
            raise ExchangeError(f"weight {name!r} is missing")
        shape, right = tuple(found[name].shape), tuple(wanted[name].shape)
        cropped = (
            name == "wte.weight"
            and len(shape) == 2
            and shape[0] <= right[0]
            and shape[1] == right[1]
        )
        if shape != right and not cropped:
            raise ExchangeError(f"weight {name!r} has shape {shape}, not {right}")
        if not torch.isfinite(found[name]).all():
            raise ExchangeError(f"weight {name!r} holds values that are not finite")
    table = torch.zeros_like(wanted["wte.weight"])  # rows of padding stay 0
    table[: len(found["wte.weight"])] = found["wte.weight"]
    model.load_state_dict(
        {name: value.float() for name, value in (found | {"wte.weight": table}).items()}
    )
    return model.eval()


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under our names, linear layers turned back, and what is no weight left out."""
    table = weights.get("transformer.wte.weight", weights.get("wte.weight"))
    found = {}
    for name, value in weights.items():
        short = name.removeprefix("transformer.")
        if short.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old checkpoints carry the causal mask as a buffer
        if short == "lm_head.weight":
            if table is None or not torch.equal(value, table):
                raise ExchangeError(
                    "lm_head.weight differs from wte.weight; a model with an untied head is not a GPT of this book"
                )
            continue
        found[short] = (
            value.T.contiguous()
            if short.endswith(LINEAR) and value.dim() == 2
            else value
        )
    return found


def our_config(theirs: dict, *, vocab_size: int | None = None) -> GPTConfig:
    """Our configuration for a GPT-2 `config.json`. Raises ExchangeError, naming it, for what GPT-2 has not."""
    if theirs.get("model_type") != "gpt2":
        raise ExchangeError(
            f"model_type is {theirs.get('model_type')!r}, not 'gpt2'; only GPT-2's architecture can be imported"
        )
    plain = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
    }
    for key, value in plain.items():
        if theirs.get(key, value) != value:
            raise ExchangeError(
                f"{key} is {theirs[key]!r}; the models of this book have {value!r}"
            )
    shape = {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_positions": 1024,
        "vocab_size": 50257,
    }  # GPT-2's own
    shape |= {key: theirs[key] for key in shape if key in theirs}
    if theirs.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise ExchangeError(
            f"n_inner is {theirs['n_inner']}; the MLP of this book is 4 * n_embd = {4 * shape['n_embd']} wide"
        )
    ours = {name: key for key, name in ACTIVATION_NAMES.items()} | {
        "gelu_pytorch_tanh": "gelu_tanh"
    }
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in ours:
        raise ExchangeError(
            f"activation_function is {activation!r}; there are {', '.join(ours)}"
        )
    return GPTConfig(
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        block_size=shape["n_positions"],
        bias=True,
        vocab_size=vocab_size or shape["vocab_size"],
        dropout=0.0,
        activation=ours[activation],
    )


def from_tokenizer_json(path: Path, name: str) -> Tokenizer:
    """The byte-level BPE of a `tokenizer.json` as one of ours. Raises ExchangeError if it is of another kind."""
    stored = read_json(path)
    bpe = stored.get("model") or {}
    if bpe.get("type") != "BPE":
        raise ExchangeError(
            f"{path.name}: a {bpe.get('type')} tokenizer; only byte-level BPE can be imported"
        )
    cut = stored.get("pre_tokenizer") or {}
    plain = (
        cut.get("type") == "ByteLevel"
        and not cut.get("add_prefix_space")
        and cut.get("use_regex", True)
    )
    if not plain or stored.get("normalizer"):
        raise ExchangeError(
            f"{path.name}: it does not split text as GPT-2 does (pre_tokenizer {cut.get('type')}); it cannot be imported"
        )
    special = {
        token["content"]: token["id"] for token in stored.get("added_tokens", [])
    }
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    unknown = sorted(set(special) - {END_OF_TEXT})
    if unknown:
        raise ExchangeError(
            f"{path.name}: added tokens {', '.join(unknown)}; only {END_OF_TEXT} can be imported"
        )
    vocabulary = {t: i for t, i in bpe.get("vocab", {}).items() if t not in special}
    try:
        ranks = {
            bytes(bytes_of[c] for c in token): i for token, i in vocabulary.items()
        }
        merges = [
            pair.split(" ") if isinstance(pair, str) else pair
            for pair in bpe.get("merges", [])
        ]
        merges = [
            tuple(bytes(bytes_of[c] for c in half) for half in pair) for pair in merges
        ]
    except KeyError as error:
        raise ExchangeError(
            f"{path.name}: {error} is no byte-level letter; only byte-level BPE can be imported"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or merges_of(ranks) != merges:
        raise ExchangeError(
            f"{path.name}: ids do not count the merges; only GPT-2's numbering can be imported"
        )
    if special.get(END_OF_TEXT) != len(ranks):
        raise ExchangeError(
            f"{path.name}: {END_OF_TEXT} has id {special.get(END_OF_TEXT)}, not {len(ranks)}, the next after the merges"
        )
    return Tokenizer(name=name, ranks=ranks, pattern=GPT2_PATTERN)


def read_json(path: Path) -> dict:
    """The object in a JSON file, or an ExchangeError that names it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError:
        raise ExchangeError(
            f"{path.name}: damaged (no JSON); fetch or export the model again"
        ) from None


def import_model(source: str) -> tuple[GPT, Tokenizer]:
    """A GPT-2-shaped checkpoint, from a folder or by hub name, as our model and tokenizer.

    Raises ExchangeError naming the unknown key, the feature or the file that is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ExchangeError(
                f"{source}: no such folder; give a transformers model folder or a hub name such as gpt2"
            )
        folder = fetch(source)
    if not (folder / "config.json").exists():
        raise ExchangeError(
            f"{source}: no config.json there; give a transformers model folder or a hub name such as gpt2"
        )
    config = our_config(read_json(folder / "config.json"))
    if (folder / "model.safetensors").exists():
        weights = read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        weights = read_pickle(folder / "pytorch_model.bin")
    else:
        raise ExchangeError(
            f"{source}: neither model.safetensors nor pytorch_model.bin there"
        )
    if not (folder / "tokenizer.json").exists():
        raise ExchangeError(
            f"{source}: no tokenizer.json there; save it with AutoTokenizer.save_pretrained"
        )
    tokenizer = from_tokenizer_json(folder / "tokenizer.json", Path(source).name)
    if tokenizer.n_vocab > config.vocab_size:
        raise ExchangeError(
            f"{source}: its tokenizer has {tokenizer.n_vocab} ids and the model only {config.vocab_size}; they do not belong together"
        )
    return from_gpt2_weights(weights, config), tokenizer


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or an ExchangeError if it is cut off."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ExchangeError(
            f"{path.name}: damaged ({error}); fetch or export the model again"
        ) from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, without running code; an ExchangeError if that cannot be."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExchangeError(
            f"{path.name}: damaged or unsafe ({reason}); fetch the model again as safetensors"
        ) from None


def fetch(name: str) -> Path:
    """Download a model's files from the hub, or find them in its cache."""
    from huggingface_hub import snapshot_download

    from gptlib.corpus import has_network

    try:
        files = ["config.json", "model.safetensors", "tokenizer.json"]
        return Path(
            snapshot_download(
                name, allow_patterns=files, local_files_only=not has_network()
            )
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ExchangeError(
            f"{name}: no such folder, and the hub does not give it ({reason}); give a local folder"
        ) from None


def crop_block_size(model: GPT, block_size: int) -> GPT:
    """The same model with a shorter context: positions from `block_size` on are dropped."""
    if not 1 <= block_size <= model.config.block_size:
        raise ExchangeError(
            f"block_size {block_size} is not between 1 and the model's {model.config.block_size}"
        )
    cropped = GPT(dataclasses.replace(model.config, block_size=block_size))
    state = model.state_dict()
    cropped.load_state_dict(state | {"wpe.weight": state["wpe.weight"][:block_size]})
    return cropped.train(model.training)


def save_imported(model: GPT, tokenizer: Tokenizer, source: str, out: Path) -> None:
    """Make a run folder of an imported model, so that sampling, evaluation and export accept it."""
    out = Path(out)
    if out.exists():
        raise ExchangeError(f"{out} exists; choose another --out or delete it")
    config = TrainConfig(
        model=model.config,
        corpus=f"imported from {source}",
        tokenizer=tokenizer.name,
        steps=1,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        tokenizer.save(scratch / "tokenizer.json")
        record = {
            "config": dataclasses.asdict(config),
            "machine": describe_machine(model.device),
            "tokenizer_hash": tokenizer.hash,
            "data": {},
        }
        write_text(scratch / "run.json", json.dumps(record, indent=1) + "\n")
        state = TrainState(
            model,
            optimizer_of(model, config),
            torch.amp.GradScaler("cpu", enabled=False),
            step=1,
        )
        Checkpoints(scratch / "checkpoints").save(1, state.state_dict())
        scratch.chmod(0o755)
        os.replace(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Export:
    """Write a run as a transformers folder."""

    run: Path  # the --out folder of a training run
    out: Path
    which: str = "best"  # checkpoint: best or last
    dtype: str = "fp32"  # or bf16, fp16


@dataclass(frozen=True)
class Import:
    """Make a run folder of a GPT-2-shaped transformers model."""

    model: str  # a folder, or a hub name such as gpt2
    out: Path
    block_size: int | None = None  # crop the context


def main() -> None:
    """`python -m gptlib.exchange export|import ...`."""
    command = tyro.cli(
        Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Import, tyro.conf.subcommand("import")]
    )
    with errors_in_one_line():
        if isinstance(command, Export):
            export_run(
                load_run(command.run, which=command.which),
                command.out,
                dtype=command.dtype,
            )
        else:
            model, tokenizer = import_model(command.model)
            if command.block_size is not None:
                model = crop_block_size(model, command.block_size)
            save_imported(model, tokenizer, command.model, command.out)
        print(f"wrote {command.out}")


if __name__ == "__main__":
    main()
