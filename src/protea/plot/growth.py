"""A curve of time against the number of GPUs, both logarithmic, beside the line of perfect scaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protea.errors import UsageError
from protea.plot import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 5.0, 3.4, 0.75, 0.5, 0.3


def days_to_train(path: Path, points: Sequence[tuple[int, float]], *, title: str, gpu: str) -> None:
    """Draw days to train, ``points`` of a number of GPUs and days."""
    pictures.check_place(path)
    if not points:
        raise UsageError(f"{path}: nothing to draw; the model fits on none of these numbers of GPUs")
    counts, days = [count for count, _ in points], [value for _, value in points]
    perfect = [days[0] * counts[0] / count for count in counts]
    label = f"number of {gpu}"
    pictures.save(
        path,
        title,
        figure=lambda: _figure(counts, days, perfect, title, label),
        page=lambda: _page(counts, days, perfect, title, label),
    )


def _figure(counts: Sequence[int], days: Sequence[float], perfect: Sequence[float], title: str, label: str) -> Figure:
    from matplotlib.ticker import FuncFormatter, NullLocator

    lines = pictures.title_lines(title, 60)
    height = _TOP + pictures.LINE * len(lines) + _HEIGHT
    figure = pictures.new_figure(lines, _WIDTH, height, left=_LEFT, dpi=200)
    axes = pictures.add_axes(figure, _LEFT, _BOTTOM, _WIDTH - _LEFT - 0.2, _HEIGHT - _BOTTOM)
    axes.plot(counts, perfect, "--", color=pictures.MISSING, linewidth=1, label="perfect scaling")
    axes.plot(counts, days, "o-", color=pictures.STRONG, linewidth=1.2, markersize=4, label="estimated")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="days to train", xticks=list(counts))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _page(
    counts: Sequence[int], days: Sequence[float], perfect: Sequence[float], title: str, label: str
) -> dict[str, Any]:
    layout = pictures.page_layout(title, 720, 420, left=80, right=40, above=80)
    layout |= {
        "xaxis": {"type": "log", "title": {"text": label}, "tickvals": list(counts)},
        "yaxis": {"type": "log", "title": {"text": "days to train"}},
        "legend": pictures.PAGE_LEGEND,
    }
    shared: dict[str, Any] = {"type": "scatter", "x": list(counts)}
    dashes, line = {"color": pictures.MISSING, "dash": "dash"}, {"color": pictures.STRONG}
    return {
        "data": [
            shared | {"y": list(perfect), "mode": "lines", "name": "perfect scaling", "line": dashes},
            shared | {"y": list(days), "mode": "lines+markers", "name": "estimated", "line": line},
        ],
        "layout": layout,
    }
