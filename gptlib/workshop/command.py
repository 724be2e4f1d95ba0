"""The command line.

Tangled from book/workshop/W11_command.md; change it there, not here.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path


COMMANDS = {  # name: module with its main, what it does
    "pretrain": ("pretraining", "train a GPT, or go on with an unfinished run"),
    "plan": ("pretraining", "measure what that run will take on this machine"),
    "watch": ("workshop.watching", "follow a run that another process trains"),
    "sample": ("workshop.command", "continue a prompt with a trained model"),
    "evaluate": ("evaluation", "loss, perplexity and bits per byte of a split"),
    "finetune": ("finetuning", "teach a trained model to answer"),
    "chat": ("finetuning", "talk with a fine-tuned model"),
    "probe": ("workshop.probes", "what a model has learned of TinyWiki's facts"),
    "export": ("exchange", "write a run as a transformers folder"),
    "import": ("exchange", "make a run of a GPT-2-shaped transformers model"),
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


def sample(options: SampleOptions) -> None:
    """Print continuations as they are drawn, the i-th by seed + i."""
    from gptlib.workshop.runs import load_run

    run = load_run(options.run, options.which, device=options.device)
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    settings = {name: getattr(options, name) for name in names}
    for i in range(options.samples):
        seed = None if options.seed is None else options.seed + i
        for text in run.stream(options.prompt, seed=seed, **settings):
            print(text, end="", flush=True)
        print()


def overview() -> str:
    """What `gptlib --help` says."""
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    head = "usage: gptlib COMMAND [OPTIONS]\n\nGPT-2 from text to samples.\n"
    return "\n".join([head, *lines, "\n`gptlib COMMAND --help` shows its options."])


def main() -> None:
    """`gptlib COMMAND [OPTIONS]`: hand the rest of the line to the command's module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return print(overview())
    if name == "--version":
        return print(f"gptlib {importlib.import_module('gptlib').__version__}")
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.exit(f"gptlib: unknown command {name!r}; there are {known}")
    if name in ("export", "import"):  # two commands of one module
        sys.argv[0] = "gptlib"
    else:
        sys.argv[:2] = [f"gptlib {name}"] + ["--plan"] * (name == "plan")
    if name != "sample":
        return importlib.import_module(f"gptlib.{COMMANDS[name][0]}").main()
    import tyro

    from gptlib.workshop.watching import errors_in_one_line

    with errors_in_one_line():
        sample(tyro.cli(SampleOptions))


if __name__ == "__main__":
    main()
