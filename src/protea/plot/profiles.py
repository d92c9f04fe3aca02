"""Profiles along a protein: how uncertain a model is at each residue, and how well it predicts the true residue.

    entropy     H = -Σ p log2 p over the letters, with p scaled to sum to 1; in bits
    perplexity  1 / p(true residue): 1 is certainty, the number of letters is a guess

The perplexity uses the model's own p. If log-probabilities are of masked residues, its geometric mean over residues is
the sequence's pseudo-perplexity. A long protein is drawn as points with a running mean of the entropy and of the
logarithm of the perplexity.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot import pictures
from protea.plot.pictures import BoolArray, FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHORT: Final = 300  # the longest protein that is drawn without a running mean
_LEAST_WINDOW: Final = 11
"""Residues of the running mean; in proteins over 2,200 residues, it is a hundredth of the protein instead."""

_ROUNDING: Final = 1e-4  # how far rounding may raise the logarithm of a probability near 1 above 0
_FEW_DECADES: Final = 2000
_DECADES: Final = 60  # no float32 softmax reaches a perplexity beyond 10 to this power

_WIDTH, _PANEL, _BETWEEN, _LEFT, _RIGHT, _BOTTOM, _TOP = 10.0, 1.9, 0.45, 0.75, 0.25, 0.5, 0.42
"""Sizes of the figure, its panels and the gaps around them, in inches."""

_DPI: Final = 200
_LETTERS: Final = 100  # the longest protein whose letters fit below the upper panel
_POINTS: Final = 5000  # above this number of points, an .svg holds the points as pixels
_PAGE_WIDTH, _PAGE_PANEL, _PAGE_BETWEEN = 1000, 240, 50  # a page's panels and the gap between them, in pixels
_DOTS: Final = 2000  # above this number of residues, dots would slow the page down; only lines remain
_DASHES: Final = {"dot": (1, 2), "dash": (5, 2)}  # plotly's names of dashes, and the same dashes for matplotlib


class _Panel(NamedTuple):
    """One of the two quantities ``[L]``; NaN where it is not known.

    ``overall`` is the mean over the protein, ``guess`` the value of a model that knows nothing.
    """

    label: str
    values: FloatArray
    mean: FloatArray | None
    overall: float | None
    guess: float
    logarithmic: bool

    @property
    def guides(self) -> list[tuple[str, float, str, str]]:
        """Horizontal lines to compare with: label, value, colour and dashes."""
        lines = [(f"all letters alike: {self.guess:.2f}", self.guess, pictures.INK, "dot")]
        if self.overall is not None:
            lines.append((f"whole protein: {self.overall:.2f}", self.overall, pictures.TRUE, "dash"))
        return lines

    @property
    def limits(self) -> tuple[float, float]:
        highest = max(self.guess, float(np.nanmax(self.values, initial=0)))
        return (0.9, highest * 1.25) if self.logarithmic else (0.0, highest * 1.04 or 1.0)

    @property
    def ticks(self) -> list[float]:
        """Ticks of a logarithmic axis: 1, 2, 5, 10 and so on, or only powers of 10 if the axis is long."""
        highest = self.limits[1]
        steps = (1, 2, 5) if highest < _FEW_DECADES else (1,)
        return [step * 10.0**power for power in range(_DECADES) for step in steps if step * 10.0**power <= highest]


class _Profile(NamedTuple):
    """What is drawn; ``window`` is the number of residues of the running mean, or 0."""

    panels: list[_Panel]
    sequence: str
    likeliest: list[str]
    positions: NDArray[np.int64]
    window: int

    @property
    def limits(self) -> tuple[float, float]:
        return float(self.positions[0]) - 0.5, float(self.positions[-1]) + 0.5


def profile(
    path: Path, *, sequence: str, log_probabilities: FloatArray, letters: Sequence[str], title: str, offset: int = 1
) -> None:
    """Draw entropy and perplexity along a protein, one below the other.

    ``log_probabilities`` are ``[L, V]`` natural logarithms, a column for each of the ``letters``; a residue with NaN
    among them is drawn as a gap. A residue that is not one of the letters has no perplexity.
    """
    pictures.check_place(path)
    shown = _profile(sequence, log_probabilities, letters, offset)
    pictures.save(path, title, figure=lambda: _figure(shown, title), page=lambda: _page(shown, title))


def _profile(sequence: str, log_probabilities: FloatArray, letters: Sequence[str], offset: int) -> _Profile:
    logs = _checked(sequence, log_probabilities, letters, offset)
    length = len(sequence)
    known: BoolArray = np.asarray(np.isfinite(logs).all(axis=1))
    probabilities = np.exp(logs)
    sums = probabilities.sum(1, keepdims=True)
    entropy = -(probabilities / sums * (logs - np.log(sums))).sum(1) / np.log(2)
    columns = {letter: number for number, letter in enumerate(letters)}
    place = np.array([columns.get(letter, -1) for letter in sequence])
    loss = np.where(known & (place >= 0), -logs[np.arange(length), place], np.nan)
    best = np.nan_to_num(probabilities, nan=-1).argmax(1).tolist()
    likeliest = [
        f"{letters[column]} ({probabilities[row, column]:.2f})" if known[row] else "" for row, column in enumerate(best)
    ]
    window = 0 if length <= _SHORT else max(_LEAST_WINDOW, length // 200 * 2 + 1)
    panels = [
        _panel("entropy (bits)", entropy, window, float(np.log2(len(letters))), logarithmic=False),
        _panel("perplexity of the residue", loss, window, len(letters), logarithmic=True),
    ]
    return _Profile(panels, sequence, likeliest, np.arange(offset, offset + length), window)


def _panel(label: str, values: FloatArray, window: int, guess: float, *, logarithmic: bool) -> _Panel:
    """The panel of values or, if it is logarithmic, of their exponentials."""
    scale = np.exp if logarithmic else np.asarray
    mean = scale(_running_mean(values, window)) if window else None
    overall = float(scale(np.nanmean(values))) if np.isfinite(values).any() else None
    return _Panel(label, scale(values), mean, overall, guess, logarithmic)


def _checked(sequence: str, log_probabilities: FloatArray, letters: Sequence[str], offset: int) -> NDArray[np.float64]:
    """The log-probabilities in float64, none above 0."""
    pictures.grouped(letters)  # refuses repeated letters
    pictures.check_shape("log_probabilities", log_probabilities, (len(sequence), len(letters)))
    logs = log_probabilities.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = np.isinf(logs) | np.asarray(logs > _ROUNDING)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(
            f"log_probabilities: {logs[row, column]:g} for {letters[column]} at residue {row + offset}; "
            "expected NaN, or a finite number that is not above 0"
        )
    return np.minimum(logs, 0)


def _running_mean(values: FloatArray, window: int) -> FloatArray:
    """Mean of the ``window`` values around a residue, fewer at the ends; NaN where fewer than half are known."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.nan_to_num(values).cumsum()))
    counts = np.concatenate(([0], known.cumsum()))
    start = np.maximum(np.arange(len(values)) - window // 2, 0)
    end = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    count = counts[end] - counts[start]
    mean: FloatArray = np.where(2 * count > end - start, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)
    return mean


def _figure(shown: _Profile, title: str) -> Figure:
    lines = pictures.title_lines(title, 110)
    height = _TOP + pictures.LINE * len(lines) + 2 * _PANEL + _BETWEEN + _BOTTOM
    figure = pictures.new_figure(lines, _WIDTH, height, left=_LEFT, dpi=_DPI)
    for number, panel in enumerate(shown.panels):
        bottom = _BOTTOM + (1 - number) * (_PANEL + _BETWEEN)
        axes = pictures.add_axes(figure, _LEFT, bottom, _WIDTH - _LEFT - _RIGHT, _PANEL)
        _draw_curves(axes, shown, panel)
        axes.set(xlim=shown.limits, ylabel=panel.label)
        pictures.number_residues(axes.xaxis, 12)
        axes.spines[["top", "right"]].set_visible(False)
    upper, lower = figure.axes
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("residue")
    if len(shown.sequence) <= _LETTERS:
        units = ("data", "axes fraction")
        for position, letter in zip(shown.positions.tolist(), shown.sequence, strict=True):
            upper.annotate(letter, (position, 0), (0, -5), units, "offset points", ha="center", va="top", fontsize=6.5)
    return figure


def _draw_curves(axes: Axes, shown: _Profile, panel: _Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    if panel.mean is None:
        axes.plot(shown.positions, panel.values, ".-", color=pictures.STRONG, linewidth=0.8, markersize=4)
    else:
        pixels = len(shown.sequence) > _POINTS
        look: dict[str, Any] = {"markersize": 1.5 if pixels else 3, "markeredgewidth": 0, "rasterized": pixels}
        axes.plot(shown.positions, panel.values, ".", color=pictures.FAINT, **look)
        label = f"mean of {shown.window} residues"
        axes.plot(shown.positions, panel.mean, color=pictures.STRONG, linewidth=1, label=label)
    for label, value, colour, dashes in panel.guides:
        axes.axhline(value, color=colour, linewidth=0.8, dashes=_DASHES[dashes], label=label)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.set_yticks(panel.ticks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(panel.limits)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)


def _page(shown: _Profile, title: str) -> dict[str, Any]:
    height = 2 * _PAGE_PANEL + _PAGE_BETWEEN
    layout = pictures.page_layout(title, _PAGE_WIDTH, height, left=80, right=60, above=80) | {
        "hovermode": "x",
        "hoversubplots": "axis",
        "dragmode": "zoom",
        "xaxis": pictures.PAGE_RESIDUES | {"anchor": "y2", "range": list(shown.limits)},
    }
    traces: list[dict[str, Any]] = []
    for number, panel in enumerate(shown.panels):
        suffix = str(number + 1) if number else ""
        domain = pictures.page_domain(number, _PAGE_PANEL, _PAGE_BETWEEN, height)
        axis = {"range": list(panel.limits), "domain": domain, "title": {"text": panel.label}}
        if panel.logarithmic:
            axis["range"] = np.log10(panel.limits).tolist()
            axis |= {"type": "log", "tickvals": panel.ticks, "exponentformat": "none"}
        layout[f"yaxis{suffix}"] = axis | {"zeroline": False, "fixedrange": True}
        layout[f"legend{suffix}"] = pictures.PAGE_LEGEND | {"x": 1, "xanchor": "right", "y": domain[1]}
        traces += [trace | {"yaxis": f"y{suffix}", "legend": f"legend{suffix}"} for trace in _traces(shown, panel)]
    return {"data": traces, "layout": layout}


def _traces(shown: _Profile, panel: _Panel) -> list[dict[str, Any]]:
    text = [
        f"{pictures.markup(letter)}{position}" + (f"<br>likeliest {pictures.markup(likeliest)}" if likeliest else "")
        for letter, position, likeliest in zip(shown.sequence, shown.positions.tolist(), shown.likeliest, strict=True)
    ]
    colour, width = (pictures.STRONG, 1.5) if panel.mean is None else (pictures.FAINT, 0.7)
    values = {"x": shown.positions, "y": panel.values, "line": {"width": width, "color": colour}, "marker": {"size": 4}}
    hover = {"text": text, "hovertemplate": f"%{{text}}<br>{panel.label} %{{y:.3f}}<extra></extra>"}
    mode = "lines+markers" if len(text) <= _DOTS else "lines"
    traces: list[dict[str, Any]] = [{"type": "scatter", "mode": mode, "showlegend": False} | values | hover]
    quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    if panel.mean is not None:
        line = {"x": shown.positions, "y": panel.mean, "line": {"color": pictures.STRONG, "width": 1.5}}
        traces.append(quiet | line | {"name": f"mean of {shown.window} residues"})
    for label, value, colour, dashes in panel.guides:
        line = {"x": list(shown.limits), "y": [value, value], "line": {"color": colour, "width": 1, "dash": dashes}}
        traces.append(quiet | line | {"name": label})
    return traces
