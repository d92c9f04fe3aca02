"""What all pictures share: files, colours, titles, legends, frames of pages, the order of letters, checks of arrays.

The same drawing gives the same bytes: files hold no dates and no random ids, and ignore the user's matplotlib settings.
An ``.html`` file holds all that it needs, plotly.js included, and loads nothing, unless ``share_script`` prepared its
folder. An existing picture is replaced. At most three lines of a title are shown. ``offset`` is the number of the first
residue.

People who confuse red and green can tell the colours apart: they are ColorBrewer's Blues and RdBu, which both
libraries know by these names, and colours from Okabe and Ito's palette.
"""

from __future__ import annotations

import html
import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.optional import extra
from protea.output import check_output, staged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
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

LINE: Final = 0.19  # height of a title line of a figure, in inches
PAGE_RULE: Final = {"line": {"width": 1, "color": INK}, "opacity": 1}  # a line across a page's plot
_NO_CLICKS: Final = {"itemclick": False, "itemdoubleclick": False}
PAGE_LEGEND: Final = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"} | _NO_CLICKS  # above the plot
PAGE_RESIDUES: Final = {"title": {"text": "residue"}, "tickformat": "d", "zeroline": False}  # an axis of residues

SCRIPT: Final = "plotly.min.js"  # the name that plotly gives it

_PAGE_LINE: Final = 22  # height of a title line of a page, in pixels
_PAGE_BELOW: Final = 60
_TITLE_LINES: Final = 3
_TITLE_SIZE: Final = 10
_TITLE_TOP: Final = 0.12
_KINDS: Final = (".png", ".svg", ".html")

_SETTINGS: Final[Any] = {
    "svg.hashsalt": "protea",
    "svg.fonttype": "none",  # text stays text, so that it can be found, copied and edited
    "text.parse_math": False,  # two $ in a name are not a formula
    "font.size": 8,
    "legend.borderpad": 0,
    "legend.frameon": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
}

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
</head>
<body style="margin:8px">
{picture}
</body>
</html>
"""


def is_page(path: Path) -> bool:
    """Whether the suffix asks for a page; otherwise it asks for a figure, or is refused."""
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: this suffix is not that of a picture; use {', '.join(_KINDS)}")
    return path.suffix == ".html"


def check_place(path: Path) -> None:
    """Refuse a picture that cannot be made or written, before its content is computed."""
    _check_library(f"{path}: drawing it", page=is_page(path))
    check_output(path, overwrite=True)


def check_kind(suffix: str, folder: Path) -> None:
    """Refuse pictures of a kind in a folder, if their library is not installed."""
    _check_library(f"{folder}: drawing {suffix} pictures", page=suffix == ".html")


def _check_library(drawing: str, *, page: bool) -> None:
    library = "plotly.graph_objects" if page else "matplotlib.figure"
    with extra("plot", f"{drawing} needs {library.partition('.')[0]}"):
        import_module(library)


def save(path: Path, title: str, *, figure: Callable[[], Figure], page: Callable[[], dict[str, Any]]) -> None:
    """Write a picture, in one step; ``page`` describes a plotly figure by ``data`` and ``layout``.

    The title also names the window of a page, and describes an ``.svg`` to people who cannot see it.
    """
    content = (
        _page_bytes(page(), title, path.parent) if is_page(path) else _figure_bytes(figure, path.suffix[1:], title)
    )
    with staged(path, overwrite=True) as aside:
        aside.write_bytes(content)


def _figure_bytes(draw: Callable[[], Figure], kind: str, title: str) -> bytes:
    import matplotlib

    metadata: dict[str, str | None] = {"Software": None}
    if kind == "svg":
        metadata = {"Creator": None, "Date": None, "Title": clean_title(title)}
    stream = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks becomes a box in a .png and stays itself in an .svg.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        draw().savefig(stream, format=kind, dpi="figure", metadata=metadata)
    return stream.getvalue()


def share_script(folder: Path) -> None:
    """Write plotly.js into a folder; pages drawn there from now on refer to this file instead of holding a copy.

    A file of that name stays: pages refer to it if it is the installed plotly's, and else hold their own copy.
    """
    if (folder / SCRIPT).exists():
        return
    with extra("plot", f"{folder}: drawing pages needs plotly"):
        from plotly.offline import get_plotlyjs
    with staged(folder / SCRIPT) as aside:
        aside.write_text(get_plotlyjs(), encoding="utf-8")


def _page_bytes(described: dict[str, Any], title: str, folder: Path) -> bytes:
    import plotly.graph_objects
    import plotly.io
    from plotly.offline import get_plotlyjs

    script = folder / SCRIPT
    # A script of another version might not draw this page.
    shared = script.is_file() and script.read_bytes() == get_plotlyjs().encode()
    picture = plotly.io.to_html(
        plotly.graph_objects.Figure(described),
        config={"displaylogo": False, "responsive": False},
        include_plotlyjs="directory" if shared else True,
        include_mathjax=False,
        full_html=False,
        div_id="picture",
    )
    return _PAGE.format(title=html.escape(clean_title(title)), picture=picture).encode()


def grouped(letters: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The indices of letters by group; letters outside the groups come last, as ``other``."""
    for letter, times in Counter(letters).items():
        if len(letter) != 1 or times > 1:
            raise UsageError(f"letters: {letter!r} {'is not one letter' if times == 1 else 'is repeated'}")
    place = {letter: number for number, letter in enumerate(letters)}
    groups = [(name, [place.pop(letter) for letter in members if letter in place]) for name, members in GROUPS]
    groups.append(("other", list(place.values())))
    return [(name, members) for name, members in groups if members]


def check_shape(name: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    """Refuse an empty array, or an array of another shape than expected."""
    if 0 in expected:
        raise UsageError(f"{name}: nothing to draw; pass at least one residue")
    if array.shape != expected:
        raise UsageError(f"{name}: shape {list(array.shape)}, expected {list(expected)}")


def clean_title(title: str) -> str:
    """The title in one line; a replacement character stands for each character that cannot be printed."""
    line = " ".join(title.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def title_lines(title: str, width: int) -> list[str]:
    """The title in lines of at most ``width`` letters; a title of more than three lines ends in an ellipsis."""
    lines = textwrap.wrap(clean_title(title), width, break_on_hyphens=False)
    if len(lines) > _TITLE_LINES:
        lines[_TITLE_LINES - 1 :] = [lines[_TITLE_LINES - 1][: width - 1] + "…"]
    return lines


def new_figure(lines: Sequence[str], width: float, height: float, *, left: float, dpi: float) -> Figure:
    """A figure with a title, sizes in inches; the title gets smaller letters if it would not fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi)
    title = figure.text(
        left / width, 1 - _TITLE_TOP / height, "\n".join(lines), fontsize=_TITLE_SIZE, va="top", linespacing=1.25
    )
    # Letter widths are rounded to pixels, so a smaller font does not shrink the text quite in proportion.
    available = 0.95 * (width - left - 0.1) * dpi
    title.set_fontsize(_TITLE_SIZE * min(1.0, available / max(1.0, title.get_window_extent().width)))
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place that is given in inches."""
    full_width, full_height = figure.get_size_inches()
    return figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))


def number_residues(axis: Axis, most: int) -> None:
    """Label an axis of residues at round numbers, ``most`` of them or a few more."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def markup(text: str) -> str:
    """Text escaped for plotly, which reads markup."""
    return html.escape(text, quote=False)


def page_layout(title: str, width: float, height: float, *, left: int, right: int, above: int) -> dict[str, Any]:
    """The frame of a page, in pixels around the plot area; ``above`` holds the legend and one line of the title."""
    lines = [markup(line) for line in title_lines(title, int(width) // 9)]
    top = above + _PAGE_LINE * max(0, len(lines) - 1)
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}}
    return {
        "template": "simple_white",
        "width": width + left + right,
        "height": height + top + _PAGE_BELOW,
        "title": {"text": "<br>".join(lines), "font": {"size": 16}, **place},
        "margin": {"l": left, "r": right, "t": top, "b": _PAGE_BELOW},
        # Vertical buttons stay beside the picture; horizontal ones would cover the title.
        "modebar": {"orientation": "v", "remove": ["lasso2d", "select2d"]},
    }


def page_key(label: str, colour: str, mark: str = "square") -> dict[str, Any]:
    """A legend entry of a page, with a ``square`` or a ``dot``; plotly makes it from a trace without points."""
    symbol, size = ("circle", 6) if mark == "dot" else ("square", 12)
    marker = {"symbol": symbol, "color": colour, "size": size}
    return {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "marker": marker, "name": label}


def page_domain(number: int, panel: float, gap: float, height: float) -> list[float]:
    """Bottom and top of a page's panel, counted from above, as shares of the height of all panels."""
    top = 1 - number * (panel + gap) / height
    return [max(0.0, top - panel / height), top]
