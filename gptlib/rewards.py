"""Rewards: reinforcement learning and GRPO.

Tangled from book/chapters/23_rewards.md; change it there, not here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.batches import crop_offsets
from gptlib.finetuning import (
    Row,
    chat_batch,
    chat_marks,
    draw_answers,
    finetune_config,
    prompt_ids,
)
from gptlib.gpt import GPT
from gptlib.tokenizer import Tokenizer
from gptlib.training import EVAL_STEP, TrainConfig
from gptlib.workshop.checkpoints import weights_hash
from gptlib.workshop.questions import TASKS, Prompt
from gptlib.workshop.run_folders import Run, load_run
from gptlib.workshop.runs import Data, RunOptions, run_training, trial
from gptlib.workshop.watching import (
    RowWriter,
    cut_rows,
    errors_in_one_line,
    read_options,
    read_rows,
)


def advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards of P groups -> how much each is above its group's mean, (P, G).

    GRPO also divides by the group's standard deviation. We do not: it makes the noise
    of nearly equal rewards as large as a real difference. Source: Shao et al. 2024.
    """
    return rewards - rewards.mean(-1, keepdim=True)


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(new || reference), in nats, for each drawn token.

    new, reference: its log-probabilities in both models.
    """
    d = reference - new
    return torch.expm1(d) - d


def draw_key(*parts: int) -> int:
    """A seed that is a function of some numbers, such as seed, step and place."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def reply_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer; three dots follow if it does not end."""
    text = tokenizer.decode([i for i in ids if i != chat_marks(tokenizer)["end"]])
    ended = len(ids) and ids[-1] == chat_marks(tokenizer)["end"]
    return text.strip() if ended else text.strip() + " ..."


def score_groups(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    size: int = 8,
    seed: int = 0,
    **settings,
) -> tuple[list[list[str]], Tensor]:
    """`size` drawn replies to each prompt, and their rewards (P, size).

    settings: temperature and max_new_tokens, as in `draw_answers`.
    """
    rows = [prompt_ids(tokenizer, p.chat) for p in prompts for _ in range(size)]
    keys = [draw_key(seed, *divmod(i, size)) for i in range(len(rows))]
    drawn = draw_answers(model, tokenizer, rows, keys, **settings)
    texts = [reply_text(tokenizer, ids) for ids in drawn]
    replies = [texts[i : i + size] for i in range(0, len(texts), size)]
    pairs = zip(prompts, replies, strict=True)
    return replies, torch.tensor([[p.score(t) for t in group] for p, group in pairs])


def equal_share(rewards: Tensor) -> float:
    """The share of groups (P, G) whose rewards are all equal: they teach nothing."""
    return (rewards.amax(-1) - rewards.amin(-1) < 1e-6).float().mean().item()


def token_log_probs(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor,
    n_vocab: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each target with a weight, at a temperature; 0 elsewhere.

    All (B, T), in nats. Ids from n_vocab on are padding of the vocabulary.
    """
    counted = weights != 0
    logits = model.head(model.hidden(tokens)[counted]).float() / temperature  # (N, V)
    logits[:, n_vocab:] = -math.inf
    found = torch.zeros_like(weights)
    found[counted] = -F.cross_entropy(logits, targets[counted], reduction="none")
    return found


def answer_row(prompt: list[int], answer: list[int]) -> Row:
    """Ids of a prompt and its answer, of which the answer is learned."""
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def policy_loss(
    new: Tensor,
    old: Tensor,
    reference: Tensor,
    mask: Tensor,
    advantage: Tensor,
    clip: float,
    kl: float,
) -> Tensor:
    """The clipped loss with a KL penalty, a mean over answers.

    new, old, reference: log-probabilities of tokens, (B, T); mask: 1 for tokens of an
    answer; advantage: (B,), of a whole answer. An answer's terms are summed, so that
    the gradient is the policy gradient, whatever the answer's length.
    """
    ratio, a = (new - old).exp(), advantage[:, None]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    return -((gain - kl * k3(new, reference)) * mask).sum(1).mean()


class RewardError(GptlibError):
    """A task or settings that no policy can be trained with."""


LIMITS = {  # lowest and highest value of each number of the settings
    "group": (2, 10_000),
    "temperature": (0.01, 100.0),
    "clip": (0.0, 1.0),
    "kl": (0.0, 100.0),
    "updates": (1, 1000),
    "max_new_tokens": (1, 100_000),
}


@dataclass(frozen=True)
class RewardSettings:
    """How answers are drawn and compared; a TrainConfig holds it as its corpus."""

    task: str = "tinywiki"  # or backwards, and others
    group: int = 8  # answers to a prompt
    temperature: float = 1.0  # to draw and to score with
    clip: float = 0.2  # how far a ratio may move
    kl: float = 0.02  # weight of the KL to the reference, per nat
    updates: int = 1  # steps with the same answers
    max_new_tokens: int = 24  # of an answer

    def __post_init__(self):
        if self.task not in TASKS:
            raise RewardError(
                f"unknown task {self.task!r}; there are {', '.join(TASKS)}"
            )
        for name, (low, high) in LIMITS.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise RewardError(f"{name} is {value}; choose from {low} to {high:g}")

    @property
    def name(self) -> str:
        """The settings as a text, to stand in a configuration as its corpus."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, name: str) -> "RewardSettings":
        """The inverse of `name`."""
        try:
            return cls(**json.loads(name))
        except (ValueError, TypeError):
            raise RewardError(f"{name!r} holds no settings of a task") from None


@dataclass(frozen=True)
class PromptBatches:
    """Places in batches: a step's prompts depend on (seed, step // updates) alone."""

    n: int  # prompts of the split
    batch_size: int  # prompts of a whole step
    seed: int
    updates: int = 1

    def offsets(self, step: int) -> np.ndarray:
        """Numbers of the prompts of a step, (batch_size,) int64."""
        return crop_offsets(self.seed, step // self.updates, self.batch_size, self.n)

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor]]:
        """The step's places in groups, (b, 3): step, place, number of the prompt."""
        numbers = self.offsets(step).tolist()
        step = -1 if step == EVAL_STEP else step  # fits int64
        places = torch.tensor([[step, i, n] for i, n in enumerate(numbers)])
        for part in places.split(micro_batch_size):
            yield (part,)


class Rollouts:
    """The loss of a step: draw a group of answers to each prompt, score, compare.

    base: the run to start from; its model is the reference, and is never changed.
    Raises RewardError if a prompt and an answer do not fit the block.
    """

    def __init__(self, config: TrainConfig, base: Run, out: Path | str):
        self.seed, self.base = config.seed, base
        self.settings = RewardSettings.read(config.corpus)
        self.path = Path(out) / "rollouts.jsonl"
        self.prompts = TASKS[self.settings.task]()
        self.ids = {
            split: [prompt_ids(base.tokenizer, p.chat) for p in prompts]
            for split, prompts in self.prompts.items()
        }
        self.held: dict[tuple[int, int], dict] = {}  # by step of drawing, and place
        self.writer: RowWriter | None = None
        longest = max(len(ids) for split in self.ids.values() for ids in split)
        room = config.model.block_size - longest
        if self.settings.max_new_tokens > room:
            raise RewardError(
                f"max_new_tokens is {self.settings.max_new_tokens}; beside the longest "
                f"prompt of {longest} tokens the block has room for {room}"
            )

    def __str__(self) -> str:
        return "group-relative policy gradient"

    def open_data(self, config: TrainConfig, own: Tokenizer | None, progress: bool):
        """For `run_training`: the prompts of both splits in batches."""
        n = {split: len(ids) for split, ids in self.ids.items()}
        hashes = {
            split: hashlib.sha256(
                json.dumps([[p.chat, p.answer] for p in prompts]).encode()
            ).hexdigest()
            for split, prompts in self.prompts.items()
        }
        hashes["reference"] = weights_hash(self.base.model)
        updates, seed = self.settings.updates, config.seed
        train = PromptBatches(n["train"], config.batch_size, seed, updates)
        held_out = PromptBatches(n["validation"], config.eval_sequences, seed)
        return Data(self.base.tokenizer, train, held_out, hashes)

    def draw(
        self, model: GPT, split: str, numbers: list[int], keys: list[int], greedy=False
    ) -> list[dict]:
        """An answer to each prompt, with its reply and its reward."""
        s, tokenizer = self.settings, self.base.tokenizer
        heat = 0.0 if greedy else s.temperature
        asked = [self.ids[split][n] for n in numbers]
        drawn = draw_answers(model, tokenizer, asked, keys, heat, s.max_new_tokens)
        found = []
        for n, ids in zip(numbers, drawn, strict=True):
            reply = reply_text(tokenizer, ids)
            score = self.prompts[split][n].score(reply)
            found.append({"ids": ids, "replies": reply, "rewards": score})
        return found

    def resume(self, step: int) -> None:
        """Go on in the file: drop what came after a checkpoint, take what is held."""
        cut_rows(self.path, step)
        drawn_at = step - step % self.settings.updates
        for row in read_rows(self.path):
            if row["step"] == drawn_at + 1 and "ids" in row:
                self.held[drawn_at, row["place"]] = row
        self.writer = RowWriter(self.path)

    def groups(self, model: GPT, places: list[list[int]]) -> list[dict]:
        """The groups of some places: drawn now, or by an earlier update."""
        s = self.settings
        step = places[0][0]
        drawn_at = step - step % s.updates
        if step == drawn_at:
            numbers = [n for _, _, n in places for _ in range(s.group)]
            keys = [
                draw_key(self.seed, step, place, i)
                for _, place, _ in places
                for i in range(s.group)
            ]
            found = self.draw(model, "train", numbers, keys)
            if places[0][1] == 0:
                self.held.clear()
            for j, (_, place, _) in enumerate(places):
                part = found[j * s.group : (j + 1) * s.group]
                self.held[step, place] = {k: [a[k] for a in part] for k in part[0]}
        try:
            return [self.held[drawn_at, place] for _, place, _ in places]
        except KeyError:
            raise RewardError(
                f"{self.path}: the answers of step {drawn_at + 1} are missing; restore "
                "the file or begin another run"
            ) from None

    def __call__(self, model: GPT, where: Tensor) -> Tensor:
        """The loss of the places (b, 3) of a step.

        Of a model in evaluation mode: 1 less the mean reward of its most probable
        answers to prompts that are held out.
        """
        s, places = self.settings, where.tolist()
        if not model.training:
            numbers = [n for _, _, n in places]
            found = self.draw(model, "validation", numbers, numbers, greedy=True)
            rewards = torch.tensor([answer["rewards"] for answer in found])
            return 1 - rewards.mean().to(model.device)
        if self.writer is None:
            self.resume(places[0][0])
        groups = self.groups(model, places)
        rows = [
            answer_row(self.ids["train"][n], ids)
            for group, (_, _, n) in zip(groups, places, strict=True)
            for ids in group["ids"]
        ]
        tokens, targets, mask = (t.to(model.device) for t in chat_batch(rows, 1.0))
        how = tokens, targets, mask, self.base.tokenizer.n_vocab, s.temperature
        new = token_log_probs(model, *how)
        with torch.no_grad():
            reference = token_log_probs(self.base.model.to(model.device), *how)
        old = self.old_log_probs(groups, new.detach(), mask)
        rewards = torch.tensor([group["rewards"] for group in groups])
        advantage = advantages(rewards).flatten().to(model.device)
        self.write(places, groups, new.detach(), old, reference, mask)
        return policy_loss(new, old, reference, mask, advantage, s.clip, s.kl)

    def old_log_probs(self, groups: list[dict], new: Tensor, mask: Tensor) -> Tensor:
        """Those of the policy that drew the answers, (B, T): now, or as it is held."""
        parts = zip(
            groups, new.split(self.settings.group), mask.split(self.settings.group)
        )
        for group, part, counted in parts:
            if "old" not in group:
                group["old"] = part[counted != 0].tolist()
        old = torch.zeros_like(new)
        held = [value for group in groups for value in group["old"]]
        old[mask != 0] = torch.tensor(held, device=new.device)
        return old

    def write(
        self,
        places: list[list[int]],
        groups: list[dict],
        new: Tensor,
        old: Tensor,
        reference: Tensor,
        mask: Tensor,
    ) -> None:
        """A row for each group: KL in nats per answer, the share clipped, answers."""
        n, several = len(groups), self.settings.updates > 1
        divergence = (k3(new, reference) * mask).sum(1).reshape(n, -1).mean(1)
        outside = ((new - old).exp() - 1).abs() > self.settings.clip
        clipped = outside.reshape(n, -1).sum(1) / mask.reshape(n, -1).sum(1)
        numbers = zip(divergence.tolist(), clipped.tolist(), strict=True)
        for (step, place, prompt), group, (kl, share) in zip(places, groups, numbers):
            row = {"step": step + 1, "place": place, "prompt": prompt}
            row |= {"kl": kl, "clipped": share, "tokens": sum(map(len, group["ids"]))}
            if step % self.settings.updates == 0:
                kept = group if several else ("replies", "rewards")
                row |= {name: group[name] for name in kept}
            if self.writer:
                self.writer.write(row)


SETTINGS: dict[str, Any] = {  # of a run with rewards, where nothing else is said
    "steps": 100,
    "batch_size": 32,
    "learning_rate": 1e-4,
    "eval_interval": 25,
    "eval_sequences": 128,
}


def reward_config(base: Path | str, settings: RewardSettings, **changes) -> TrainConfig:
    """The configuration that trains a run further on the rewards of a task.

    It has no dropout: the model that is scored must be the model that drew.
    """
    config = finetune_config(base, settings.name, **SETTINGS | changes)
    model = dataclasses.replace(config.model, dropout=0.0)
    return dataclasses.replace(config, model=model)


def reward(config: TrainConfig, options: RunOptions) -> Run | None:
    """Start or resume a run with rewards, with all that `run_training` promises.

    It is a run of one process. Raises RewardError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RewardError(
            "a run with rewards has one process; start it without torchrun"
        )
    base = load_run(str(config.init), "last")
    rollouts = Rollouts(config, base, options.out)
    return run_training(
        config,
        options,
        loss_fn=rollouts,
        open_init=lambda _: base,
        open_data=rollouts.open_data,
    )


def calibration(
    stated: Sequence[float], right: Sequence[bool], bins: int = 5
) -> tuple[list[tuple[int, float, float]], float]:
    """Stated probabilities of answers against how often they are right.

    For each of `bins` equal ranges of probability that has answers: how many, the mean
    stated, the share right. Second, the calibration error: the mean distance of the
    two, weighted by answers. Source: Guo et al. 2017.
    """
    places = [min(int(p * bins), bins - 1) for p in stated]
    table, error = [], 0.0
    for k in range(bins):
        inside = [i for i, b in enumerate(places) if b == k]
        if inside:
            n = len(inside)
            p, share = (sum(x[i] for i in inside) / n for x in (stated, right))
            table.append((n, p, share))
            error += abs(p - share) * n / len(places)
    return table, error


@dataclass(frozen=True, kw_only=True)
class Reward(RewardSettings, RunOptions):
    """Train a fine-tuned model on rewards. On an unfinished --out it goes on."""

    run: Path  # the --out folder of a fine-tuned model
    steps: int = SETTINGS["steps"]
    batch_size: int = SETTINGS["batch_size"]  # prompts
    learning_rate: float = SETTINGS["learning_rate"]  # the peak
    seed: int = 1337
    eval_interval: int = SETTINGS["eval_interval"]  # steps
    plan: bool = False  # take some steps, and print what all will take

    def __post_init__(self):
        RunOptions.__post_init__(self)  # main checks the settings, in one line


def main() -> None:
    """`gptlib reward --run R --task TASK --out FOLDER`."""
    with errors_in_one_line():
        command = read_options(Reward)
        names = [field.name for field in dataclasses.fields(RewardSettings)]
        settings = RewardSettings(**{name: getattr(command, name) for name in names})
        names = ["steps", "batch_size", "learning_rate", "seed", "eval_interval"]
        changes = {name: getattr(command, name) for name in names}
        config = reward_config(command.run, settings, **changes)
        if command.plan:
            train = partial(reward, config)
            return print(trial(train, command, cycle=settings.updates))
        reward(config, command)


if __name__ == "__main__":
    main()
