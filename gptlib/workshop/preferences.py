"""Preferences: DPO.

Tangled from book/workshop/W16_preferences.md; change it there, not here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from gptlib.finetuning import Row, encode_chat
from gptlib.tokenizer import Tokenizer
from gptlib.workshop.questions import Prompt


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The mean of -log sigmoid(beta * margin) over pairs; Rafailov et al. 2023.

    The arguments are log-probabilities of whole answers, (N,), of the policy and of the
    reference.
    """
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -F.logsigmoid(beta * margin).mean()


def preference_pairs(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[str]],
    rewards: Tensor,
) -> list[tuple[Row, Row]]:
    """Rows of the best and of the worst reply of each group that has both."""
    pairs = []
    for prompt, group, scores in zip(prompts, replies, rewards, strict=True):
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] > scores[worst] + 1e-6:
            turns = [{"role": "assistant", "content": group[i]} for i in (best, worst)]
            rows = [encode_chat(tokenizer, [*prompt.chat, turn]) for turn in turns]
            pairs.append((rows[0], rows[1]))
    return pairs


def fit_pairs(
    pairs: Sequence[tuple[Row, Row]], block_size: int
) -> tuple[list[tuple[Row, Row]], int]:
    """Pairs cut to `block_size` inputs, and how many were dropped.

    A pair is dropped if its rows are equal after the cut, or one has no answer left.
    """
    kept = []
    for pair in pairs:
        a, b = ((ids[: block_size + 1], on[: block_size + 1]) for ids, on in pair)
        if a[0] != b[0] and any(a[1]) and any(b[1]):
            kept.append((a, b))
    return kept, len(pairs) - len(kept)
