"""The folder of a run.

Tangled from book/workshop/W17_run_folders.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptlib import GptlibError
from gptlib.decoder import all_fields
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import sample_texts, stream_text
from gptlib.tokenizer import Tokenizer
from gptlib.training import TrainConfig
from gptlib.workshop import devices
from gptlib.workshop.checkpoints import Checkpoints
from gptlib.workshop.tokenizer_json import open_tokenizer
from gptlib.workshop.watching import say


class RunError(GptlibError):
    """A run that cannot be started, resumed or read."""


def run_folder(name: str, config: TrainConfig) -> Path:
    """Where this book keeps the run of a configuration.

    `$GPTLIB_RUNS/NAME-HASH`, else `runs/NAME-HASH`; HASH is of all settings.
    """
    key = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    return Path(os.environ.get("GPTLIB_RUNS", "runs")) / f"{name}-{key}"


def read_record(run: Path) -> dict | None:
    """What `run.json` says, its configuration as a `TrainConfig`; None without a file.

    Raises RunError if the file is damaged.
    """
    path = Path(run) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"config": TrainConfig.from_dict(record["config"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged or unreadable ({error}); restore it") from None


def own_tokenizer(run: Path, record: dict) -> Tokenizer:
    """The tokenizer in a run's folder. Raises RunError if it is not the run's own."""
    tokenizer = open_tokenizer(run / "tokenizer.json")
    if tokenizer.hash != record["tokenizer_hash"]:
        raise RunError(
            f"{run}: tokenizer.json is not the tokenizer that the run was trained "
            "with; restore it"
        )
    return tokenizer


def decisive(config: TrainConfig) -> dict:
    """The settings that decide what a run learns, by name, the schedule in steps.

    A field of the model's shape has the name `model.FIELD`.
    """
    values = dataclasses.asdict(config)
    values |= {f"model.{key}": value for key, value in values.pop("model").items()}
    for name in ("eval_interval", "eval_sequences"):  # what is looked at, not learned
        del values[name]
    for name in ("warmup", "decay", "cooldown"):
        del values[f"{name}_fraction"]
    return values | config.spans()


def check_folder(
    out: Path, config: TrainConfig, trains: str = "all_weights"
) -> dict | None:
    """The record of the run in a folder; None if a new one can begin there.

    Raises RunError if the folder holds a run of other settings, or something else. It
    reads nothing but `run.json` and writes nothing.
    """
    record = read_record(out)
    if record is None:
        first = ("lock", "tokenizer.json", "run.json.tmp-")  # all that a kill can leave
        if out.exists() and not (
            out.is_dir() and all(p.name.startswith(first) for p in out.iterdir())
        ):
            raise RunError(f"{out} is not empty and holds no run; choose another --out")
        return None
    before, now = decisive(record["config"]), decisive(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise RunError(
                f"{out} holds a run with {key} = {before.get(key)}, not "
                f"{now.get(key)}; choose another --out or delete it"
            )
    if (was := record.get("trains", "all_weights")) != trains:
        raise RunError(
            f"{out} holds a run that trains {was}, not {trains}; choose another --out "
            "or delete it"
        )
    return record


def check_record(old: dict, new: dict, out: Path) -> None:
    """Raises RunError if the data differ; says so if only machine or code do."""
    splits = old["data"].keys() | new["data"].keys()
    changed = [s for s in sorted(splits) if old["data"].get(s) != new["data"].get(s)]
    if changed:
        raise RunError(
            f"{out} was trained on another text under the name "
            f"{new['config']['corpus']!r} (split {', '.join(changed)} differs); "
            "restore it, or choose another --out"
        )
    was, now = old["machine"], new["machine"]
    differences = [f"{k} {was.get(k)} -> {now[k]}" for k in now if was.get(k) != now[k]]
    codes = [(r.get("code") or {}).get("files", "unknown") for r in (old, new)]
    if codes[0] != codes[1]:
        differences.append(f"gptlib's code {codes[0]} -> {codes[1]}")
    if differences:
        say(
            f"resuming on a changed machine ({'; '.join(differences)}): "
            "not bit for bit the same run"
        )


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to use it."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    config: TrainConfig
    step: int

    def sample(self, prompt: str | Sequence[str] = "", *args, **options):
        """The prompt with its continuation; for a list of prompts a list of texts.

        Arguments as in `gptlib.sampling.stream_text`: max_new_tokens, temperature,
        top_k, top_p, seed. Raises SamplingError.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, *args, **options))
        return sample_texts(self.model, self.tokenizer, prompt, *args, **options)

    def stream(self, prompt: str = "", *args, **options) -> Iterator[str]:
        """Yield the same text piece by piece, as it is drawn."""
        return stream_text(self.model, self.tokenizer, prompt, *args, **options)


def load_run(path: Path | str, which: str = "best", *, device: str = "cpu") -> Run:
    """The model of a run: its `best` checkpoint by validation loss, or its `last`.

    A damaged checkpoint is reported and the newest whole one taken. The optimiser's
    state is not read. Raises RunError, CheckpointError.
    """
    path, record = Path(path), read_record(path)
    place = devices.pick_device(device)  # before the first tensor
    if which not in ("best", "last"):
        raise RunError(f"which is {which!r}; it must be best or last")
    if record is None:
        raise RunError(f"{path}: no run.json there; give the --out folder of a run")
    tokenizer = own_tokenizer(path, record)
    checkpoints, found = Checkpoints(path / "checkpoints", say=say), None
    if which == "best":
        found = checkpoints.load_best(model_only=True)
    found = found or checkpoints.load_newest(model_only=True)
    if found is None:
        raise RunError(f"{path}: no checkpoint yet; let the run reach its first one")
    model = GPT(record["config"].model)
    model.load_state_dict(found[1]["model"])
    model = model.to(place).eval()
    return Run(path, model, tokenizer, record["config"], found[0])


def check_init(source: Run, config: GPTConfig) -> None:
    """Raises RunError if a model of this shape cannot take the weights of a run."""
    there, here = all_fields(source.model.config), all_fields(config)
    for name, was in there.items():
        if was != here[name] and name != "dropout":
            option = name.replace("_", "-")
            cure = f"{option} {was}" if not isinstance(was, bool) else option
            raise RunError(
                f"--init {source.path}: its model has {name} = {was}, this one "
                f"{here[name]}; set --model.{'no-' * (was is False)}{cure}"
            )


def load_init(model: GPT, source: Run, tokenizer: Tokenizer) -> None:
    """Copy the weights of a run into a model of its shape.

    Raises RunError if the tokenizer is another one.
    """
    if source.tokenizer.hash != tokenizer.hash:
        raise RunError(
            f"--init {source.path}: its tokenizer is another one; use "
            f"--tokenizer {source.path / 'tokenizer.json'}"
        )
    model.load_state_dict(source.model.state_dict())
