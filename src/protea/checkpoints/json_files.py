"""JSON files in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from protea.errors import CheckpointError

CONFIG: Final = "config.json"

_MAX_TEXT: Final = 16 << 20


def read_text(path: Path) -> str:
    """A text file of at most 16 MB, far more than describes a model.

    Raises:
        OSError: the file is absent or unreadable.
        ValueError: the file is longer, or is not UTF-8.
    """
    with path.open("rb") as stream:
        data = stream.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT:,} bytes, which is far beyond what describes a model")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
