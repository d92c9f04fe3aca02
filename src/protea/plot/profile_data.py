"""What a profile along a protein shows, whatever draws it.

Shapes: L residues.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.plot.style import FloatArray

_FEW_DECADES: Final = 2000
_DECADES: Final = 60
"""Perplexities below the one have more ticks; beyond 10 to the other have none, which no float32 softmax reaches."""


class Panel(NamedTuple):
    """One of the two quantities; NaN where it is not known.

    Attributes:
        label: of its axis.
        values: ``[L]``.
        mean: ``[L]``, the running mean of a long protein.
        whole: of the protein, if anything is known.
        guess: what knowing nothing comes to.
        logarithmic: whether its axis is.
    """

    label: str
    values: FloatArray
    mean: FloatArray | None
    whole: float | None
    guess: float
    logarithmic: bool

    @property
    def guides(self) -> list[tuple[str, float]]:
        """Lines to compare with, and what they are."""
        whole = [] if self.whole is None else [(f"whole protein: {self.whole:.2f}", self.whole)]
        return [(f"all letters alike: {self.guess:.2f}", self.guess), *whole]

    @property
    def limits(self) -> tuple[float, float]:
        """Of the axis: what can be, and beyond it what is."""
        highest = max(self.guess, float(np.nanmax(self.values, initial=0)))
        return (0.9, highest * 1.25) if self.logarithmic else (0.0, highest * 1.04 or 1.0)

    @property
    def ticks(self) -> list[float]:
        """Of a logarithmic axis: 1, 2, 5 and so on, or powers of 10 alone where there are many."""
        highest = self.limits[1]
        steps = (1, 2, 5) if highest < _FEW_DECADES else (1,)
        return [step * 10.0**power for power in range(_DECADES) for step in steps if step * 10.0**power <= highest]


class Profile(NamedTuple):
    """What is drawn.

    Attributes:
        panels: from above.
        sequence: as it is.
        likeliest: letter and probability of each residue, if known.
        offset: number of the first residue.
        mean_over: residues of the running mean, an odd number; 0 if there is none.
    """

    panels: list[Panel]
    sequence: str
    likeliest: list[str]
    offset: int
    mean_over: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """``[L]`` numbers of the residues."""
        return np.arange(self.offset, self.offset + len(self.sequence))

    @property
    def limits(self) -> tuple[float, float]:
        """Of the axis of residues."""
        return self.offset - 0.5, self.offset + len(self.sequence) - 0.5
