"""Corpora: documents, splits, and one clear line for whatever cannot be had."""

import os
import subprocess
import sys
import time

import pytest

from gptlib.corpus import CorpusError, documents_of_rows, load_corpus, text_file

REAL = os.environ.get("GPTLIB_DATA")
needs_data = pytest.mark.skipif(
    not REAL, reason="real data: set GPTLIB_DATA to ../shared/data"
)


def test_titles_only_after_blank_rows():
    rows = [
        "",
        " = A = \n",
        "",
        " text \n",
        " = not a title = \n",
        "",
        " = B = \n",
        " b \n",
    ]
    assert [p.text.count("=") for p in documents_of_rows(iter(rows))] == [4, 2]


def test_sections_do_not_cut():
    rows = ["", " = A = \n", "", " = = Section = = \n", "", " text \n"]
    assert len(list(documents_of_rows(iter(rows)))) == 1


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_text_file_loses_nothing(tmp_path, size):
    text = "".join(f"line {i} é €\n" for i in range(size))
    path = tmp_path / "file.txt"
    path.write_text(text, encoding="utf-8")
    corpus = text_file(path)
    assert "".join("".join(corpus.documents(s)) for s in corpus.splits) == text


def test_text_file_in_blocks(tmp_path, monkeypatch):
    import gptlib.corpus

    monkeypatch.setattr(gptlib.corpus, "MAX_PIECE", 64)
    path = tmp_path / "file.txt"
    path.write_text("".join(f"line {i} ü\n" for i in range(500)), encoding="utf-8")
    pieces = list(text_file(path).pieces("train"))
    assert len(pieces) > 10 and [p.starts for p in pieces] == [True] + [False] * (
        len(pieces) - 1
    )


def test_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good line\n" * 50 + b"bad \xff line\n")
    with pytest.raises(CorpusError, match=r"byte 504 \(0xff\).*iconv"):
        for split in text_file(path).splits:
            list(text_file(path).pieces(split))


def test_unknown_names():
    with pytest.raises(CorpusError, match="unknown corpus 'wikitext'.*tinywiki"):
        load_corpus("wikitext")
    with pytest.raises(
        CorpusError, match="no split 'dev'; it has train, validation, test"
    ):
        load_corpus("tinywiki").pieces("dev")


def test_hub_without_network_is_quick_and_names_the_cure(tmp_path):
    code = (
        "import socket, gptlib.corpus as c\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.create_connection = refuse; socket.socket.connect = refuse\n"
        "try: c.load_corpus('wikitext-103')\n"
        "except c.CorpusError as e: print(e)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_HOME": str(tmp_path), "GPTLIB_RUNS": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=120,
    )
    assert "tinywiki" in done.stdout and "HF_HOME" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert (
        time.monotonic() - began < 60
    )  # generous for a busy machine; alone it takes a few seconds


def write_dataset(folder, rows):
    import json

    for split in ("train", "validation"):
        with (folder / f"{split}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_folder_without_a_text_column(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", [{"body": "x"}])
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(load_corpus(str(tmp_path / "data")).pieces("train"))


def test_folder_with_titles_and_a_rewritten_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "data").mkdir()
    write_dataset(
        tmp_path / "data",
        [
            {"title": "a", "text": "one"},
            {"title": "a", "text": "two"},
            {"title": "b", "text": "three"},
        ],
    )
    assert list(load_corpus(str(tmp_path / "data")).documents("train")) == [
        "one\ntwo",
        "three",
    ]
    write_dataset(tmp_path / "data", [{"title": "c", "text": "other text"}])
    assert list(load_corpus(str(tmp_path / "data")).documents("train")) == [
        "other text"
    ]


@needs_data
def test_real_wikitext_validation_has_sixty_articles():
    corpus = load_corpus("wikitext-sample:wikitext-103-raw-v1")
    pieces = list(corpus.pieces("validation"))
    assert len(pieces) == 60
    assert sum(p.lines for p in pieces) == 3760
    assert sum(len(p.text.split()) for p in pieces) == 213_886
