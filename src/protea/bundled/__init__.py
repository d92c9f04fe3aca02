"""Protea-mini, the model that comes with the package: its name, and the folder of its files.

``docs/protea-mini.md`` is its card. Beside the model are the recipe it was trained by, the manifest of its training
data, and the log of its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "protea-mini"
FOLDER: Final = Path(__file__).parent


def is_here() -> bool:
    """Whether this copy of the package holds the weights."""
    return (FOLDER / "config.json").is_file()
