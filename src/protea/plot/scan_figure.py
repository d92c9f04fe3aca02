"""Substitutions drawn by matplotlib: every row of the protein is a panel with its own axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from protea.plot.style import EFFECTS, INK, LINE, MISSING, SCALE, title_lines, write_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from protea.plot.scan_data import ScanPicture, ScanRow

_WIDE, _NARROWEST_CELL, _BROADEST_CELL, _CELL = 9.6, 0.12, 0.3, 0.14
"""Inches: of a row, of a cell's width, and of its height."""

_LEFT, _RIGHT, _BOTTOM, _HEADER, _GAP, _NARROWEST = 0.96, 0.3, 0.35, 0.75, 0.6, 6.5
"""Inches: around all rows, for the legend, between rows, and the least width of all."""

_DPI: Final = 150
_MOST_PIXELS: Final = 60e6

_TINY: Final = 6.5
"""Points: of letters and groups, at which the broadest letter fits the narrowest cell."""


def draw(scan: ScanPicture, title: str) -> Figure:
    """The whole picture."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = list(scan.rows())
    cell = min(_BROADEST_CELL, max(_NARROWEST_CELL, _WIDE / scan.columns))
    high = _CELL * len(scan.letters)
    width = max(_NARROWEST, _LEFT + cell * scan.columns + _RIGHT)
    lines = title_lines(title, int(width * 11))
    top = 0.2 + LINE * len(lines) + _HEADER
    height = top + len(rows) * (high + _GAP) - _GAP + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=min(_DPI, int((_MOST_PIXELS / width / height) ** 0.5)))
    colours = ScalarMappable(Normalize(-scan.limit, scan.limit), colormaps[EFFECTS].with_extremes(bad=MISSING))
    for number, row in enumerate(rows):
        bottom = height - top - number * (high + _GAP) - high
        place = (_LEFT / width, bottom / height, cell * len(row.sequence) / width, high / height)
        _panel(figure, place, scan, row, colours.to_rgba(row.scores.T, bytes=True)[..., :3])
    scale = figure.add_axes((_LEFT / width, 1 - (top - 0.6) / height, 2.6 / width, 0.12 / height))
    bar = figure.colorbar(colours, cax=scale, orientation="horizontal", extend="both" if scan.clipped else "neither")
    bar.set_label(SCALE)
    _legend(figure, scan, (_LEFT + 2.9) / width, 1 - (top - 0.72) / height)
    write_title(figure, lines, _LEFT, 0.12)
    return figure


def _panel(
    figure: Figure,
    place: tuple[float, float, float, float],
    scan: ScanPicture,
    row: ScanRow,
    colours: NDArray[np.uint8],
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes(place)
    left, right, low = row.first - 0.5, row.first + len(row.sequence) - 0.5, len(scan.letters) - 0.5
    axes.imshow(colours, interpolation="none", aspect="auto", extent=(left, right, low, -0.5))
    x, y = [row.first + residue for residue, _ in row.wild], [letter for _, letter in row.wild]
    axes.plot(x, y, ".", color=INK, markersize=3.5)
    for number, letter in enumerate(row.sequence):
        axes.text(row.first + number, -0.7, letter, fontsize=_TINY, ha="center", va="bottom")
    for name, start, end in scan.groups:
        if start:
            axes.axhline(start - 0.5, color=INK, linewidth=0.5)
        axes.annotate(
            text=name,
            xy=(0, (start + end - 1) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-14, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=_TINY,
        )
    axes.set(xlim=(left, right), ylim=(low, -0.5))
    axes.set_yticks(range(len(scan.letters)), scan.letters, fontsize=_TINY, ha="center")
    axes.tick_params(axis="y", length=0, pad=6)
    axes.xaxis.set_major_locator(
        MaxNLocator(max(5, len(row.sequence) // 8), integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )


def _legend(figure: Figure, scan: ScanPicture, left: float, top: float) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker="s" if colour == MISSING else ".", linestyle="", label=label)
            for label, colour in scan.legend.items()
        ],
        loc="upper left",
        bbox_to_anchor=(left, top),
        ncols=2,
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        handlelength=1,
        handletextpad=0.4,
    )
