"""Numbers that depend on the order of scores alone, for rows that may count several times.

A bootstrap draws rows again and again. ``Ranking`` sorts them once; each resample only says how often a row was drawn
(``counts``). A number from counts is the number from a table in which rows are repeated that often.

Rows with equal scores have no order. Where one would matter, the mean over all their orders counts, as in
scikit-learn; sorting would choose by chance.

Shapes: R rows, T distinct scores.
"""

from __future__ import annotations

from functools import cached_property
from math import nan

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Ranking:
    """At least one row, sorted by falling ``scores`` ``[R]``; all ``counts`` ``[R]`` are whole numbers from 0 up."""

    def __init__(self, scores: Floats) -> None:
        self._order = np.argsort(-scores, kind="stable")
        falling = scores[self._order]
        self._last = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)  # of each run of ties
        self._values = falling[self._last]

    @cached_property
    def _run(self) -> NDArray[np.int64]:
        """``[R]``: which of the T distinct scores a row has, from the highest."""
        runs = np.empty(len(self._order), np.int64)
        runs[self._order] = np.repeat(np.arange(len(self._last)), np.diff(self._last, prepend=-1))
        return runs

    def above(self, counts: Floats) -> Floats:
        """``[T + 1]``: the sum of ``counts`` over the rows of the 0, 1, ... highest scores."""
        sums: Floats = np.append(0.0, np.cumsum(counts[self._order])[self._last])
        return sums

    def ranks(self, counts: Floats) -> Floats:
        """``[R]``: ranks from the highest score, which has 1; equal scores share the mean of their ranks."""
        above = self.above(counts)
        ranks: Floats = ((above[:-1] + above[1:] + 1) / 2)[self._run]
        return ranks

    def areas(self, counts: Floats, positive: NDArray[np.bool_]) -> tuple[float, float]:
        """AUROC and AUPRC for the rows that are ``positive``; NaN if all rows, or none, are.

        AUROC is the area under the ROC curve: the share of pairs of a positive and a negative row in which the positive
        one has the higher score; equal scores count half (Hanley and McNeil 1982). AUPRC is the average precision, the
        mean precision at the positive rows, not an interpolated area (scikit-learn's ``average_precision_score``).
        """
        hits, taken = self.above(counts * positive), self.above(counts)
        positives, negatives = hits[-1], taken[-1] - hits[-1]
        if not positives or not negatives:
            return nan, nan
        gained = np.diff(hits)
        misses = taken - hits
        auroc = gained @ (negatives - (misses[1:] + misses[:-1]) / 2) / (positives * negatives)
        return float(auroc), float(gained @ (hits[1:] / np.maximum(taken[1:], 1)) / positives)

    def gain(self, counts: Floats, gains: Floats, top: int) -> float:
        """Discounted cumulative gain of the ``top`` rows: the sum of gain / log2(1 + rank)."""
        discounts = np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, top + 2))))
        above = self.above(counts)
        means = np.diff(self.above(counts * gains)) / np.maximum(np.diff(above), 1)
        return float(means @ np.diff(discounts[np.minimum(above, top).astype(np.int64)]))

    def hits(self, counts: Floats, wanted: NDArray[np.bool_], top: float) -> float:
        """How many of the ``top`` rows are ``wanted``: the mean over all orders of rows with equal scores."""
        above = self.above(counts)
        shares = np.diff(self.above(counts * wanted)) / np.maximum(np.diff(above), 1)
        return float(shares @ np.diff(np.minimum(above, top)))

    def best(self, counts: Floats, percent: float) -> NDArray[np.bool_]:
        """``[R]``: scores from the percentile ``100 - percent`` up, interpolated as in ``np.percentile``."""
        above = self.above(counts)
        place = (1 - percent / 100) * (above[-1] - 1)  # counted from the lowest row
        below = int(place)
        low, high = (
            self._values[np.searchsorted(above[1:], max(above[-1] - 1 - row, 0), side="right")]
            for row in (below, below + 1)
        )
        threshold = min(low + (place - below) * (high - low), high)
        found: NDArray[np.bool_] = (self._values >= threshold)[self._run]
        return found


def constant(values: Floats, counts: Floats) -> bool:
    """Whether the rows that count are fewer than two, or all have the same value."""
    present = values[counts > 0]
    return bool(counts.sum() < 2 or present.min() == present.max())


def pearson(x: Floats, y: Floats, counts: Floats) -> float:
    """Pearson's correlation of two columns ``[R]``; NaN if one is constant."""
    if constant(x, counts) or constant(y, counts):
        return nan
    columns = []
    for values in (x, y):
        centred = values - counts @ values / counts.sum()
        columns.append(centred / np.abs(centred[counts > 0]).max())
    x, y = columns
    return float(np.clip(counts @ (x * y) / np.sqrt((counts @ x**2) * (counts @ y**2)), -1, 1))


class RankAgreement:
    """How well the order of predicted values is that of measured ones ``[R]``.

    All numbers are NaN if one of the two is constant.
    """

    def __init__(self, predicted: Floats, measured: Floats) -> None:
        self._predicted, self._measured = predicted, measured

    @cached_property
    def _rankings(self) -> tuple[Ranking, Ranking]:
        return Ranking(self._predicted), Ranking(self._measured)

    def _defined(self, counts: Floats) -> bool:
        return not (constant(self._predicted, counts) or constant(self._measured, counts))

    def spearman(self, counts: Floats) -> float:
        """Spearman's rank correlation: Pearson's correlation of the ranks; equal values share their mean rank."""
        if not self._defined(counts):
            return nan
        predicted, measured = self._rankings
        return pearson(predicted.ranks(counts), measured.ranks(counts), counts)

    def ndcg(self, counts: Floats, percent: float) -> float:
        """Gain of the best ``percent`` by prediction, divided by the largest possible gain (Järvelin, Kekäläinen 2002).

        As in ProteinGym (Notin et al. 2023), the gain of a row is its measured value, scaled to 0 to 1.
        """
        if not self._defined(counts):
            return nan
        predicted, measured = self._rankings
        low = self._measured[counts > 0].min()
        gains = (self._measured - low) / (self._measured[counts > 0].max() - low)
        top = max(1, int(counts.sum() * percent / 100))
        return predicted.gain(counts, gains, top) / measured.gain(counts, gains, top)

    def top_recall(self, counts: Floats, percent: float) -> float:
        """Share of the best measured ``percent`` that is in the best predicted ``percent`` (ProteinGym)."""
        if not self._defined(counts):
            return nan
        found, best = (ranking.best(counts, percent) for ranking in self._rankings)
        return float(counts @ (found & best) / (counts @ best))

    def expected_top_recall(self, counts: Floats, percent: float) -> float:
        """Share of the best measured ``percent`` that is in equally many rows with the highest predictions.

        It is the mean over all orders of equal predictions. Where no value occurs twice, it is ``top_recall``, which
        otherwise counts all rows with the lowest prediction of the best, and so rewards equal predictions.
        """
        if not self._defined(counts):
            return nan
        predicted, measured = self._rankings
        best = measured.best(counts, percent)
        size = float(counts @ best)
        return predicted.hits(counts, best, size) / size
