"""What pictures share: colours, the order of letters, titles, and what is asked of arrays.

Colours are told apart by people who confuse red and green: ColorBrewer's Blues and RdBu, known to both libraries by
these names, and colours from Okabe and Ito's palette.
"""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]

PROBABILITIES: Final = "Blues"
EFFECTS: Final = "RdBu"
INK: Final = "#222222"
FAINT: Final = "#9ECAE1"
STRONG: Final = "#08519C"
TRUE: Final = "#D55E00"
MISSING: Final = "#B3B3B3"

GROUPS: Final = (
    ("aliphatic", "AVILM"),
    ("aromatic", "FWY"),
    ("polar", "STNQ"),
    ("positive", "KRH"),
    ("negative", "DE"),
    ("special", "CGP"),
)
"""Amino acids by chemistry, in the order in which pictures show them."""

SCALE: Final = "log-likelihood ratio to the wild type"

LINE: Final = 0.19
"""Inches of a line of the title."""

PAGE_LINE: Final = 22
"""Pixels of one."""

PAGE_BUTTONS: Final = {"orientation": "v", "remove": ["lasso2d", "select2d"]}
"""Beside the picture, where they cover no title."""

PAGE_LEGEND: Final = {
    "orientation": "h",
    "x": 0,
    "y": 1,
    "yanchor": "bottom",
    "itemclick": False,
    "itemdoubleclick": False,
}
"""Above the picture; it explains, and hides nothing when it is clicked."""

PAGE_RULE: Final = {"line": {"width": 1, "color": INK}, "opacity": 1}
"""A line across a picture."""

_TITLE_LINES: Final = 3


def grouped(letters: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The places of letters, group by group; letters of no group come last, as ``other``.

    Raises:
        UsageError: a letter comes twice, or is none.
    """
    for letter, times in Counter(letters).items():
        if len(letter) != 1 or times > 1:
            raise UsageError(f"letters: {letter!r} {'is no letter' if times == 1 else 'comes twice'}; name each once")
    place = {letter: number for number, letter in enumerate(letters)}
    found = [(name, [place.pop(letter) for letter in members if letter in place]) for name, members in GROUPS]
    found.append(("other", list(place.values())))
    return [(name, members) for name, members in found if members]


def check_shape(name: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    """See that an array fits the others.

    Raises:
        UsageError: it has another shape, or there is no residue.
    """
    if 0 in expected:
        raise UsageError(f"{name}: nothing to draw; pass one residue at least")
    if array.shape != expected:
        raise UsageError(f"{name}: shape {list(array.shape)}, expected {list(expected)}")


def printable(title: str) -> str:
    """A title in one line, what cannot be printed replaced."""
    line = " ".join(title.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def title_lines(title: str, width: int) -> list[str]:
    """A title in lines of so many letters; one too long for three of them ends in an ellipsis."""
    lines = textwrap.wrap(printable(title), width, break_on_hyphens=False)
    if len(lines) > _TITLE_LINES:
        lines[_TITLE_LINES - 1 :] = [lines[_TITLE_LINES - 1][: width - 1] + "…"]
    return lines


def markup(text: str) -> str:
    """Text that plotly, which reads markup, shows as it is."""
    return html.escape(text, quote=False)


def page_title(title: str, width: int) -> dict[str, Any]:
    """A title for plotly, above a picture of so many pixels."""
    lines = [markup(line) for line in title_lines(title, width // 9)]
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}}
    return {"text": "<br>".join(lines), "font": {"size": 16}, **place}


def page_key(label: str, colour: str, mark: str = "square") -> dict[str, Any]:
    """An entry of plotly's legend, a ``square`` or a ``dot``, that stands for no points."""
    symbol, size = ("circle", 6) if mark == "dot" else ("square", 12)
    marker = {"symbol": symbol, "color": colour, "size": size}
    return {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "marker": marker, "name": label}


def write_title(figure: Figure, lines: Sequence[str], left: float, top: float) -> None:
    """Put title lines on a drawing, inches from its corner, smaller if letters are broad."""
    width, height = figure.get_size_inches()
    text = figure.text(left / width, 1 - top / height, "\n".join(lines), fontsize=10, va="top", linespacing=1.25)
    available = (width - left - 0.1) * figure.dpi
    # Letters are rounded to pixels, so that smaller ones are not quite as much narrower.
    text.set_fontsize(10 * min(1.0, 0.95 * available / max(1.0, text.get_window_extent().width)))
