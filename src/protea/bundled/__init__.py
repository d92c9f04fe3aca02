"""Protea-mini, the model that runs if the user names none: its name and the folder of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "protea-mini"
FOLDER: Final = Path(__file__).parent
