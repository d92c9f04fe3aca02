"""What a heat map of every substitution shows, whatever draws it.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from protea.plot.style import INK, MISSING, FloatArray

_RESIDUES_A_ROW: Final = 80
_MOST_ROWS: Final = 40
"""Beyond these, rows are longer instead of more."""


class ScanRow(NamedTuple):
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


class ScanPicture(NamedTuple):
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

    def rows(self) -> Iterator[ScanRow]:
        """The protein from its beginning."""
        place = {letter: number for number, letter in enumerate(self.letters)}
        for start in range(0, len(self.sequence), self.columns):
            part = slice(start, start + self.columns)
            sequence = self.sequence[part]
            wild = [(number, place[letter]) for number, letter in enumerate(sequence) if letter in place]
            yield ScanRow(start + self.offset, sequence, self.scores[part], wild)

    @property
    def clipped(self) -> bool:
        """Whether a score lies beyond the limit."""
        return bool((np.abs(self.scores) > self.limit).any())

    @property
    def legend(self) -> dict[str, str]:
        """What marks and colours mean beside those of scores, by label."""
        return {"wild type": INK} | ({"not scored": MISSING} if np.isnan(self.scores).any() else {})
