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
from typing import Final

import numpy as np

from protea.errors import UsageError
from protea.plot import profile_figure, profile_page
from protea.plot.picture_files import check_place, kind_of, save_figure, save_page
from protea.plot.profile_data import Panel, Profile
from protea.plot.style import BoolArray, FloatArray, check_shape, grouped

_SHORT: Final = 300
"""Residues up to which every one is seen; beyond, a running mean is drawn too."""

_MEAN_OVER: Final = 11
"""Residues, at least; a two-hundredth of the protein if that is more."""

_ROUNDING: Final = 1e-4
"""By which logarithms of probabilities near 1 may exceed 0."""


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
