"""Token files: round trips, bounded reading, broken readers, damage, processes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import gptlib.workshop.token_files as token_files
from gptlib.corpus import Corpus, CorpusError, Piece
from gptlib.tokenizer import Tokenizer, TokenizerError, train_bpe
from gptlib.workshop.token_files import (
    TokenFile,
    TokenFileError,
    encode_pieces,
    load_tokens,
    write_tokens,
)


WORDS = re.findall(
    r"\S+", "the river town of Bex has a ship , an album and 17 @,@ 000 people"
)


def some_texts(n: int, seed: int = 0) -> list[str]:
    """n texts of 0 to 60 words, with some letters of several bytes."""
    rng = random.Random(seed)
    texts = [
        " ".join(rng.choices([*WORDS, "Ærø", "語"], k=rng.randrange(60))) + "\n"
        for _ in range(n)
    ]
    return ["", *texts[1:]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_merges(train_bpe(some_texts(200), 300), "own-300")


def corpus_of(**splits) -> Corpus:
    """A corpus of texts or pieces in memory."""
    as_pieces = {
        name: [p if isinstance(p, Piece) else Piece(p) for p in pieces]
        for name, pieces in splits.items()
    }
    return Corpus(
        "memory", {name: lambda p=p: iter(p) for name, p in as_pieces.items()}
    )


@pytest.fixture
def folder(tmp_path, tokenizer):
    write_tokens(
        corpus_of(train=some_texts(30), test=["one\n"]), tokenizer, tmp_path / "tokens"
    )
    return tmp_path / "tokens"


# The token file


def test_round_trip(folder, tokenizer):
    split = TokenFile.open(folder, tokenizer).split("train")
    texts = some_texts(30)
    assert [tokenizer.decode(d[1:-1]) for d in split.documents()] == texts
    assert split.record["documents"] == 30
    assert split.record["text_bytes"] == sum(len(t.encode()) for t in texts)
    assert (
        split.record["tokens"]
        == len(split)
        == sum(len(tokenizer.encode(t)) for t in texts) + 31
    )
    assert split.ids[0] == split.ids[-1] == tokenizer.end_of_text
    assert split.ids.dtype == np.dtype("<u2")


def test_pieces_of_one_document_share_one_mark(tmp_path, tokenizer):
    pieces = [Piece("the river "), Piece("of Bex", starts=False), Piece("ship")]
    split = write_tokens(corpus_of(train=pieces), tokenizer, tmp_path / "t").split(
        "train"
    )
    assert [tokenizer.decode(d[1:-1]) for d in split.documents()] == [
        "the river of Bex",
        "ship",
    ]


def test_special_text_is_ordinary_text(tmp_path, tokenizer):
    text = "before<|endoftext|>after"
    split = write_tokens(corpus_of(train=[text]), tokenizer, tmp_path / "t").split(
        "train"
    )
    assert np.sum(split.ids == tokenizer.end_of_text) == 2
    assert [tokenizer.decode(d[1:-1]) for d in split.documents()] == [text]


def test_file_does_not_depend_on_threads_or_grouping(tokenizer):
    pieces = [Piece(t) for t in some_texts(100)]
    expected = [(p, tokenizer.encode(p.text)) for p in pieces]
    for threads, group, ahead in (
        (1, 1, 1),
        (3, 1, 100),
        (4, 500, 10**6),
        (2, 10**6, 10**6),
    ):
        results = encode_pieces(
            pieces, tokenizer, threads=threads, group=group, ahead=ahead
        )
        found = [(piece, ids.tolist()) for piece, ids in results]
        assert found == expected
    assert list(encode_pieces([], tokenizer, threads=2)) == []


def test_reading_ahead_is_bounded_in_characters(tokenizer):
    read = given = most = 0

    def reader():
        nonlocal read
        for _ in range(60):
            read += 1000
            yield Piece("ship " * 200)

    for piece, _ in encode_pieces(reader(), tokenizer, threads=8, group=1, ahead=5000):
        most = max(most, read - given)
        given += len(piece.text)
    assert given == 60_000 and most <= 6000


def test_splits_and_their_absence(folder, tokenizer):
    tokens = TokenFile.open(folder)
    assert len(tokens.split("test")) == len(tokenizer.encode("one\n")) + 2
    with pytest.raises(TokenFileError, match="no split 'dev'; it has train, test"):
        tokens.split("dev")


@pytest.mark.parametrize("n_vocab, kind", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_have_the_bytes_that_the_vocabulary_needs(tmp_path, n_vocab, kind):
    class Large:
        name, hash, start_of_text = "large", "0" * 64, n_vocab - 1

        def encode_array(self, text):
            return np.array([7], np.uint32)

    tokenizer = Large()
    tokenizer.n_vocab = n_vocab
    file = write_tokens(corpus_of(train=["text"]), tokenizer, tmp_path / "tokens")
    split = file.split("train")
    assert split.ids.dtype == np.dtype(kind)
    assert split.ids.tolist() == [n_vocab - 1, 7, n_vocab - 1]


# Whole or not at all


def failing(after: int, error: Exception) -> Corpus:
    def reader():
        for _ in range(after):
            yield Piece("the river " * 50)
        raise error

    return Corpus("failing", {"train": lambda: iter([Piece("fine")]), "test": reader})


@pytest.mark.parametrize("after", [0, 1, 2000])
def test_reader_that_raises_leaves_nothing(tmp_path, tokenizer, after):
    with pytest.raises(CorpusError, match="half a file"):
        write_tokens(
            failing(after, CorpusError("half a file")), tokenizer, tmp_path / "tokens"
        )
    assert list(tmp_path.iterdir()) == []


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(TokenizerError, match="half of a character"):
        write_tokens(
            corpus_of(train=["fine", "bad \ud800"]), tokenizer, tmp_path / "tokens"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(folder, tokenizer):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TokenFileError, match="exists already; delete it"):
        write_tokens(corpus_of(train=["new"]), tokenizer, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["tokens"]


def test_interrupted_writer_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        write_tokens(failing(3, KeyboardInterrupt()), tokenizer, tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_no_token_file(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    program = f"""
        import os, signal
        from pathlib import Path
        from gptlib.workshop.token_files import write_tokens
        from gptlib.corpus import Corpus, Piece
        from gptlib.tokenizer import Tokenizer

        def reader():
            for i in range(10**6):
                if i == 5000:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield Piece("the river " * 50)

        tokenizer = Tokenizer.load({str(tmp_path / "tokenizer.json")!r})
        folder = Path({str(tmp_path / "tokens")!r})
        write_tokens(Corpus("c", {{"train": reader}}), tokenizer, folder)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr.decode()
    with pytest.raises(TokenFileError, match="no manifest.json"):
        TokenFile.open(tmp_path / "tokens")
    write_tokens(corpus_of(train=["again"]), tokenizer, tmp_path / "tokens")
    assert len(TokenFile.open(tmp_path / "tokens").split("train")) > 2


# Damage


def test_cut_off_file(folder):
    os.truncate(folder / "train.bin", (folder / "train.bin").stat().st_size - 2)
    with pytest.raises(
        TokenFileError, match=r"train.bin: \d+ bytes where \d+ belong; delete"
    ):
        TokenFile.open(folder).split("train")


def test_missing_file(folder):
    (folder / "train.bin").unlink()
    with pytest.raises(TokenFileError, match="0 bytes where"):
        TokenFile.open(folder).split("train")


def test_every_altered_byte_is_found(folder):
    whole = (folder / "test.bin").read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        (folder / "test.bin").write_bytes(altered)
        with pytest.raises(TokenFileError, match="altered since it was written"):
            TokenFile.open(folder).split("test")
    (folder / "test.bin").write_bytes(whole)
    TokenFile.open(folder).split("test")


def test_an_altered_byte_under_an_old_time_stamp_is_found_on_demand(folder):
    path, stamp = folder / "train.bin", (folder / "train.bin").stat().st_mtime_ns
    altered = bytearray(path.read_bytes())
    altered[7] ^= 4
    path.write_bytes(altered)
    os.utime(path, ns=(stamp, stamp))
    TokenFile.open(folder).split("train")
    with pytest.raises(TokenFileError, match="SHA-256 differs"):
        TokenFile.open(folder).split("train", verify=True)


def test_a_start_does_not_hash_the_file_again(folder, monkeypatch):
    hashed = []
    real = token_files.hashlib.file_digest
    monkeypatch.setattr(
        token_files.hashlib, "file_digest", lambda *a: hashed.append(a) or real(*a)
    )
    TokenFile.open(folder).split("train")
    assert hashed == []
    os.utime(folder / "train.bin")  # as a copy to another machine does
    TokenFile.open(folder).split("train")
    TokenFile.open(folder).split("train")
    assert len(hashed) == 1, "a file proven right is proven again at each start"


def test_damaged_or_missing_manifest(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(TokenFileError, match="manifest.json is damaged"):
        TokenFile.open(folder)
    manifest.unlink()
    with pytest.raises(
        TokenFileError, match="no manifest.json there; make it with write_tokens"
    ):
        TokenFile.open(folder)


def test_other_tokenizer(folder, tokenizer):
    other = Tokenizer.from_merges(train_bpe(some_texts(200, seed=1), 299), "own-300")
    with pytest.raises(TokenFileError, match="tokenize the corpus again"):
        TokenFile.open(folder, other)
    renamed = Tokenizer("another name", tokenizer.ranks)
    assert TokenFile.open(folder, renamed).manifest["tokenizer"] == "own-300"


def test_messages_are_one_line(folder):
    os.truncate(folder / "train.bin", 2)
    with pytest.raises(TokenFileError) as caught:
        TokenFile.open(folder).split("train")
    assert "\n" not in str(caught.value)


TWO = """
import sys, time
from gptlib.tokenizer import Tokenizer
from gptlib.workshop import token_files

write = token_files.write_split


def slow(*arguments):
    print("tokenising", flush=True)
    time.sleep(0.5)
    return write(*arguments)


token_files.write_split = slow
tokens = token_files.load_tokens(sys.argv[1], Tokenizer.load(sys.argv[2]))
print(len(tokens.split("train")))
"""


def test_two_processes_tokenise_a_corpus_once(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("".join(some_texts(300)))
    tokenizer.save(tmp_path / "tokenizer.json")
    leftover = tmp_path / "runs" / "cache" / "tokens"
    arguments = [
        sys.executable,
        "-c",
        TWO,
        str(tmp_path / "text.txt"),
        str(tmp_path / "tokenizer.json"),
    ]
    env = os.environ | {"GPTLIB_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            arguments,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = [out.split() for out, _ in said]
    assert lines[0][-1] == lines[1][-1] and sorted(map(len, lines)) == [1, 4], (
        "three splits, once"
    )
    (made,) = [path for path in leftover.iterdir() if path.is_dir()]
    shutil.rmtree(made)
    (made.parent / f"{made.name}.tmp-12345").mkdir()  # what a killed writer leaves
    subprocess.run(arguments, env=env, check=True, capture_output=True, timeout=120)
    assert [path for path in leftover.iterdir() if path.is_dir()] == [made]


def test_load_tokens_makes_once_and_again_when_the_text_changes(
    tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "text.txt"
    path.write_text("the river town\n" * 100, encoding="utf-8")
    first = load_tokens(str(path), tokenizer)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    assert (
        load_tokens(str(path), tokenizer).folder / "manifest.json"
    ).stat().st_mtime_ns == stamp
    path.write_text("another town\n" * 100, encoding="utf-8")
    assert load_tokens(str(path), tokenizer).folder != first.folder
    shutil.rmtree(first.folder)
    with pytest.raises(CorpusError, match="unknown corpus"):
        load_tokens(str(tmp_path / "nowhere"), tokenizer)


def test_a_split_held_out_by_rule_stands_in_the_manifest(tmp_path, tokenizer):
    readers = {"train": lambda: (Piece(f"river {n}\n") for n in range(40))}
    corpus = Corpus("c", readers, hold_out=True)
    tokens = write_tokens(corpus, tokenizer, tmp_path / "tokens")
    assert tokens.manifest["held_out"] == "every 20th document of train"
    found = [tokenizer.decode(d[1:-1]) for d in tokens.split("validation").documents()]
    assert found == ["river 19\n", "river 39\n"]
    assert tokens.split("train").record["documents"] == 38
    few = Corpus("few", {"train": lambda: iter([Piece("one")])}, hold_out=True)
    with pytest.raises(CorpusError, match="few: 1 documents are too few"):
        write_tokens(few, tokenizer, tmp_path / "few")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


def test_manifest_says_what_the_ids_mean(folder, tokenizer):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["tokenizer_hash"] == tokenizer.hash
    assert manifest["n_vocab"] == 300 and manifest["end_of_text"] == 299
    assert set(manifest["splits"]) == {"train", "test"}
