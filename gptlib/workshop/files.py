"""Files that are whole or absent.

Tangled from book/workshop/W1_files.md; change it there, not here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptlib import GptlibError


class FileError(GptlibError):
    """A file that cannot be written, or that another process is writing."""


class HashingFile:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_whole(path: Path, content: str | bytes | Callable[[Any], None]) -> str:
    """Write a file so that `path` is never a part of it; returns the SHA-256.

    content: text (written as UTF-8), bytes, or a function that writes to the binary
    file it is given. At every moment `path` is absent, the old file or the new one,
    also if the power fails. A write that fails leaves nothing behind.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as raw:
            file = HashingFile(raw)
            if callable(content):
                content(file)
            else:
                file.write(content)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return file.sha256.hexdigest()


def sync_folder(folder: Path) -> None:
    """Return when renames in a folder are on the disk; Windows sees to it by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writes in a folder that a kill cut short.

    Only for a process that holds the folder's lock: another one may be writing.
    """
    for path in Path(folder).glob("*.tmp-*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Context in which no other process holds the same lock file.

    The lock ends with the process, however it ends; the empty file stays. With
    `wait=False` it raises FileError, naming the process that holds the lock, and a
    folder that was made for the lock goes with it if nothing else came into it.
    """
    from filelock import FileLock, Timeout  # needed here alone

    path = Path(path)
    note = path.with_name(path.name + ".pid")
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, timeout=-1 if wait else 0).acquire()
    except Timeout:
        holder = note.read_text() if note.exists() else "unknown"
        raise FileError(
            f"{path.parent} is in use by process {holder}; wait for it, "
            "or choose another folder"
        ) from None
    except OSError as error:
        raise FileError(
            f"{path.parent} cannot be written ({error.strerror}); choose another folder"
        ) from None
    with held:
        if wait:
            yield
            return
        note.write_text(str(os.getpid()))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)
            if new and [*path.parent.iterdir()] == [path]:
                with contextlib.suppress(OSError):  # Windows keeps an open file
                    path.unlink()
                    path.parent.rmdir()


def cache_dir() -> Path:
    """Folder for what can be made again: `$GPTLIB_RUNS/cache`, else `runs/cache`."""
    path = Path(os.environ.get("GPTLIB_RUNS", "runs")) / "cache"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()
