"""Texts in checkpoints, read with care, and new checkpoints, which appear only when complete."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from protea.errors import CheckpointError, OutputError

CONFIG: Final = "config.json"

_MAX_TEXT: Final = 16 << 20


def read_text(path: Path, limit: int = _MAX_TEXT) -> str:
    """A text, if it is no longer than those of checkpoints.

    Raises:
        OSError: the file is absent or unreadable.
        ValueError: it is longer, or no UTF-8.
    """
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes, which is far beyond what describes a model")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is absent, unreadable, or holds something else.
    """
    try:
        raw = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable JSON, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place to write a checkpoint at; it appears as ``target`` only when complete, with any files put beside it.

    Args:
        target: a file or folder that does not exist, or an empty folder.

    Raises:
        OutputError: it exists, or cannot be written; nothing is left behind.
    """
    made: list[Path] = []
    # Named before it is made: an interrupt may come between any two lines, and only what is known can be removed.
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        try:
            _refuse(target)
            made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {error.strerror}; choose another place") from error
        yield temporary / target.name
        # What goes with the target comes before it: where the target is, everything is.
        written = sorted(temporary.iterdir(), key=lambda path: path.name == target.name)
        for path in written:
            _refuse(target.parent / path.name)
        for path in written:
            if path.is_dir() and (target.parent / path.name).exists():
                (target.parent / path.name).rmdir()
            path.rename(target.parent / path.name)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # they hold something
            for folder in made:
                folder.rmdir()


def _refuse(target: Path) -> None:
    # A link, dangling or not, could not be replaced by the finished checkpoint.
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OutputError(f"{target}: exists already; remove it or choose another name")
