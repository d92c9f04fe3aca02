"""The versions of PyTorch that Protea runs with. They are checked before PyTorch is imported: older ones fail there."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from protea.errors import MissingExtraError, VersionError, warn
from protea.optional import install

OLDEST: Final = (2, 11)
BELOW: Final = (3, 0)
"""The first version that nobody has tried. ``pyproject.toml`` has the same limits."""


@cache
def check_torch() -> None:
    """Refuse a PyTorch that is missing or too old, and tell of one that is too new."""
    from importlib import metadata  # takes longer than the rest of this package

    allowed = f"torch>={OLDEST[0]}.{OLDEST[1]},<{BELOW[0]}"
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(f"Protea needs PyTorch, which is not installed: {install(allowed)}") from error
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < OLDEST:
        raise VersionError(f"PyTorch {version} is too old for Protea: {install(allowed)}")
    if found >= BELOW:
        warn(f"PyTorch {version} is newer than this version of Protea knows; if something fails: {install(allowed)}")
