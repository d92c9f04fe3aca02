"""Files that outlive the process: locked against other processes, replaced in one step, on the disk when it is said."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from protea.errors import OutputError


def lock(path: Path) -> TextIO:
    """Open a file that one process at a time may hold; closing it, or the process's end, unlocks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be written.
    """
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        stream.close()
        raise
    return stream


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file unless that is wanted.

    Raises:
        OutputError: it exists.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")


def unfinished(path: Path) -> Path:
    """The name that a file has while it is written; nobody's own files have such."""
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one step: a name to write it under, which becomes ``path`` if all goes well, and goes if not.

    Raises:
        OutputError: it cannot be written.
    """
    aside = unfinished(path)
    try:
        yield aside
        aside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def write_durably(path: Path, text: str) -> None:
    """Write or replace a file: whatever moment the machine stops at, it holds the old text or the new.

    Raises:
        OSError: it cannot be written.
    """
    temporary = unfinished(path)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
