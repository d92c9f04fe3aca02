"""Words for messages: counts with their noun, sizes in bytes, times, text without control characters."""

from __future__ import annotations

from reprlib import Repr
from typing import Final

_short: Final = Repr()
_short.maxstring = _short.maxother = 60


def counted(number: int, noun: str) -> str:
    """A number with its noun, as in ``1 chain`` and ``2,400 chains``; the plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bytes_text(count: int) -> str:
    """A number of bytes, as in ``3.2 MB`` and ``1.5 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def duration_text(seconds: float) -> str:
    """A time, as in ``40 seconds``, ``3.5 minutes``, ``12 hours`` and ``2,000 days``."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}s" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}s"
    return counted(max(1, round(seconds)), "second")


def printable(text: str) -> str:
    """The text in one line. Control characters, which a terminal would obey, become escapes."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def shown(value: object) -> str:
    """A value as Python writes it, in one line and shortened."""
    try:
        return printable(_short.repr(value))
    except ValueError:  # Python does not write a number of more than 4,300 digits
        return f"<{type(value).__name__} too long to write>"
