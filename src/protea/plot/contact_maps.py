"""Maps of contacts: how likely two residues touch, beside which do.

A protein of more residues than a picture has cells is drawn in squares of residues: a square is as likely as the
likeliest pair in it, and a contact if it holds one. The picture says so.

Shapes: L residues, C cells a side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot.picture_files import check_place, kind_of, save_figure, save_page
from protea.plot.style import (
    INK,
    LINE,
    MISSING,
    PAGE_BUTTONS,
    PAGE_LEGEND,
    PAGE_LINE,
    PAGE_RULE,
    PROBABILITIES,
    STRONG,
    TRUE,
    BoolArray,
    FloatArray,
    check_shape,
    page_key,
    page_title,
    title_lines,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS: Final = 2400
_MOST_CELLS_PAGE: Final = 2000
_PIXELS: Final = 1200
"""A side of the map has these at least, and the same number for every cell."""

_SIDE, _LEFT, _RIGHT, _BOTTOM, _TOP = 6.0, 0.8, 1.0, 0.6, 0.38
"""Inches: of the map, and around it."""

_PAGE_SIDE: Final = 720
"""Pixels of the map."""

_ABOVE, _CONTACT, _NONE, _UNKNOWN = range(4)
"""What the true half shows of a cell; above the diagonal nothing."""

_COLOURS: Final = {_NONE: "#FFFFFF", _CONTACT: TRUE, _UNKNOWN: MISSING}


class _Cells(NamedTuple):
    """What is drawn.

    Attributes:
        probabilities: ``[C, C]``, NaN where nothing was predicted.
        truth: ``[C, C]`` of ``_ABOVE`` and so on, if it is known.
        block: residues a cell and side.
        start: number of the first residue.
        length: residues.
    """

    probabilities: FloatArray
    truth: NDArray[np.int8] | None
    block: int
    start: int
    length: int


def contact_map(
    path: Path,
    probabilities: FloatArray,
    *,
    truth: BoolArray | None = None,
    missing: BoolArray | None = None,
    title: str,
    offset: int = 1,
) -> None:
    """Draw predicted contacts above the diagonal, and true ones below; without these, predicted ones on both sides.

    Args:
        path: ``.png``, ``.svg`` or ``.html``; a picture there is replaced.
        probabilities: ``[L, L]``; NaN is drawn as not predicted.
        truth: ``[L, L]``, the pairs in contact; symmetric.
        missing: ``[L]``, residues that the true structure lacks.
        title: as it is, at most three lines of it.
        offset: number of the first residue.

    Raises:
        UsageError: arrays do not fit each other, hold no probabilities, or the suffix names no kind of picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: it cannot be written.
    """
    check_place(path)
    page = kind_of(path) == "html"
    _check(probabilities, truth, missing)
    cells = _cells(probabilities, truth, missing, offset, _MOST_CELLS_PAGE if page else _MOST_CELLS)
    if page:
        save_page(path, _page(cells, title), title)
    else:
        save_figure(path, lambda: _draw(cells, title), title)


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
            raise UsageError("missing: says what true contacts lack; pass truth too")
        check_shape("missing", missing, (length,))


def _cells(
    probabilities: FloatArray, truth: BoolArray | None, missing: BoolArray | None, offset: int, most: int
) -> _Cells:
    length = len(probabilities)
    block = -(-length // most)
    starts = np.arange(0, length, block)
    # Colour maps take whole numbers for places in their tables.
    values = probabilities.astype(np.float32, copy=False)
    shown = np.fmax.reduceat(np.fmax.reduceat(values, starts, 0), starts, 1)
    if truth is None:
        return _Cells(shown, None, block, offset, length)
    contacts = np.logical_or.reduceat(np.logical_or.reduceat(truth, starts, 0), starts, 1)
    unknown = np.zeros(len(starts), bool)
    if missing is not None:
        unknown = np.logical_and.reduceat(missing, starts)
    kinds = np.where(contacts, _CONTACT, _NONE)
    kinds[unknown[:, None] | unknown] = _UNKNOWN
    kinds[np.triu_indices(len(kinds))] = _ABOVE
    return _Cells(shown, kinds.astype(np.int8), block, offset, length)


def _legend(cells: _Cells) -> dict[str, str]:
    """What colours mean beside those of probabilities, by label."""
    if cells.truth is None:
        return {"not predicted": MISSING} if np.isnan(cells.probabilities).any() else {}
    found = {"predicted, above the diagonal": STRONG, "true contact, below": TRUE}
    empty = np.isnan(cells.probabilities[cells.truth == _ABOVE]).any()
    reasons = ["not predicted"] * bool(empty) + ["not in the structure"] * bool((cells.truth == _UNKNOWN).any())
    return found | ({" or ".join(reasons): MISSING} if reasons else {})


def _scale(cells: _Cells) -> str:
    highest = f", the highest of {cells.block} by {cells.block} residues" if cells.block > 1 else ""
    return f"predicted probability{highest}"


def _draw(cells: _Cells, title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    count, lines = len(cells.probabilities), title_lines(title, 80)
    width, height = _LEFT + _SIDE + _RIGHT, _BOTTOM + _SIDE + _TOP + LINE * len(lines)
    figure = Figure(figsize=(width, height), dpi=count * -(-_PIXELS // count) / _SIDE)
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, _SIDE / width, _SIDE / height))
    colours = colormaps[PROBABILITIES].with_extremes(bad=MISSING)
    picture = colours(cells.probabilities, bytes=True)[..., :3]
    if cells.truth is not None:
        for kind, colour in _COLOURS.items():
            picture[cells.truth == kind] = list(bytes.fromhex(colour.removeprefix("#")))
    first, last = cells.start - 0.5, cells.start + cells.length - 0.5
    beyond = first + count * cells.block
    axes.imshow(picture, interpolation="none", extent=(first, beyond, beyond, first))
    axes.plot((first, last), (first, last), color=INK, linewidth=0.4)
    axes.set(xlim=(first, last), ylim=(last, first), xlabel="residue", ylabel="residue")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    scale = figure.add_axes(((_LEFT + _SIDE + 0.2) / width, _BOTTOM / height, 0.15 / width, 3 / height))
    figure.colorbar(ScalarMappable(cmap=colours), cax=scale, label=_scale(cells))
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in _legend(cells).items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        borderaxespad=0.4,
        borderpad=0,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )
    write_title(figure, lines, _LEFT, 0.12)
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
            "colorscale": PROBABILITIES,
            "zmin": 0,
            "zmax": 1,
            "colorbar": {"title": {"text": _scale(cells), "side": "right"}, "len": 0.6, "y": 0, "yanchor": "bottom"},
            "hovertemplate": f"{where}<br>predicted probability %{{z:.3f}}<extra></extra>",
        }
    ]
    if cells.truth is not None:
        # Above, and seen through where there is nothing to show: what was predicted for a true contact can be read.
        steps = ["rgba(0,0,0,0)", *(_COLOURS[kind] for kind in (_CONTACT, _NONE, _UNKNOWN))]
        scale = [[edge / 4, colour] for number, colour in enumerate(steps) for edge in (number, number + 1)]
        shown = {"zmin": -0.5, "zmax": 3.5, "colorscale": scale, "showscale": False, "hoverinfo": "skip"}
        traces.append({"type": "heatmap", "z": cells.truth, **place, **shown})
    traces += [page_key(label, colour) for label, colour in _legend(cells).items()]
    first, last = cells.start - 0.5, cells.start + cells.length - 0.5
    axis = {"title": {"text": "residue"}, "constrain": "domain", "showgrid": False, "mirror": True}
    axis |= {"zeroline": False, "tickformat": "d"}
    heading = page_title(title, _PAGE_SIDE)
    top = 50 + PAGE_LINE * heading["text"].count("<br>") + PAGE_LINE
    return {
        "data": traces,
        "layout": {
            "template": "simple_white",
            "width": _PAGE_SIDE + 190,
            "height": _PAGE_SIDE + top + 60,
            "margin": {"l": 70, "r": 120, "t": top, "b": 60},
            "title": heading,
            "plot_bgcolor": MISSING,
            "modebar": PAGE_BUTTONS,
            "xaxis": axis | {"range": [first, last]},
            "yaxis": axis | {"range": [last, first], "scaleanchor": "x"},
            "legend": PAGE_LEGEND,
            "shapes": [{"type": "line", "x0": first, "y0": first, "x1": last, "y1": last} | PAGE_RULE],
        },
    }
