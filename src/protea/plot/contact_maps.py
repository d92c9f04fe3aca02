"""Contact maps: predicted probabilities, and beside them the contacts of a structure.

A map with more residues than a picture has cells is drawn in blocks: a cell shows the highest probability of its pairs,
and counts as a contact if one of its pairs is a contact. The picture says so.

Shapes: L residues, C cells along a side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot import style
from protea.plot.picture_files import check_place, is_page, save
from protea.plot.style import BoolArray, FloatArray, check_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS: Final = 2400
_MOST_CELLS_PAGE: Final = 2000
_PIXELS: Final = 1200
"""Least number of pixels along a side of the map; every cell gets the same number."""

_SIDE, _LEFT, _RIGHT, _BOTTOM, _TOP = 6.0, 0.8, 1.0, 0.6, 0.38
"""Side of the map and the margins around it, in inches."""

_PAGE_SIDE: Final = 720
"""Side of the map on a page, in pixels."""

_ABOVE, _CONTACT, _NONE, _UNKNOWN = range(4)
"""What the half of the structure shows in a cell; above the diagonal it shows nothing."""

_COLOURS: Final = {_NONE: "#FFFFFF", _CONTACT: style.TRUE, _UNKNOWN: style.MISSING}


class _Cells(NamedTuple):
    """What is drawn, ``[C, C]``; ``truth`` holds ``_ABOVE`` and so on; a cell's side is ``block`` residues."""

    probabilities: FloatArray
    truth: NDArray[np.int8] | None
    block: int
    start: int
    length: int

    @property
    def limits(self) -> tuple[float, float]:
        return self.start - 0.5, self.start + self.length - 0.5

    @property
    def scale(self) -> str:
        highest = f", the highest of {self.block} by {self.block} residues" if self.block > 1 else ""
        return f"predicted probability{highest}"

    @property
    def legend(self) -> dict[str, str]:
        """Colours other than those of probabilities, by their labels."""
        if self.truth is None:
            return {"not predicted": style.MISSING} if np.isnan(self.probabilities).any() else {}
        colours = {"predicted, above the diagonal": style.STRONG, "true contact, below": style.TRUE}
        empty = np.isnan(self.probabilities[self.truth == _ABOVE]).any()
        reasons = ["not predicted"] * bool(empty) + ["not in the structure"] * bool((self.truth == _UNKNOWN).any())
        return colours | ({" or ".join(reasons): style.MISSING} if reasons else {})


def contact_map(
    path: Path,
    probabilities: FloatArray,
    *,
    truth: BoolArray | None = None,
    missing: BoolArray | None = None,
    title: str,
    offset: int = 1,
) -> None:
    """Draw predicted contacts above the diagonal and true ones below; without true ones, predictions on both sides.

    Args:
        path: ``.png``, ``.svg`` or ``.html``; an existing picture is replaced.
        probabilities: ``[L, L]``; NaN is drawn as not predicted.
        truth: ``[L, L]``, the pairs in contact; symmetric.
        missing: ``[L]``, residues that the structure lacks.
        title: at most three lines of it are shown.
        offset: number of the first residue.

    Raises:
        UsageError: arrays do not fit each other or are not probabilities. Other errors are those of ``check_place``.
    """
    check_place(path)
    _check(probabilities, truth, missing)
    cells = _cells(probabilities, truth, missing, offset, _MOST_CELLS_PAGE if is_page(path) else _MOST_CELLS)
    save(path, title, figure=lambda: _figure(cells, title), page=lambda: _page(cells, title))


def _check(probabilities: FloatArray, truth: BoolArray | None, missing: BoolArray | None) -> None:
    length = len(probabilities)
    check_shape("probabilities", probabilities, (length, length))
    with np.errstate(invalid="ignore"):
        wrong = (probabilities < 0) | (probabilities > 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(f"probabilities: {probabilities[row, column]:g} at [{row}, {column}]; expected 0 to 1, or NaN")
    if truth is not None:
        check_shape("truth", truth, (length, length))
    if missing is not None:
        if truth is None:
            raise UsageError("missing: is given without truth; pass both")
        check_shape("missing", missing, (length,))


def _cells(
    probabilities: FloatArray, truth: BoolArray | None, missing: BoolArray | None, offset: int, most: int
) -> _Cells:
    length = len(probabilities)
    block = -(-length // most)
    starts = np.arange(0, length, block)
    # Colour maps would read whole numbers as indices into their tables.
    values = probabilities.astype(np.float32, copy=False)
    highest = np.fmax.reduceat(np.fmax.reduceat(values, starts, 0), starts, 1)
    if truth is None:
        return _Cells(highest, None, block, offset, length)
    contacts = np.logical_or.reduceat(np.logical_or.reduceat(truth, starts, 0), starts, 1)
    unknown = np.zeros(len(starts), bool) if missing is None else np.logical_and.reduceat(missing, starts)
    kinds = np.where(contacts, _CONTACT, _NONE)
    kinds[unknown[:, None] | unknown] = _UNKNOWN
    kinds[np.triu_indices(len(kinds))] = _ABOVE
    return _Cells(highest, kinds.astype(np.int8), block, offset, length)


def _figure(cells: _Cells, title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    count, lines = len(cells.probabilities), style.title_lines(title, 80)
    height = _BOTTOM + _SIDE + _TOP + style.LINE * len(lines)
    dpi = count * -(-_PIXELS // count) / _SIDE
    figure = style.new_figure(lines, _LEFT + _SIDE + _RIGHT, height, left=_LEFT, dpi=dpi)
    axes = style.add_axes(figure, _LEFT, _BOTTOM, _SIDE, _SIDE)
    colours = colormaps[style.PROBABILITIES].with_extremes(bad=style.MISSING)
    picture = colours(cells.probabilities, bytes=True)[..., :3]
    if cells.truth is not None:
        for kind, colour in _COLOURS.items():
            picture[cells.truth == kind] = list(bytes.fromhex(colour.removeprefix("#")))
    first, last = cells.limits
    end = first + count * cells.block
    axes.imshow(picture, interpolation="none", extent=(first, end, end, first))
    axes.plot((first, last), (first, last), color=style.INK, linewidth=0.4)
    axes.set(xlim=(first, last), ylim=(last, first), xlabel="residue", ylabel="residue")
    for axis in (axes.xaxis, axes.yaxis):
        style.number_residues(axis, 8)
    scale = style.add_axes(figure, _LEFT + _SIDE + 0.2, _BOTTOM, 0.15, 3)
    figure.colorbar(ScalarMappable(cmap=colours), cax=scale, label=cells.scale)
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in cells.legend.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        borderaxespad=0.4,
        handlelength=1,
        handleheight=1,
    )
    return figure


def _page(cells: _Cells, title: str) -> dict[str, Any]:
    place = dict.fromkeys(("x0", "y0"), cells.start + (cells.block - 1) / 2) | {"dx": cells.block, "dy": cells.block}
    where = "residues %{y:d} and %{x:d}"
    if cells.block > 1:
        where = f"{cells.block} by {cells.block} residues around %{{y:.0f}} and %{{x:.0f}}"
    traces: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": cells.probabilities,
            **place,
            "hoverongaps": False,
            "colorscale": style.PROBABILITIES,
            "zmin": 0,
            "zmax": 1,
            "colorbar": {"title": {"text": cells.scale, "side": "right"}, "len": 0.6, "y": 0, "yanchor": "bottom"},
            "hovertemplate": f"{where}<br>predicted probability %{{z:.3f}}<extra></extra>",
        }
    ]
    if cells.truth is not None:
        # This layer ignores the pointer, so that the prediction below it can be read for a true contact too.
        steps = ["rgba(0,0,0,0)", *(_COLOURS[kind] for kind in (_CONTACT, _NONE, _UNKNOWN))]
        scale = [[edge / 4, colour] for number, colour in enumerate(steps) for edge in (number, number + 1)]
        look = {"zmin": -0.5, "zmax": 3.5, "colorscale": scale, "showscale": False, "hoverinfo": "skip"}
        traces.append({"type": "heatmap", "z": cells.truth, **place, **look})
    traces += [style.page_key(label, colour) for label, colour in cells.legend.items()]
    first, last = cells.limits
    axis = {"title": {"text": "residue"}, "constrain": "domain", "showgrid": False, "mirror": True}
    axis |= {"zeroline": False, "tickformat": "d"}
    layout = style.page_layout(title, _PAGE_SIDE, _PAGE_SIDE, left=70, right=120, above=72) | {
        "plot_bgcolor": style.MISSING,
        "xaxis": axis | {"range": [first, last]},
        "yaxis": axis | {"range": [last, first], "scaleanchor": "x"},
        "legend": style.PAGE_LEGEND,
        "shapes": [{"type": "line", "x0": first, "y0": first, "x1": last, "y1": last} | style.PAGE_RULE],
    }
    return {"data": traces, "layout": layout}
