"""Corpora: documents, splits, and one clear line for whatever cannot be had."""

import json
import os
import socket
import subprocess
import sys

import pytest

from gptlib import GptlibError
from gptlib.corpus import (
    Corpus,
    CorpusError,
    Piece,
    documents_of_rows,
    has_network,
    load_corpus,
    text_file,
)


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


@pytest.mark.parametrize("size", [30, 100, 5000])
def test_text_file_loses_nothing(tmp_path, size):
    text = "".join(f"line {i} é €\n" for i in range(size))
    path = tmp_path / "file.txt"
    path.write_text(text, encoding="utf-8")
    corpus = text_file(path)
    assert "".join("".join(corpus.documents(s)) for s in corpus.splits) == text


def test_a_text_file_is_cut_in_90_5_and_5_per_cent(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("a line of it\n" * 1000, encoding="utf-8")
    corpus = text_file(path)
    lines = {s: sum(p.lines for p in corpus.pieces(s)) for s in corpus.splits}
    assert lines == pytest.approx({"train": 900, "validation": 50, "test": 50}, abs=1)


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
    with pytest.raises(CorpusError, match=r"bad.txt: byte 504 \(0xff\).*iconv"):
        for split in text_file(path).splits:
            list(text_file(path).pieces(split))


def test_unknown_names():
    with pytest.raises(CorpusError, match="unknown corpus 'wikitext'.*tinywiki"):
        load_corpus("wikitext")
    with pytest.raises(
        CorpusError, match="no split 'dev'; it has train, validation, test"
    ):
        load_corpus("tinywiki").pieces("dev")


def run_offline(tmp_path, code: str, **environment) -> str:
    """What code prints where each connection is refused at once."""
    refuse = (
        "import socket\n"
        "tried = []\n"
        "def refuse(address, *a, **k): tried.append(address); raise OSError\n"
        "socket.create_connection = refuse\n"
        "socket.socket.connect = lambda self, address: refuse(address)\n"
        "import gptlib.corpus as c\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env.pop("HF_HUB_OFFLINE", None)
    env |= {"HF_HOME": str(tmp_path), "GPTLIB_RUNS": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", refuse + code],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


HUB = """
try: list(c.load_corpus('wikitext-103').pieces('train'))
except c.CorpusError as e: print(e)
print(tried)
"""


def test_hub_without_network_asks_once_and_names_the_cure(tmp_path):
    said, tried = run_offline(tmp_path, HUB).splitlines()
    assert said.startswith("wikitext-103: the Hugging Face hub cannot be reached")
    assert "HF_HUB_OFFLINE=1" in said and "GPTLIB_DATA" in said and "tinywiki" in said
    assert tried == "[('huggingface.co', 443)]"


def test_hub_is_looked_for_behind_the_proxy_and_under_its_other_name(tmp_path):
    proxy = run_offline(
        tmp_path, HUB, HTTPS_PROXY="http://proxy.test:3128"
    ).splitlines()
    assert proxy[1] == "[('proxy.test', 3128)]"
    mirror = run_offline(tmp_path, HUB, HF_ENDPOINT="https://mirror.test").splitlines()
    assert mirror[1] == "[('mirror.test', 443)]"


def test_offline_by_request_uses_the_cache_only(tmp_path):
    code = HUB + "import datasets, huggingface_hub\n"
    said = run_offline(tmp_path, code, HF_HUB_OFFLINE="1").splitlines()
    assert "`datasets` cannot read it" in said[0] and said[1] == "[]"


def test_looking_for_the_network_changes_no_other_library(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*_):
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not has_network()
    with pytest.raises(CorpusError, match="cannot be reached"):
        list(load_corpus("wikitext-2").splits)
    assert before == constants.HF_HUB_OFFLINE


def write_dataset(folder, rows, splits=("train", "validation")):
    folder.mkdir(exist_ok=True)
    for split in splits:
        with (folder / f"{split}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_folder_without_a_text_column(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    write_dataset(tmp_path / "data", [{"body": "x"}])
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(load_corpus(str(tmp_path / "data")).pieces("train"))


def test_empty_folder(tmp_path):
    with pytest.raises(CorpusError, match="is empty; give a dataset folder or a file"):
        load_corpus(str(tmp_path))


def test_folder_with_titles_and_a_rewritten_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
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


def test_a_missing_validation_split_is_held_out_and_announced(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    rows = [
        {"title": str(n // 2), "text": f"part {n}"} for n in range(90)
    ]  # 45 documents
    write_dataset(tmp_path / "data", rows, ["train"])
    corpus = load_corpus(str(tmp_path / "data"))
    assert corpus.splits == ("train", "validation")
    assert corpus.held_out == "every 20th document of train"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no validation split; every 20th document" in said
    held_out = list(corpus.documents("validation"))
    assert held_out == ["part 38\npart 39", "part 78\npart 79"]
    train = list(corpus.documents("train"))
    assert len(train) == 43 and not set(train) & set(held_out)
    write_dataset(tmp_path / "data", rows[:10], ["train"])
    few = load_corpus(str(tmp_path / "data"))
    with pytest.raises(
        CorpusError, match="5 documents are too few.*add a validation file"
    ):
        list(few.pieces("validation"))


def test_a_validation_split_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    write_dataset(tmp_path / "data", [{"text": f"story {n}"} for n in range(30)])
    corpus = load_corpus(str(tmp_path / "data"))
    assert len(list(corpus.documents("train"))) == 30 and corpus.held_out is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "one line\n", "no line end " * 500, "a\nb\n"])
def test_a_file_too_short_to_be_cut(tmp_path, text):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(
        GptlibError, match=r"short.txt: \d+ bytes in too few lines"
    ) as caught:
        load_corpus(str(tmp_path / "short.txt"))
    assert "\n" not in str(caught.value) and "add text" in str(caught.value)


@pytest.mark.parametrize("name", ["C:\\text.txt", "notes:today.txt", "a.b:c.d:e"])
def test_a_colon_in_a_path_is_a_part_of_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try:
        (tmp_path / name).write_text("a line of text\n" * 50)
    except OSError:
        pytest.skip("this system allows no colon in a file name")
    corpus = load_corpus(name)
    assert sum(p.lines for s in corpus.splits for p in corpus.pieces(s)) == 50


def test_a_configuration_follows_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "runs"))
    asked = []
    monkeypatch.setattr(
        "gptlib.corpus.read_dataset",
        lambda *a: asked.append(a) or {"train": lambda: iter([]), "validation": list},
    )
    (tmp_path / "C:" / "set").mkdir(parents=True)
    (tmp_path / "C:" / "set" / "train.jsonl").write_text("{}")
    assert load_corpus("C:/set:raw-v1").splits == ("train", "validation")
    assert asked[0][:3] == ("C:/set:raw-v1", str(tmp_path / "C:" / "set"), "raw-v1")


def test_keys_tell_texts_apart(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one line\n" * 50)
    first = load_corpus(str(path)).key
    assert load_corpus(str(path)).key == first and first.startswith("text-txt-")
    path.write_text("two lines\n" * 45)  # as many bytes
    os.utime(path, (1, 1))
    assert path.stat().st_size == 450 and load_corpus(str(path)).key != first
    assert load_corpus("tinywiki").key != load_corpus("wikitext-2").key


def test_nothing_is_opened_before_text_is_asked_for():
    corpus = Corpus("late", lambda: {"train": lambda: iter([Piece("text")])})
    assert "_readers" not in vars(corpus)
    assert list(corpus.documents("train")) == ["text"] and corpus.splits == ("train",)
