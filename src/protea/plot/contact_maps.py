"""Contact maps: predicted probabilities, and beside them the contacts of a structure.

A map with more residues than a picture has cells is drawn in blocks: a cell shows the highest probability of its pairs,
and counts as a contact if any of its pairs is a contact. The picture says so.

Shapes: L residues, C cells along a side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot import pictures
from protea.plot.pictures import BoolArray, FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS: Final = 2400
_MOST_CELLS_PAGE: Final = 2000
_PIXELS: Final = 1200  # least number of pixels along a side of the map; every cell gets the same number
_SIDE, _LEFT, _RIGHT, _BOTTOM, _TOP = 6.0, 0.8, 1.0, 0.6, 0.38  # the map and the margins around it, in inches
_PAGE_SIDE: Final = 720  # side of the map, in pixels

_ABOVE, _CONTACT, _NONE, _UNKNOWN = range(4)
"""What a cell shows in the half of the true contacts; ``_ABOVE`` is a cell of the other half."""

_COLOURS: Final = {_CONTACT: pictures.TRUE, _NONE: "#FFFFFF", _UNKNOWN: pictures.MISSING}


class _Cells(NamedTuple):
    """What is drawn, ``[C, C]``; ``truth`` holds ``_ABOVE`` and so on; a cell's side is ``block`` residues."""

    probabilities: FloatArray
    truth: NDArray[np.int8] | None
    block: int
    first: float
    last: float

    @property
    def scale(self) -> str:
        highest = f", the highest of {self.block} by {self.block} residues" if self.block > 1 else ""
        return f"predicted probability{highest}"

    @property
    def legend(self) -> dict[str, str]:
        """Colours other than those of probabilities, by their labels."""
        if self.truth is None:
            return {"not predicted": pictures.MISSING} if np.isnan(self.probabilities).any() else {}
        reasons = []
        if np.isnan(self.probabilities[self.truth == _ABOVE]).any():
            reasons.append("not predicted")
        if (self.truth == _UNKNOWN).any():
            reasons.append("not in the structure")
        colours = {"predicted, above the diagonal": pictures.STRONG, "true contact, below": pictures.TRUE}
        return colours | ({" or ".join(reasons): pictures.MISSING} if reasons else {})


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

    ``probabilities`` are ``[L, L]``, NaN where nothing was predicted; ``truth`` is ``[L, L]``, symmetric; ``missing``
    ``[L]`` are residues that the structure lacks.
    """
    pictures.check_place(path)
    _check(probabilities, truth, missing)
    cells = _cells(probabilities, truth, missing, offset, _MOST_CELLS_PAGE if pictures.is_page(path) else _MOST_CELLS)
    pictures.save(path, title, figure=lambda: _figure(cells, title), page=lambda: _page(cells, title))


def _check(probabilities: FloatArray, truth: BoolArray | None, missing: BoolArray | None) -> None:
    length = len(probabilities)
    pictures.check_shape("probabilities", probabilities, (length, length))
    with np.errstate(invalid="ignore"):
        wrong = (probabilities < 0) | (probabilities > 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(f"probabilities: {probabilities[row, column]:g} at [{row}, {column}]; expected 0 to 1, or NaN")
    if truth is not None:
        pictures.check_shape("truth", truth, (length, length))
    if missing is not None:
        if truth is None:
            raise UsageError("missing: is given without truth; pass both")
        pictures.check_shape("missing", missing, (length,))


def _cells(
    probabilities: FloatArray, truth: BoolArray | None, missing: BoolArray | None, offset: int, most: int
) -> _Cells:
    length = len(probabilities)
    block = -(-length // most)
    starts = np.arange(0, length, block)
    # Colour maps would read whole numbers as indices into their tables.
    values = probabilities.astype(np.float32, copy=False)
    highest = np.fmax.reduceat(np.fmax.reduceat(values, starts, 0), starts, 1)
    first, last = offset - 0.5, offset + length - 0.5
    if truth is None:
        return _Cells(highest, None, block, first, last)
    contacts = np.logical_or.reduceat(np.logical_or.reduceat(truth, starts, 0), starts, 1)
    unknown = np.zeros(len(starts), bool) if missing is None else np.logical_and.reduceat(missing, starts)
    kinds = np.where(contacts, _CONTACT, _NONE)
    kinds[unknown[:, None] | unknown] = _UNKNOWN
    kinds[np.triu_indices(len(kinds))] = _ABOVE
    return _Cells(highest, kinds.astype(np.int8), block, first, last)


def _figure(cells: _Cells, title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    count, lines = len(cells.probabilities), pictures.title_lines(title, 80)
    height = _BOTTOM + _SIDE + _TOP + pictures.LINE * len(lines)
    dpi = count * -(-_PIXELS // count) / _SIDE
    figure = pictures.new_figure(lines, _LEFT + _SIDE + _RIGHT, height, left=_LEFT, dpi=dpi)
    axes = pictures.add_axes(figure, _LEFT, _BOTTOM, _SIDE, _SIDE)
    colours = colormaps[pictures.PROBABILITIES].with_extremes(bad=pictures.MISSING)
    picture = colours(cells.probabilities, bytes=True)[..., :3]
    if cells.truth is not None:
        for kind, colour in _COLOURS.items():
            picture[cells.truth == kind] = list(bytes.fromhex(colour.removeprefix("#")))
    first, last = cells.first, cells.last
    end = first + count * cells.block
    axes.imshow(picture, interpolation="none", extent=(first, end, end, first))
    axes.plot((first, last), (first, last), color=pictures.INK, linewidth=0.4)
    axes.set(xlim=(first, last), ylim=(last, first), xlabel="residue", ylabel="residue")
    for axis in (axes.xaxis, axes.yaxis):
        pictures.number_residues(axis, 8)
    scale = pictures.add_axes(figure, _LEFT + _SIDE + 0.2, _BOTTOM, 0.15, 3)
    figure.colorbar(ScalarMappable(cmap=colours), cax=scale, label=cells.scale)
    handles = [Patch(color=colour, label=label) for label, colour in cells.legend.items()]
    look: dict[str, Any] = {"ncols": 3, "borderaxespad": 0.4, "handlelength": 1, "handleheight": 1}
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), **look)
    return figure


def _page(cells: _Cells, title: str) -> dict[str, Any]:
    first, last = cells.first, cells.last
    start = first + cells.block / 2
    place = {"x0": start, "y0": start, "dx": cells.block, "dy": cells.block}
    where = "residues %{y:d} and %{x:d}"
    if cells.block > 1:
        where = f"{cells.block} by {cells.block} residues around %{{y:.0f}} and %{{x:.0f}}"
    bar = {"title": {"text": cells.scale, "side": "right"}, "len": 0.6, "y": 0, "yanchor": "bottom"}
    colours = {"colorscale": pictures.PROBABILITIES, "zmin": 0, "zmax": 1, "colorbar": bar}
    hover = {"hoverongaps": False, "hovertemplate": f"{where}<br>predicted probability %{{z:.3f}}<extra></extra>"}
    traces: list[dict[str, Any]] = [{"type": "heatmap", "z": cells.probabilities} | place | colours | hover]
    if cells.truth is not None:
        # This layer ignores the pointer, so that the prediction below it can be read for a true contact too.
        steps = ["rgba(0,0,0,0)", *_COLOURS.values()]
        scale = [[edge / 4, colour] for number, colour in enumerate(steps) for edge in (number, number + 1)]
        look = {"zmin": -0.5, "zmax": 3.5, "colorscale": scale, "showscale": False, "hoverinfo": "skip"}
        traces.append({"type": "heatmap", "z": cells.truth, **place, **look})
    traces += [pictures.page_key(label, colour) for label, colour in cells.legend.items()]
    axis = pictures.PAGE_RESIDUES | {"constrain": "domain", "showgrid": False, "mirror": True}
    layout = pictures.page_layout(title, _PAGE_SIDE, _PAGE_SIDE, left=70, right=120, above=72) | {
        "plot_bgcolor": pictures.MISSING,
        "xaxis": axis | {"range": [first, last]},
        "yaxis": axis | {"range": [last, first], "scaleanchor": "x"},
        "legend": pictures.PAGE_LEGEND,
        "shapes": [{"type": "line", "x0": first, "y0": first, "x1": last, "y1": last} | pictures.PAGE_RULE],
    }
    return {"data": traces, "layout": layout}
