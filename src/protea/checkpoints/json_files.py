"""JSON files in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from protea.checkpoints.region import Region, damaged
from protea.errors import CheckpointError

CONFIG: Final = "config.json"

_MAX_TEXT: Final = 16 << 20


def read_text(path: Path) -> str:
    """A text file of at most 16 MB, far more than describes a model."""
    region = Region.of_file(path)
    if region.size > _MAX_TEXT:
        raise CheckpointError(f"{path}: {region.size:,} bytes, far beyond what describes a model; not read")
    try:
        return region.read().decode()
    except UnicodeDecodeError as error:
        raise damaged(path, "not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
