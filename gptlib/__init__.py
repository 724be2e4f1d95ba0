"""gptlib: GPT-2 from data to samples, one module per chapter of the book.

corpus       what a model reads          training     the training loop
tokenizer    text to numbers and back    sampling     drawing text
batches      windows of tokens           speed        time and memory
attention    one causal head             evaluation   what a loss means
multi_head   several heads, one matmul   exchange     to and from transformers
block        attention, MLP, residual    pretraining  a whole run
gpt          the model                   page         the model in a browser
objective    loss, optimiser, schedule   workshop     what a run of days needs

The names in `HOME` can be imported from here: `from gptlib import GPT, load_run`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # at run time a name is loaded when it is asked for
    from gptlib.batches import Batches as Batches
    from gptlib.corpus import Corpus as Corpus
    from gptlib.corpus import load_corpus as load_corpus
    from gptlib.evaluation import Evaluation as Evaluation
    from gptlib.evaluation import evaluate as evaluate
    from gptlib.evaluation import token_losses as token_losses
    from gptlib.exchange import export_run as export_run
    from gptlib.exchange import import_model as import_model
    from gptlib.gpt import GPT as GPT
    from gptlib.gpt import GPTConfig as GPTConfig
    from gptlib.pretraining import plan as plan
    from gptlib.pretraining import pretrain as pretrain
    from gptlib.sampling import generate as generate
    from gptlib.speed import fast_loss as fast_loss
    from gptlib.tokenizer import Tokenizer as Tokenizer
    from gptlib.tokenizer import load_tokenizer as load_tokenizer
    from gptlib.training import PRESETS as PRESETS
    from gptlib.training import TrainConfig as TrainConfig
    from gptlib.training import train as train
    from gptlib.workshop.run_folders import Run as Run
    from gptlib.workshop.run_folders import load_run as load_run
    from gptlib.workshop.runs import RunOptions as RunOptions
    from gptlib.workshop.token_files import load_tokens as load_tokens

__version__ = "0.1.0"

HOME = {
    "batches": ["Batches"],
    "corpus": ["Corpus", "load_corpus"],
    "evaluation": ["Evaluation", "evaluate", "token_losses"],
    "exchange": ["export_run", "import_model"],
    "gpt": ["GPT", "GPTConfig"],
    "pretraining": ["plan", "pretrain"],
    "sampling": ["generate"],
    "speed": ["fast_loss"],
    "tokenizer": ["Tokenizer", "load_tokenizer"],
    "training": ["PRESETS", "TrainConfig", "train"],
    "workshop.run_folders": ["Run", "load_run"],
    "workshop.runs": ["RunOptions"],
    "workshop.token_files": ["load_tokens"],
}


class GptlibError(ValueError):
    """What a user can mend: one line that names the value and the cure."""


def __getattr__(name: str):
    for module, names in HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"gptlib.{module}"), name)
    raise AttributeError(f"module 'gptlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in HOME.values() for name in names)})
