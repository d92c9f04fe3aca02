"""Heat maps of every substitution: residue by residue, letter by letter.

Long proteins go on in the next row, as text does. Letters stand in groups of like chemistry.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from protea.errors import UsageError
from protea.plot import scan_figure, scan_page
from protea.plot.picture_files import check_place, kind_of, save_figure, save_page
from protea.plot.scan_data import ScanPicture
from protea.plot.style import FloatArray, check_shape, grouped

_FEW: Final = 1000
"""Scores among which none is an outlier."""


def single_site_scan(
    path: Path, scores: FloatArray, *, sequence: str, letters: Sequence[str], title: str, offset: int = 1
) -> None:
    """Draw the effects of all substitutions.

    Colours are symmetric about 0. Of more than 1,000 scores the largest hundredth share the strongest colour.

    Args:
        path: ``.png``, ``.svg`` or ``.html``; a picture there is replaced.
        scores: ``[L, V]``, negative where the model prefers the wild type; NaN is drawn as not scored.
        sequence: the wild type, ``L`` letters.
        letters: of the columns, in their order.
        title: as it is, at most three lines of it.
        offset: number of the first residue.

    Raises:
        UsageError: arrays do not fit each other, scores are infinite, or the suffix names no kind of picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: it cannot be written.
    """
    check_place(path)
    scan = _scan(scores, sequence, letters, offset)
    if kind_of(path) == "html":
        save_page(path, scan_page.page(scan, title), title)
    else:
        save_figure(path, lambda: scan_figure.draw(scan, title), title)


def _scan(scores: FloatArray, sequence: str, letters: Sequence[str], offset: int) -> ScanPicture:
    members = grouped(letters)
    check_shape("scores", scores, (len(sequence), len(letters)))
    if np.isinf(scores).any():
        row, column = np.argwhere(np.isinf(scores))[0]
        raise UsageError(f"scores: {sequence[row]}{row + offset}{letters[column]} is infinite; pass NaN if unknown")
    order = [place for _, places in members for place in places]
    names = [letters[place] for place in order]
    ends = np.cumsum([len(places) for _, places in members]).tolist()
    groups = [(name, end - len(places), end) for (name, places), end in zip(members, ends, strict=True)]
    shown = scores[:, order].astype(np.float32)
    wild = np.array(list(sequence))[:, None] == np.array(names)
    shown[wild & np.isnan(shown)] = 0
    sizes = np.abs(shown[~wild & np.isfinite(shown)])
    limit = float(np.percentile(sizes, 99 if len(sizes) > _FEW else 100)) if sizes.size else 0.0
    return ScanPicture(shown, sequence, names, groups, limit or 1.0, offset)
