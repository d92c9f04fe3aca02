"""Profiles drawn by matplotlib: two panels, one below the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protea.plot.style import FAINT, INK, LINE, STRONG, TRUE, title_lines, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from protea.plot.profile_data import Panel, Profile

_WIDTH, _PANEL, _BETWEEN, _LEFT, _RIGHT, _BOTTOM, _TOP = 10.0, 1.9, 0.45, 0.75, 0.25, 0.5, 0.42
"""Inches: of all, of a panel, between panels and around them."""

_DPI: Final = 200

_LETTERS: Final = 100
"""Residues up to which their letters fit below the upper panel."""

_POINTS: Final = 5000
"""Points beyond which an ``.svg`` holds them as pixels."""


def draw(shown: Profile, title: str) -> Figure:
    """The whole picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = title_lines(title, 110)
    height = _TOP + LINE * len(lines) + 2 * _PANEL + _BETWEEN + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    for number, panel in enumerate(shown.panels):
        bottom = _BOTTOM + (1 - number) * (_PANEL + _BETWEEN)
        place = (_LEFT / _WIDTH, bottom / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, _PANEL / height)
        axes = figure.add_axes(place)
        _curves(axes, shown, panel)
        axes.set(xlim=shown.limits, ylabel=panel.label)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
    upper, lower = figure.axes
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("residue")
    if len(shown.sequence) <= _LETTERS:
        for position, letter in zip(shown.positions.tolist(), shown.sequence, strict=True):
            upper.annotate(
                text=letter,
                xy=(position, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=6.5,
            )
    write_title(figure, lines, _LEFT, 0.12)
    return figure


def _curves(axes: Axes, shown: Profile, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    if panel.mean is None:
        axes.plot(shown.positions, panel.values, ".-", color=STRONG, linewidth=0.8, markersize=4)
    else:
        many = len(shown.sequence) > _POINTS
        size = 1.5 if many else 3
        axes.plot(shown.positions, panel.values, ".", color=FAINT, markersize=size, markeredgewidth=0, rasterized=many)
        axes.plot(shown.positions, panel.mean, color=STRONG, linewidth=1, label=f"mean of {shown.mean_over} residues")
    for (label, value), colour, dashes in zip(panel.guides, (INK, TRUE), ((1, 2), (5, 2)), strict=False):
        axes.axhline(value, color=colour, linewidth=0.8, dashes=dashes, label=label)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.set_yticks(panel.ticks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(panel.limits)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        borderpad=0,
    )
