"""Heat maps of every substitution: one column per residue, one row per letter.

A long protein continues in further panels, as text does in lines. Letters of like chemistry stand together.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot import pictures
from protea.plot.pictures import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCALE: Final = "log-likelihood ratio to the wild type"

_FEW: Final = 20  # up to this number of residues, no score counts as an outlier
_STRONGEST: Final = ("#67001F", "#053061")  # the ends of ``EFFECTS``
_RESIDUES_A_PANEL: Final = 80
_MOST_PANELS: Final = 40  # a protein that would need more panels gets longer ones

_WIDE, _NARROWEST_CELL, _BROADEST_CELL, _CELL = 9.6, 0.12, 0.3, 0.14
"""Width of a panel, and width and height of a cell, in inches."""

_LEFT, _RIGHT, _BOTTOM, _HEADER, _GAP, _NARROWEST = 0.96, 0.3, 0.35, 0.75, 0.6, 6.5
"""Margins, the legend's height, the gap between panels, and the least width of the figure, in inches."""

_DPI: Final = 150
_MOST_PIXELS: Final = 60e6
_TINY: Final = 6.5  # font size of letters and groups, in points; even W fits the narrowest cell

_PAGE_WIDE, _PAGE_NARROWEST_CELL, _PAGE_BROADEST_CELL, _PAGE_CELL = 1120, 14, 36, 14
"""Width of a page's panel, and width and height of a cell, in pixels."""

_PAGE_NARROWEST, _PAGE_GAP = 600, 64  # least width of the plot area and the gap between panels, in pixels
_ABOVE: Final = 1.2  # height of the sequence's letters above a page's panel, in cells


class _Panel(NamedTuple):
    """A stretch of the protein; ``wild`` holds the index of each residue's letter by the residue's number."""

    first: int
    sequence: str
    scores: FloatArray
    wild: dict[int, int]

    @property
    def limits(self) -> tuple[float, float]:
        return self.first - 0.5, self.first + len(self.sequence) - 0.5


class _Scan(NamedTuple):
    """What is drawn: scores ``[L, V]`` in the order of ``letters``, NaN where nothing was scored.

    ``groups`` have a name, the index of their first letter, and the index after their last. Scores of ``limit`` and
    beyond, above and below 0, get the strongest colour; ``sizes`` are those of all scores but the wild type's.
    """

    scores: FloatArray
    sequence: str
    letters: list[str]
    groups: list[tuple[str, int, int]]
    limit: float
    sizes: FloatArray
    offset: int

    @property
    def columns(self) -> int:
        """Residues of a full panel."""
        return min(len(self.sequence), max(_RESIDUES_A_PANEL, -(-len(self.sequence) // _MOST_PANELS)))

    def panels(self) -> Iterator[_Panel]:
        """The protein from its beginning."""
        place = {letter: number for number, letter in enumerate(self.letters)}
        for start in range(0, len(self.sequence), self.columns):
            part = slice(start, start + self.columns)
            sequence, first = self.sequence[part], start + self.offset
            wild = {number: place[letter] for number, letter in enumerate(sequence, first) if letter in place}
            yield _Panel(first, sequence, self.scores[part], wild)

    @property
    def legend(self) -> dict[str, str]:
        """Colours by their labels, besides the scale: of what has no score, and of scores beyond the scale."""
        colours = {"wild type": pictures.INK}
        if np.isnan(self.scores).any():
            colours["not scored"] = pictures.MISSING
        if beyond := int((self.sizes > self.limit).sum()):
            sign = int(self.scores[np.abs(self.scores) > self.limit].sum() > 0)
            colours[f"beyond ±{self.limit:.3g}: {beyond:,} of {self.sizes.size:,} scores"] = _STRONGEST[sign]
        return colours


def single_site_scan(
    path: Path, scores: FloatArray, *, sequence: str, letters: Sequence[str], title: str, offset: int = 1
) -> None:
    """Draw the effects of all substitutions.

    ``scores`` are ``[L, V]``, a column for each of the ``letters``, negative where the model prefers the wild type, NaN
    where nothing was scored. Colours are symmetric about 0. From 20 residues on, the largest hundredth of the scores,
    and at least as many as one residue has, share the strongest colour; the legend says beyond which score.
    """
    pictures.check_place(path)
    scan = _scan(scores, sequence, letters, offset)
    pictures.save(path, title, figure=lambda: _figure(scan, title), page=lambda: _page(scan, title))


def _scan(scores: FloatArray, sequence: str, letters: Sequence[str], offset: int) -> _Scan:
    members = pictures.grouped(letters)
    pictures.check_shape("scores", scores, (len(sequence), len(letters)))
    if np.isinf(scores).any():
        row, column = np.argwhere(np.isinf(scores))[0]
        raise UsageError(f"scores: {sequence[row]}{row + offset}{letters[column]} is infinite; pass NaN if unknown")
    order = [place for _, places in members for place in places]
    names = [letters[place] for place in order]
    ends = np.cumsum([len(places) for _, places in members]).tolist()
    groups = [(name, end - len(places), end) for (name, places), end in zip(members, ends, strict=True)]
    ordered = scores[:, order].astype(np.float32)
    wild = np.array(list(sequence))[:, None] == np.array(names)
    ordered[wild & np.isnan(ordered)] = 0
    sizes = np.sort(np.abs(ordered[~wild & np.isfinite(ordered)]))
    # One residue, such as the first methionine, may matter far more than all others.
    outliers = max(len(sizes) // 100, len(letters) - 1) if len(sizes) >= _FEW * (len(letters) - 1) else 0
    limit = float(sizes[-1 - outliers]) if sizes.size else 0.0
    return _Scan(ordered, sequence, names, groups, limit or 1.0, sizes, offset)


def _figure(scan: _Scan, title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    panels = list(scan.panels())
    cell = min(_BROADEST_CELL, max(_NARROWEST_CELL, _WIDE / scan.columns))
    panel_height = _CELL * len(scan.letters)
    width = max(_NARROWEST, _LEFT + cell * scan.columns + _RIGHT)
    lines = pictures.title_lines(title, int(width * 11))
    top = 0.2 + pictures.LINE * len(lines) + _HEADER
    height = top + len(panels) * (panel_height + _GAP) - _GAP + _BOTTOM
    dpi = min(_DPI, int((_MOST_PIXELS / width / height) ** 0.5))
    figure = pictures.new_figure(lines, width, height, left=_LEFT, dpi=dpi)
    colour_map = colormaps[pictures.EFFECTS].with_extremes(bad=pictures.MISSING)
    colours = ScalarMappable(Normalize(-scan.limit, scan.limit), colour_map)
    for number, panel in enumerate(panels):
        bottom = height - top - number * (panel_height + _GAP) - panel_height
        axes = pictures.add_axes(figure, _LEFT, bottom, cell * len(panel.sequence), panel_height)
        _draw_panel(axes, scan, panel, colours.to_rgba(panel.scores.T, bytes=True)[..., :3])
    scale = figure.add_axes((_LEFT / width, 1 - (top - 0.6) / height, 2.6 / width, 0.12 / height))
    clipped = bool((scan.sizes > scan.limit).any())
    bar = figure.colorbar(colours, cax=scale, orientation="horizontal", extend="both" if clipped else "neither")
    bar.set_label(_SCALE)
    handles = []
    for label, colour in scan.legend.items():
        marker = "." if colour == pictures.INK else "s"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=label))
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": ((_LEFT + 2.9) / width, 1 - (top - 0.72) / height)}
    figure.legend(handles=handles, ncols=2, borderaxespad=0, handlelength=1, handletextpad=0.4, **place)
    return figure


def _draw_panel(axes: Axes, scan: _Scan, panel: _Panel, colours: NDArray[np.uint8]) -> None:
    left, right = panel.limits
    low = len(scan.letters) - 0.5
    axes.imshow(colours, interpolation="none", aspect="auto", extent=(left, right, low, -0.5))
    axes.plot(list(panel.wild), list(panel.wild.values()), ".", color=pictures.INK, markersize=3.5)
    for number, letter in enumerate(panel.sequence, panel.first):
        axes.text(number, -0.7, letter, fontsize=_TINY, ha="center", va="bottom")
    for name, start, end in scan.groups:
        if start:
            axes.axhline(start - 0.5, color=pictures.INK, linewidth=0.5)
        beside, units = (0, (start + end - 1) / 2), ("axes fraction", "data")
        axes.annotate(name, beside, (-14, 0), units, "offset points", ha="right", va="center", fontsize=_TINY)
    axes.set(xlim=(left, right), ylim=(low, -0.5))
    axes.set_yticks(range(len(scan.letters)), scan.letters, fontsize=_TINY, ha="center")
    axes.tick_params(axis="y", length=0, pad=6)
    pictures.number_residues(axes.xaxis, max(5, len(panel.sequence) // 8))


def _page(scan: _Scan, title: str) -> dict[str, Any]:
    """A panel for every stretch of the protein; panels zoom separately."""
    panels = list(scan.panels())
    cell = min(_PAGE_BROADEST_CELL, max(_PAGE_NARROWEST_CELL, _PAGE_WIDE / scan.columns))
    panel_height = _PAGE_CELL * (len(scan.letters) + _ABOVE)
    width, height = max(_PAGE_NARROWEST, cell * scan.columns), len(panels) * (panel_height + _PAGE_GAP) - _PAGE_GAP
    bar: dict[str, Any] = {"title": {"text": _SCALE, "side": "right"}}
    bar |= {"lenmode": "pixels", "len": panel_height, "y": 1, "yanchor": "top"}
    layout = pictures.page_layout(title, width, height, left=120, right=140, above=80) | {
        "dragmode": "pan",
        "legend": pictures.PAGE_LEGEND | {"y": 1 + 6 / height},
        "coloraxis": {"colorscale": pictures.EFFECTS, "cmin": -scan.limit, "cmax": scan.limit, "colorbar": bar},
        "shapes": [],
        "annotations": [],
    }
    traces = [
        pictures.page_key(label, colour, mark="dot" if colour == pictures.INK else "square")
        for label, colour in scan.legend.items()
    ]
    for number, panel in enumerate(panels):
        suffix = str(number + 1) if number else ""
        x, y = f"x{suffix}", f"y{suffix}"
        traces += [trace | {"xaxis": x, "yaxis": y} for trace in _traces(scan, panel)]
        plain = {"zeroline": False, "showline": False}
        columns = {"range": list(panel.limits), "tickformat": "d", "nticks": max(10, len(panel.sequence) // 8)}
        across = [0, cell * len(panel.sequence) / width]
        layout[f"xaxis{suffix}"] = plain | columns | {"anchor": y, "domain": across}
        letters = [pictures.markup(letter) for letter in scan.letters]
        ticks = {"tickvals": list(range(len(letters))), "ticktext": letters, "tickfont": {"size": 11}, "ticks": ""}
        rows = {"range": [len(letters) - 0.5, -0.5 - _ABOVE], "fixedrange": True}
        down = pictures.page_domain(number, panel_height, _PAGE_GAP, height)
        layout[f"yaxis{suffix}"] = plain | ticks | rows | {"anchor": x, "domain": down}
        _mark_groups(scan, layout, {"xref": f"{x} domain", "yref": y})
    return {"data": traces, "layout": layout}


def _mark_groups(scan: _Scan, layout: dict[str, Any], axes: dict[str, str]) -> None:
    """Add the groups' names, lines between them, and a background that shows where nothing was scored."""
    across = axes | {"x0": 0, "x1": 1}
    box = {"type": "rect", "y0": -0.5, "y1": len(scan.letters) - 0.5, "layer": "below", "line": {"width": 0}}
    layout["shapes"].append(across | box | {"fillcolor": pictures.MISSING, "opacity": 1})
    for name, start, end in scan.groups:
        layout["shapes"].append(across | {"type": "line", "y0": start - 0.5, "y1": start - 0.5} | pictures.PAGE_RULE)
        middle = {"text": name, "x": 0, "y": (start + end - 1) / 2, "showarrow": False, "font": {"size": 11}}
        layout["annotations"].append(axes | middle | {"xanchor": "right", "xshift": -24})


def _traces(scan: _Scan, panel: _Panel) -> list[dict[str, Any]]:
    numbers = list(range(panel.first, panel.first + len(panel.sequence)))
    letters = [pictures.markup(letter) for letter in panel.sequence]
    wild = [f"{letter}{number}" for letter, number in zip(letters, numbers, strict=True)]
    names = [[f"{residue}{pictures.markup(letter)}" for residue in wild] for letter in scan.letters]
    for number, row in panel.wild.items():
        names[row][number - panel.first] = f"{wild[number - panel.first]}, wild type"
    cells = {"z": panel.scores.T, "x0": panel.first, "dx": 1, "text": names, "coloraxis": "coloraxis"}
    hover = {"hovertemplate": "%{text}<br>%{z:.3f}<extra></extra>", "hoverongaps": False}
    dots = {"x": list(panel.wild), "y": list(panel.wild.values()), "marker": {"color": pictures.INK, "size": 4}}
    labels = {"x": numbers, "y": [-0.5 - _ABOVE / 2] * len(numbers), "text": letters, "textfont": {"size": 11}}
    quiet = {"type": "scatter", "hoverinfo": "skip", "showlegend": False}
    return [
        {"type": "heatmap"} | cells | hover,
        quiet | {"mode": "markers"} | dots,
        quiet | {"mode": "text"} | labels,
    ]
