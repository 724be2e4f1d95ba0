"""The weight file of the page that the repository carries: book/page/weights.js.

`python tools/page.py` takes the demo from GPTLIB_RUNS (chapter 14 trains it) and the
same run after 60 steps (chapter 15). It trains an adapter that answers (chapter 22),
with replay (chapter 21). The file holds the three moments, the adapter, and the true
answers by which the page marks what the model says. About five minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gptlib.finetuning import finetune, finetune_config
from gptlib.lora import Lora
from gptlib.page import Moment, add_answers, export_page_weights
from gptlib.pretraining import pretrain
from gptlib.training import PRESETS, fresh_model
from gptlib.workshop.questions import (
    NEW,
    OLD,
    UNKNOWN,
    all_of,
    famous_entities,
    held_out,
    in_turn,
    questions,
    unknown_entities,
)
from gptlib.workshop.run_folders import load_run, run_folder
from gptlib.workshop.runs import RunOptions


OUT = Path(__file__).parents[1] / "book" / "page" / "weights.js"
RANK = 16


def known() -> dict[str, str]:
    """The true answers to questions; what no article tells is not known."""
    every = questions(famous_entities()[::-1], all_of(OLD + NEW))
    strange = [e for e in unknown_entities() if held_out(e)]
    found = {q.text: q.answer for q in every}
    return found | {q.text: UNKNOWN for q in questions(strange, in_turn(OLD))}


def main() -> None:
    demo, options = PRESETS["demo"], {"precision": "fp32", "progress": False}
    base = run_folder("demo", demo)
    pretrain(demo, RunOptions(base, **options))
    early = RunOptions(run_folder("page/early", demo), max_steps=60, **options)
    if not early.out.exists():
        pretrain(demo, early)
    config = finetune_config(
        base,
        "tinywiki-questions+tinywiki",
        steps=400,
        batch_size=20,
        learning_rate=5e-3,
        eval_interval=100,
    )
    answers = run_folder("answers", config)
    place = RunOptions(answers, micro_batch_size=4, **options)
    finetune(config, place, make_state=Lora(RANK))
    before, after = load_run(base, "last"), load_run(answers, "last")
    changes = {}
    for name, weight in after.model.state_dict().items():
        change = weight - before.model.state_dict()[name]
        if weight.ndim == 2 and change.any():  # of rank RANK
            u, values, v = torch.linalg.svd(change, full_matrices=False)
            changes[name] = u[:, :RANK] * values[:RANK], v[:RANK]
    moments = [
        Moment(0, fresh_model(demo), 4),
        Moment(60, load_run(early.out, "last").model, 4),
        Moment(before.step, before.model, 6),
    ]
    export_page_weights(OUT, moments, before.tokenizer)
    size = add_answers(OUT, config.steps, changes, known())
    print(f"{OUT}: {size:,} bytes")


if __name__ == "__main__":
    main()
