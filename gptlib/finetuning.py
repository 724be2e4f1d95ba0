"""Supervised fine-tuning: a model that answers.

Tangled from book/chapters/21_finetuning.md; change it there, not here.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlib import GptlibError
from gptlib.batches import crop_offsets
from gptlib.corpus import load_corpus
from gptlib.gpt import GPT
from gptlib.sampling import continue_rows, seeded, stream
from gptlib.tokenizer import Tokenizer
from gptlib.training import PRESETS, TrainConfig
from gptlib.workshop.questions import QUESTIONS, Question, tinywiki_chats
from gptlib.workshop.run_folders import Run, load_run, read_record, run_folder
from gptlib.workshop.runs import Data, RunOptions, run_training, small_run
from gptlib.workshop.tokenizer_json import open_tokenizer
from gptlib.workshop.watching import errors_in_one_line, read_options, say


MARKS = {"system": 0xFC, "user": 0xFD, "assistant": 0xFE, "end": 0xFF}


Message = dict[str, str]  # role and content
Row = tuple[list[int], Sequence[float]]  # ids, and how much each is learned


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Row:
    """Ids of a conversation, and which of them are learned.

    A turn is the mark of its role, a space and its text, and the end of the turn.
    Learned are the assistant's texts and the ends of its turns.
    """
    marks, ids, learned = chat_marks(tokenizer), [tokenizer.start_of_text], [False]
    for message in messages:
        text = [*tokenizer.encode(" " + message["content"]), marks["end"]]
        ids += [marks[message["role"]], *text]
        learned += [False] + [message["role"] == "assistant"] * len(text)
    return ids, learned


def chat_batch(rows: Sequence[Row], weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights (B, T); learned targets have `weight`, others 0.

    Rows are padded on the right, with targets of weight 0.
    """
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    weights = torch.zeros(len(rows), width)
    for b, (ids, learned) in enumerate(rows):
        tokens[b, : len(ids)] = torch.tensor(ids)
        weights[b, : len(ids)] = weight * torch.tensor(learned)
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def weighted_loss(
    model: GPT, tokens: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """The sum of weight times cross-entropy in nats; all (B, T).

    Positions of weight 0 never reach the head. Without others the sum is 0.
    """
    counted = weights != 0
    logits = model.head(model.hidden(tokens)[counted]).float()  # (N, V)
    losses = F.cross_entropy(logits, targets[counted], reduction="none")
    return losses @ weights[counted]


def demo_run() -> Run:
    """The demo of chapter 14 if it is trained; else the same with half the steps."""
    try:
        run = load_run(run_folder("demo", PRESETS["demo"]), "last")
    except GptlibError:
        return small_run()
    return run if run.step == PRESETS["demo"].steps else small_run()


class FinetuneError(GptlibError):
    """Conversations, or a tokenizer, that a chat model cannot be made with."""


def chat_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the marks of the three roles, and of the end of a turn.

    They are the tokens of four bytes that UTF-8 never uses, so no text contains them.
    Raises FinetuneError if the tokenizer lacks one.
    """
    marks = {k: tokenizer.ranks.get(bytes([byte])) for k, byte in MARKS.items()}
    if missing := [name for name, token in marks.items() if token is None]:
        raise FinetuneError(
            f"tokenizer {tokenizer.name!r} has no token for the mark {missing[0]!r}; "
            "use one that has all 256 bytes, as bpe-N and gpt2 do"
        )
    return {name: token for name, token in marks.items() if token is not None}


@dataclass(frozen=True)
class ChatBatches:
    """Conversations in batches: batch `step` depends on (seed, step) alone.

    The loss of a step is the mean over all learned tokens of its conversations, however
    they are divided into micro-batches.
    """

    rows: Sequence[Row]
    batch_size: int  # conversations of a whole step
    seed: int

    def offsets(self, step: int) -> np.ndarray:
        """Numbers of the conversations of a step, (batch_size,) int64."""
        return crop_offsets(self.seed, step, self.batch_size, len(self.rows))

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The step's conversations in groups: group rank, rank + world_size, ..."""
        rows = [self.rows[i] for i in self.offsets(step)]
        rows.sort(key=lambda row: len(row[0]))  # less padding; the sum is the same
        total = sum(sum(learned) for _, learned in rows)
        first, stride = rank * micro_batch_size, world_size * micro_batch_size
        for start in range(first, self.batch_size, stride):
            group = rows[start : start + micro_batch_size]
            yield chat_batch(group, self.batch_size / (len(group) * total))


def read_chat(line: str) -> list[Message]:
    """A conversation from a line of JSON. Raises ValueError that says what is wrong."""
    try:
        chat = json.loads(line)["messages"]
        turns = [(turn["role"], turn["content"]) for turn in chat]
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at {error.pos})") from None
    except (KeyError, TypeError, RecursionError):
        want = '{"messages": [{"role": ..., "content": ...}, ...]}'
        raise ValueError(f"not a conversation; write {want}") from None
    roles = [name for name in MARKS if name != "end"]
    for number, (role, content) in enumerate(turns, 1):
        if role not in roles:
            there = ", ".join(roles)
            raise ValueError(
                f"unknown role {role!r} in turn {number}; there are {there}"
            )
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"turn {number}, of {role}, is empty; write its text")
        content.encode()  # half of a character is a ValueError too
    if "assistant" not in dict(turns):
        raise ValueError("no turn of the assistant, so nothing to learn; add an answer")
    return [{"role": role, "content": content} for role, content in turns]


def read_chats(path: Path | str) -> list[list[Message]]:
    """The conversations of a JSONL file, one a line.

    Raises FinetuneError, naming file and line, for the first that cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FinetuneError(f"{path}: cannot be read ({error})") from None
    chats = []
    for number, line in enumerate(lines, 1):
        try:
            chats += [read_chat(line)] if line.strip() else []
        except ValueError as error:
            raise FinetuneError(f"{path}, line {number}: {error}") from None
    if len(chats) < 2:
        raise FinetuneError(
            f"{path}: {len(chats)} conversations; give two at least, one to train on "
            "and one to validate with"
        )
    return chats


def load_chats(name: str) -> dict[str, list[list[Message]]]:
    """Both splits of the conversations: QUESTIONS or a file, 1 in 20 held out."""
    name, _ = split_name(name)
    if name in QUESTIONS:
        return tinywiki_chats(name)
    if not Path(name).exists():
        there = ", ".join(QUESTIONS)
        raise FinetuneError(f"no file {name!r}; give one, or one of {there}")
    chats = read_chats(name)
    kept = chats[19::20] or chats[-1:]
    held = set(map(json.dumps, kept))  # and its copies
    train = [chat for chat in chats if json.dumps(chat) not in held]
    return {"train": train, "validation": kept}


def split_name(name: str) -> tuple[str, str]:
    """The conversations, and the corpus to replay: of `CHATS+CORPUS`, or of `CHATS`."""
    chats, _, corpus = name.rpartition("+")
    return (name, "") if Path(name).exists() or not chats else (chats, corpus)


def replay(rows: list[Row], corpus: str, tokenizer: Tokenizer, block: int) -> list[Row]:
    """The rows, four times in five, and the beginnings of a corpus's documents.

    Each of their tokens is learned a quarter as much, as there are more of them.
    """
    found: list[Row] = []
    for text in islice(load_corpus(corpus).documents("train"), 4000):
        ids = [tokenizer.start_of_text, *tokenizer.encode(text)][: block + 1]
        found.append((ids, [0.0] + [0.25] * (len(ids) - 1)))
    return rows * max(1, round(4 * len(found) / len(rows))) + found


def fit_chats(
    tokenizer: Tokenizer, chats: Sequence[list[Message]], block_size: int
) -> tuple[list[Row], int, int]:
    """Rows of at most `block_size` inputs, how many were cut and how many skipped.

    A longer conversation loses its last turns. It is skipped if no answer is left.
    """
    rows, cut, skipped = [], 0, 0
    for chat in chats:
        turns = len(chat)
        while turns and len(encode_chat(tokenizer, chat[:turns])[0]) > block_size + 1:
            turns -= 1
        row = encode_chat(tokenizer, chat[:turns])
        if any(row[1]):
            rows.append(row)
            cut += turns < len(chat)
        else:
            skipped += 1
    return rows, cut, skipped


def open_chats(config: TrainConfig, own: Tokenizer | None, progress: bool) -> Data:
    """What a fine-tuning reads. own: the tokenizer of a run that has begun."""
    tokenizer = own or open_tokenizer(Path(config.tokenizer))
    batches, hashes = {}, {}
    sizes = {"train": config.batch_size, "validation": config.eval_sequences}
    for split, chats in load_chats(config.corpus).items():
        block = config.model.block_size
        rows, cut, skipped = fit_chats(tokenizer, chats, block)
        if cut or skipped:
            say(
                f"{config.corpus}, {split}: {cut + skipped} of {len(chats)} "
                f"conversations are longer than the block of {block} tokens; {cut} cut "
                f"after a turn, {skipped} skipped"
            )
        if not rows:
            raise FinetuneError(
                f"{config.corpus}, {split}: no conversation fits the block of {block} "
                "tokens; give shorter ones"
            )
        hashes[split] = hashlib.sha256(json.dumps(chats).encode()).hexdigest()
        if (corpus := split_name(config.corpus)[1]) and split == "train":
            rows = replay(rows, corpus, tokenizer, block)
            hashes["replay"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        batches[split] = ChatBatches(rows, sizes[split], config.seed)
    return Data(tokenizer, batches["train"], batches["validation"], hashes)


SETTINGS: dict[str, Any] = {  # of a fine-tuning, where nothing else is said
    "optimizer": "adamw",
    "schedule": "cosine",
    "steps": 200,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "final_learning_rate": 0.0,
    "warmup_fraction": 0.05,
    "decay_fraction": 1.0,
    "eval_interval": 50,
    "eval_sequences": 64,
}


def finetune_config(base: Path | str, data: str, **changes) -> TrainConfig:
    """The configuration that trains a run further on conversations."""
    record = read_record(Path(base))
    if record is None:
        raise FinetuneError(f"{base}: no run.json there; give a run's --out folder")
    ours: dict[str, Any] = {
        "corpus": data,
        "tokenizer": str(Path(base) / "tokenizer.json"),
    }
    ours |= {"init": str(base), "zero_projections": False}
    return dataclasses.replace(record["config"], **ours | SETTINGS | changes)


def finetune(config: TrainConfig, options: RunOptions, **hooks) -> Run | None:
    """Start or resume a fine-tuning, with all that `run_training` promises."""
    hooks |= {"loss_fn": weighted_loss, "open_data": open_chats}
    return run_training(config, options, **hooks)


def prompt_ids(tokenizer: Tokenizer, chat: Sequence[Message]) -> list[int]:
    """The ids of a conversation, and the mark after which the assistant speaks."""
    ids, _ = encode_chat(tokenizer, chat)
    return [*ids, chat_marks(tokenizer)["assistant"]]


def draw_answers(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    keys: Sequence[int | None],
    temperature: float = 1.0,
    max_new_tokens: int = 24,
) -> list[list[int]]:
    """An answer to each prompt, drawn with its key: ids, with the mark of the end.

    The mark is missing where `max_new_tokens` came first. Prompts of equal length go
    through the model together. Temperature 0 draws nothing, and needs no keys.
    """
    stop = [chat_marks(tokenizer)["end"], tokenizer.end_of_text]
    how = {"temperature": temperature, "n_vocab": tokenizer.n_vocab}
    return continue_rows(model, prompts, max_new_tokens, seeds=keys, stop=stop, **how)


def replies(
    model: GPT,
    tokenizer: Tokenizer,
    chats: Sequence[Sequence[Message]],
    max_new_tokens: int = 48,
) -> list[str]:
    """The reply to each conversation, of the most probable token at each place."""
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    keys = [None] * len(prompts)
    drawn = draw_answers(model, tokenizer, prompts, keys, 0.0, max_new_tokens)
    stop = chat_marks(tokenizer)["end"], tokenizer.end_of_text
    texts = (tokenizer.decode([i for i in ids if i not in stop]) for ids in drawn)
    return [text.strip() for text in texts]


def answers(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[str]:
    """The replies to questions, each asked by itself."""
    return replies(model, tokenizer, [q.chat()[:1] for q in questions])


def stream_reply(
    model: GPT,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    seed: int | None = None,
    **settings,
) -> Iterator[str]:
    """Yield the assistant's reply piece by piece, as far as the block has room.

    settings: temperature, top_k, top_p, as in `generate`.
    """
    marks, ids = chat_marks(tokenizer), prompt_ids(tokenizer, messages)
    tokens = torch.tensor([ids], device=model.device)
    settings |= {"n_vocab": tokenizer.n_vocab, "generator": seeded(seed)}
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    begun = False
    for new in stream(model, tokens, model.config.block_size - len(ids), **settings):
        if new.item() in (marks["end"], tokenizer.end_of_text):
            break
        text = utf8.decode(tokenizer.decode_bytes(new.tolist()))
        yield text if begun else text.removeprefix(" ")
        begun = begun or bool(text)
    yield utf8.decode(b"", final=True)


def forget(
    tokenizer: Tokenizer, messages: Sequence[Message], block_size: int, room: int
) -> list[Message]:
    """The messages without the oldest, so that `room` tokens are left for a reply.

    The last message stays, however long it is.
    """
    kept = list(messages)
    while len(kept) > 1:
        if len(encode_chat(tokenizer, kept)[0]) + 1 + room <= block_size:
            break
        kept = kept[2:] if kept[0]["role"] == "user" else kept[1:]
    return kept


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a fine-tuned model. Ctrl-D leaves."""

    run: Path  # the --out folder of a fine-tuning
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int | None = None  # draw from so many tokens
    top_p: float | None = None  # draw from tokens of this much probability
    seed: int | None = None  # None: new every time, unless temperature is 0
    which: str = "last"  # checkpoint: best or last
    device: str = "auto"


def talk_with(options: ChatOptions) -> None:
    """Read lines, and print a reply to each as it is drawn, until the input ends."""
    run = load_run(options.run, options.which, device=options.device)
    settings = {k: getattr(options, k) for k in ("temperature", "top_k", "top_p")}
    messages: list[Message] = []
    block = run.model.config.block_size
    for number in range(sys.maxsize):
        try:
            content = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not content:
            continue
        asked = [*messages, {"role": "user", "content": content}]
        kept = forget(run.tokenizer, asked, block, block // 4)
        size = len(encode_chat(run.tokenizer, kept)[0]) + 1
        if size >= block:
            print(
                f"({size} tokens, and the block has room for {block}; say it shorter)"
            )
            continue
        if len(kept) < len(asked):
            print(f"(the oldest {len(asked) - len(kept)} turns are forgotten)")
        seed = None if options.seed is None else options.seed + number
        reply = ""
        for text in stream_reply(run.model, run.tokenizer, kept, seed=seed, **settings):
            print(text, end="", flush=True)
            reply += text
        print()
        messages = [*kept, {"role": "assistant", "content": reply.strip() or "..."}]


@dataclass(frozen=True, kw_only=True)
class Finetune(RunOptions):
    """Teach a model to answer. On an unfinished --out the same command goes on."""

    run: Path  # the --out folder of a trained model
    data: str = "tinywiki-questions"  # or a JSONL file of conversations
    steps: int = SETTINGS["steps"]
    batch_size: int = SETTINGS["batch_size"]  # conversations
    learning_rate: float = SETTINGS["learning_rate"]  # the peak
    seed: int = 1337
    eval_interval: int = SETTINGS["eval_interval"]  # steps
    plan: bool = False  # take some steps, and print what all will take

    def config(self) -> TrainConfig:
        """What these options say, as one configuration."""
        names = ("steps", "batch_size", "learning_rate", "seed", "eval_interval")
        changes = {name: getattr(self, name) for name in names}
        return finetune_config(self.run, self.data, **changes)


def main() -> None:
    """`gptlib chat --run R`; the command finetune is in gptlib.lora."""
    with errors_in_one_line():
        talk_with(read_options(ChatOptions))


if __name__ == "__main__":
    main()
