"""The command line.

Tangled from book/workshop/W11_command.md; change it there, not here.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gptlib


COMMANDS = {  # name: module with its main, what it does
    "pretrain": ("pretraining", "train a GPT, or go on with an unfinished run"),
    "plan": ("pretraining", "measure what that run will take on this machine"),
    "watch": ("workshop.watching", "follow a run that another process trains"),
    "sample": ("workshop.command", "continue a prompt with a trained model"),
    "evaluate": ("evaluation", "loss, perplexity and bits per byte of a split"),
    "finetune": ("lora", "teach a trained model to answer"),
    "reward": ("rewards", "train a fine-tuned model on rewards"),
    "chat": ("finetuning", "talk with a fine-tuned model"),
    "probe": ("workshop.probes", "what a model has learned of TinyWiki's facts"),
    "export": ("exchange", "write a run for transformers or llama.cpp"),
    "import": ("exchange", "make a run of a GPT-2-shaped transformers model"),
    "page": ("page", "write a run as one HTML file that answers by itself"),
    "benchmark": ("workshop.benchmark", "speed and memory of this machine"),
}


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt with a trained model."""

    run: Path  # the --out folder of a training run
    prompt: str = ""  # empty: begin a new document
    max_new_tokens: int = 200
    temperature: float = 1.0  # 0: always the most probable token
    top_k: int | None = None  # draw from so many tokens
    top_p: float | None = None  # draw from tokens of this much probability
    seed: int | None = None  # None: different every time
    samples: int = 1
    which: str = "best"  # checkpoint: best or last
    device: str = "auto"
    int8: bool = False  # weights of 8 bits, faster on a CPU


def sample(options: SampleOptions) -> None:
    """Print continuations as they are drawn, the i-th by seed + i."""
    from gptlib.workshop.run_folders import load_run

    for name, low in (("max_new_tokens", 1), ("samples", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and not low <= value < 2**63:
            raise gptlib.GptlibError(f"{name} is {value}; it must be at least {low}")
    run = load_run(options.run, options.which, device=options.device)
    if options.int8:
        from gptlib.workshop.int8 import int8_copy

        run = replace(run, model=int8_copy(run.model))
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    settings = {name: getattr(options, name) for name in names}
    for i in range(options.samples):
        seed = None if options.seed is None else options.seed + i
        for text in run.stream(options.prompt, seed=seed, **settings):
            print(text, end="", flush=True)
        print()


RUN = "workshop.runs.RunOptions"
HELP = {  # topic: the classes whose fields are its options
    "pretrain": ("pretraining.Pretrain", "pretraining.Preset", RUN),
    "plan": ("pretraining.Pretrain", "pretraining.Preset", RUN),
    "settings": ("training.Settings", "gpt.GPTConfig"),
    "parts": ("decoder.DecoderConfig",),
    "finetune": ("finetuning.Finetune", "lora.FinetuneLora", RUN),
    "reward": ("rewards.Reward", "rewards.RewardSettings", RUN),
    "watch": ("workshop.watching.WatchOptions",),
    "sample": ("workshop.command.SampleOptions",),
    "evaluate": ("evaluation.EvaluationOptions",),
    "probe": ("workshop.probes.ProbeOptions",),
    "export": ("exchange.Export",),
    "import": ("exchange.Import",),
    "page": ("page.PageOptions",),
    "chat": ("finetuning.ChatOptions",),
    "benchmark": ("workshop.benchmark.BenchmarkOptions",),
}


SCREENS = ("settings", "parts")


def source(module: str) -> str:
    """The text of a module of gptlib."""
    path = Path(gptlib.__file__).parent / (module.replace(".", "/") + ".py")
    return path.read_text(encoding="utf-8")


def table(name: str, text: str) -> dict[str, ast.expr]:
    """The values of a dictionary in the text of a module, as they are written."""
    for node in ast.parse(text).body:
        if ast.unparse(node).startswith((f"{name} = ", f"{name}: ")):
            found: Any = node
    return dict(zip(map(ast.literal_eval, found.value.keys), found.value.values))


def preset_values(name: str) -> dict[str, str]:
    """What a preset gives to settings of the run and of its model, as it is written."""
    known = table("PRESETS", source("training"))
    if name not in known:
        sys.exit(f"gptlib: unknown preset {name!r}; there are {', '.join(known)}")
    calls = [node for node in ast.walk(known[name]) if isinstance(node, ast.Call)]
    return {
        str(key.arg): ast.unparse(key.value) for call in calls for key in call.keywords
    }


def option_lines(path: str, given: dict[str, str]) -> Iterator[str]:
    """What a class is for, then a line for each of its fields that is an option."""
    module, _, name = path.rpartition(".")
    text, prefix = source(module), "model." * (name in ("GPTConfig", "DecoderConfig"))
    classes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]
    (found,) = (n for n in classes if n.name == name)
    yield f"\n{(ast.get_docstring(found) or '').splitlines()[0]}\n"
    for field in found.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        if kind == "GPTConfig":  # its fields are options themselves
            continue
        default: Any = field.value or ast.Constant(None)
        if isinstance(default, ast.Subscript):  # an entry of a table
            entries = table(ast.unparse(default.value), text)
            default = entries[ast.literal_eval(default.slice)]
        value = given.get(name, ast.unparse(default))
        comment = text.splitlines()[field.lineno - 1].partition("  # ")[2]
        comment += " (required)" * (field.value is None)
        if kind == "bool":
            name, value = "no_" * (value == "True") + name, ""
        if value in ("None", "''"):
            value = kind.split(" ")[0].upper()
        flag = "--" + prefix + name.replace("_", "-") + " " + value.strip("'")
        yield f"  {flag:28} {comment}".rstrip()


def help_on(topic: str, arguments: list[str]) -> str:
    """The options of a command, each with its default in place of a value."""
    words = " ".join(arguments).replace("=", " ").split(" ")
    preset = words[words.index("--preset") + 1] if "--preset" in words else "tinytiny"
    more, given = topic in SCREENS, {}  # a further screen of pretrain's
    lines = [f"usage: gptlib {'pretrain' if more else topic} [OPTIONS]"]
    if more or topic in ("pretrain", "plan"):
        given = preset_values(preset) | {"preset": preset}
    for path in HELP[topic]:
        lines += option_lines(path, given)
    if given and not more:
        lines += ["\nModel and training, with the preset's values: --help-settings"]
        lines += ["Other parts than GPT-2's, of chapter 24: --help-parts"]
    return "\n".join(lines)


def overview() -> str:
    """What `gptlib --help` says."""
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    head = "usage: gptlib COMMAND [OPTIONS]\n\nGPT-2 from text to samples.\n"
    return "\n".join([head, *lines, "\n`gptlib COMMAND --help` shows its options."])


def run_command() -> None:
    """Hand the rest of the command line to the module of the command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return print(overview())
    topics = {f"--help-{screen}": screen for screen in SCREENS}
    topics |= {"-h": name, "--help": name}
    for asked in sys.argv[2:]:
        if name in HELP and asked in topics:
            return print(help_on(topics[asked], sys.argv[2:]))
    if name == "--version":
        return print(f"gptlib {gptlib.__version__}")
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.exit(f"gptlib: unknown command {name!r}; there are {known}")
    if name in ("export", "import"):  # two commands of one module
        sys.argv[0] = "gptlib"
    else:
        sys.argv[:2] = [f"gptlib {name}"] + ["--plan"] * (name == "plan")
    if name != "sample":
        module = importlib.import_module(f"gptlib.{COMMANDS[name][0]}")
        if name != "evaluate":
            return module.main()
        return module.main(importlib.import_module("gptlib.exchange").import_model)
    from gptlib.workshop.watching import errors_in_one_line, read_options

    with errors_in_one_line():
        sample(read_options(SampleOptions))


def main() -> None:
    """`gptlib COMMAND [OPTIONS]`; it ends without a word when nobody reads on."""
    try:
        try:
            run_command()
        finally:
            sys.stdout.flush()  # here, where the error can be caught
    except BrokenPipeError:  # `gptlib sample ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
