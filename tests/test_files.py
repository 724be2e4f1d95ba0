"""Files that are whole or absent, and locks that end with their process."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from gptlib import GptlibError
from gptlib.workshop import files
from gptlib.workshop.files import FileError, cache_dir, lock, write_whole


posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def hold(path: Path) -> None:
    with lock(path, wait=False):
        path.with_name("held").touch()
        time.sleep(60)


def child(target, *arguments):
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=arguments
    )
    process.start()
    return process


@pytest.mark.parametrize(
    "content",
    ["text\n", b"text\n", lambda file: [file.write(b"te"), file.write(b"xt\n")]],
)
def test_a_file_is_written_whole_and_hashed(tmp_path, content):
    digest = write_whole(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == b"text\n"
    assert digest == hashlib.sha256(b"text\n").hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a", "old")

    def half(file):
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "a", half)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        spy = lambda *a, name=name, real=real: (events.append(name), real(*a))[1]
        monkeypatch.setattr(files.os, name, spy)
    write_whole(tmp_path / "a", "x")
    assert events[:2] == ["fsync", "replace"]
    assert events == ["fsync", "replace", "fsync"] or os.name != "posix"


@posix
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    process = child(hold, path)
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    for _ in range(2):
        with (
            pytest.raises(GptlibError, match=f"in use by process {process.pid}"),
            lock(path, wait=False),
        ):
            pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock(path, wait=False), pytest.raises(FileError), lock(path, wait=False):
        pass
    with lock(path):
        pass


def test_the_cache_is_below_the_folder_of_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIB_RUNS", str(tmp_path / "r"))
    assert cache_dir() == (tmp_path / "r" / "cache").resolve() and cache_dir().is_dir()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            FileError, match="file cannot be written .*; choose another folder"
        ),
        lock(tmp_path / "file" / "lock"),
    ):
        pass
