"""Heat maps of every substitution: residue by residue, letter by letter.

Long proteins go on in the next row, as text does. Letters stand in groups of like chemistry.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from protea.errors import UsageError
from protea.plot import scan_figure, scan_page
from protea.plot.files import check_place, kind_of, save_figure, save_page
from protea.plot.style import INK, MISSING, FloatArray, check_shape, grouped

_RESIDUES_A_ROW: Final = 80
_MOST_ROWS: Final = 40
"""Beyond these, rows are longer instead of more."""

_FEW: Final = 1000
"""Scores among which none is an outlier."""


class Row(NamedTuple):
    """A stretch of the protein.

    Attributes:
        first: number of its first residue.
        sequence: the wild type.
        scores: ``[residues, V]``.
        wild: residue and letter, from 0, of the wild type; residues that are none of the letters have no place.
    """

    first: int
    sequence: str
    scores: FloatArray
    wild: list[tuple[int, int]]


class Scan(NamedTuple):
    """What is drawn.

    Attributes:
        scores: ``[L, V]`` in the order of ``letters``; NaN where nothing was scored, 0 where the wild type was not.
        sequence: the wild type.
        letters: group by group.
        groups: name of each, its first letter and the one after its last, from 0.
        limit: the score that gets the strongest colour, above and below 0.
        offset: number of the first residue.
    """

    scores: FloatArray
    sequence: str
    letters: list[str]
    groups: list[tuple[str, int, int]]
    limit: float
    offset: int

    @property
    def columns(self) -> int:
        """Residues of a full row."""
        return min(len(self.sequence), max(_RESIDUES_A_ROW, -(-len(self.sequence) // _MOST_ROWS)))

    def rows(self) -> Iterator[Row]:
        """The protein from its beginning."""
        place = {letter: number for number, letter in enumerate(self.letters)}
        for start in range(0, len(self.sequence), self.columns):
            part = slice(start, start + self.columns)
            sequence = self.sequence[part]
            wild = [(number, place[letter]) for number, letter in enumerate(sequence) if letter in place]
            yield Row(start + self.offset, sequence, self.scores[part], wild)

    @property
    def clipped(self) -> bool:
        """Whether a score lies beyond the limit."""
        return bool((np.abs(self.scores) > self.limit).any())

    @property
    def legend(self) -> dict[str, str]:
        """What marks and colours mean beside those of scores, by label."""
        return {"wild type": INK} | ({"not scored": MISSING} if np.isnan(self.scores).any() else {})


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


def _scan(scores: FloatArray, sequence: str, letters: Sequence[str], offset: int) -> Scan:
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
    return Scan(shown, sequence, names, groups, limit or 1.0, offset)
