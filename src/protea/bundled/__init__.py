"""Protea-mini, the model that runs where none is named: its name, and the folder of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "protea-mini"
FOLDER: Final = Path(__file__).parent
