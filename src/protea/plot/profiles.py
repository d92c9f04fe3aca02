"""Profiles along a protein: how many answers a model weighs at each residue, and how well it knows the true one.

    entropy     H = -Σ p log2 p over the letters, p made to sum to 1, in bits
    perplexity  1 / p(true residue): 1 is certainty, the number of letters a guess

The model's own p enters the perplexity, so that its geometric mean over residues is the sequence's pseudo-perplexity
where log-probabilities are of masked residues. Long proteins are points with a running mean, over its residues of the
entropy and of the logarithm of the perplexity.

Shapes: L residues, V letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError
from protea.plot import profile_figure, profile_page
from protea.plot.files import check_place, kind_of, save_figure, save_page
from protea.plot.style import BoolArray, FloatArray, check_shape, grouped

_SHORT: Final = 300
"""Residues up to which every one is seen; beyond, a running mean is drawn too."""

_MEAN_OVER: Final = 11
"""Residues, at least; a two-hundredth of the protein if that is more."""

_FEW_DECADES: Final = 2000
_DECADES: Final = 60
"""Perplexities below the one have more ticks; beyond 10 to the other have none, which no float32 softmax reaches."""

_ROUNDING: Final = 1e-4
"""By which logarithms of probabilities near 1 may exceed 0."""


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


def profile(
    path: Path, *, sequence: str, log_probabilities: FloatArray, letters: Sequence[str], title: str, offset: int = 1
) -> None:
    """Draw entropy and perplexity along a protein, one below the other.

    Args:
        path: ``.png``, ``.svg`` or ``.html``; a picture there is replaced.
        sequence: ``L`` letters; one that is none of ``letters`` has no perplexity.
        log_probabilities: ``[L, V]`` natural logarithms; a residue with NaN among them is drawn as a gap.
        letters: of the columns, in their order.
        title: as it is, at most three lines of it.
        offset: number of the first residue.

    Raises:
        UsageError: arrays do not fit each other, hold no log-probabilities, or the suffix names no kind of picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: it cannot be written.
    """
    check_place(path)
    shown = _profile(sequence, log_probabilities, letters, offset)
    if kind_of(path) == "html":
        save_page(path, profile_page.page(shown, title), title)
    else:
        save_figure(path, lambda: profile_figure.draw(shown, title), title)


def _profile(sequence: str, log_probabilities: FloatArray, letters: Sequence[str], offset: int) -> Profile:
    grouped(letters)  # for what it refuses
    length = len(sequence)
    check_shape("log_probabilities", log_probabilities, (length, len(letters)))
    logs = log_probabilities.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = np.isinf(logs) | np.asarray(logs > _ROUNDING)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(
            f"log_probabilities: {logs[row, column]:g} of {letters[column]} at residue {row + offset}; "
            "expected finite numbers of 0 or less, or NaN"
        )
    logs = np.minimum(logs, 0)
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
    over = 0 if length <= _SHORT else max(_MEAN_OVER, length // 200 * 2 + 1)
    means = [_running_mean(values, over) if over else None for values in (entropy, loss)]
    wholes = [float(np.nanmean(values)) if np.isfinite(values).any() else None for values in (entropy, loss)]
    panels = [
        Panel("entropy (bits)", entropy, means[0], wholes[0], float(np.log2(len(letters))), logarithmic=False),
        Panel(
            "perplexity of the residue",
            np.exp(loss),
            None if means[1] is None else np.exp(means[1]),
            None if wholes[1] is None else float(np.exp(wholes[1])),
            len(letters),
            logarithmic=True,
        ),
    ]
    return Profile(panels, sequence, likeliest, offset, over)


def _running_mean(values: FloatArray, over: int) -> FloatArray:
    """Mean of so many values around each, fewer at the ends; NaN where not half of them are known."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.nan_to_num(values).cumsum()))
    counts = np.concatenate(([0], known.cumsum()))
    start = np.maximum(np.arange(len(values)) - over // 2, 0)
    end = np.minimum(np.arange(len(values)) + over // 2 + 1, len(values))
    count = counts[end] - counts[start]
    mean: FloatArray = np.where(2 * count > end - start, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)
    return mean
