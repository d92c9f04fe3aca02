"""The numbers that say how good predictions are; ``docs/metrics.md`` explains them to users.

Rows without a label are left out. A number that is not defined is NaN: correlations of constant values, AUROC with one
class alone, everything if nothing has a label or a prediction is not finite.

A meter is made once for predictions and their targets, sorts once, and then gives the numbers for any ``counts``: how
often each example counts. A resample of a bootstrap is nothing but counts.

Shapes: N examples, R labelled rows, C classes or labels, K classes or labels that are measured, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import nan
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.evaluate.ranking import RankAgreement, Ranking, pearson
from protea.finetune.tasks import TASKS, Floats, Ints, Kind, Targets, Task

Count = Callable[[Floats], Iterable[float]]
"""From how often each row counts, some numbers."""

SMALLEST: Final = float(np.finfo(np.float64).eps)
"""Probabilities are kept this far from 0 and 1 in logarithms, as in scikit-learn."""

_TOP: Final = 10  # percent
_THRESHOLDS: Final = np.arange(1, 101) / 100  # of F1max, as in CAFA


class _Rows(NamedTuple):
    """The labelled rows of a task: predictions, targets and the number of the example that a row belongs to."""

    predicted: Floats
    truth: NDArray[np.float64] | NDArray[np.int64]
    example: Ints


def _decisions(rows: _Rows) -> Count:
    """Numbers of the most probable class, the first one of equals.

    ``accuracy`` is the share of rows that are right. ``balanced_accuracy`` is the mean over classes of the share of
    their rows that are right. ``macro_f1`` is the mean over classes of F1 = 2 hits / (rows of the class + rows that are
    predicted so), for classes that are in targets or predictions. ``mcc`` is the correlation of two or more classes
    (Matthews 1975; Gorodkin 2004); 0 if one class is always predicted, NaN if all targets are of one class. All are
    scikit-learn's, except for that NaN.
    """
    width, truth, chosen = rows.predicted.shape[1], rows.truth.astype(np.int64), rows.predicted.argmax(1)
    hit = truth == chosen
    hit_class = truth[hit]

    def count(counts: Floats) -> Iterable[float]:
        hits, of_class, predicted = (
            np.bincount(classes, weights, width)
            for classes, weights in ((hit_class, counts[hit]), (truth, counts), (chosen, counts))
        )
        total = of_class.sum()
        yield hits.sum() / total
        yield float(np.mean(hits[of_class > 0] / of_class[of_class > 0]))
        both = of_class + predicted
        yield float(np.mean(2 * hits[both > 0] / both[both > 0]))
        spread, spread_predicted = (total**2 - values @ values for values in (of_class, predicted))
        covariance = total * hits.sum() - of_class @ predicted
        yield covariance / np.sqrt(spread * spread_predicted) if spread_predicted else 0.0 if spread else nan

    return count


def _by_protein(rows: _Rows) -> Count:
    """``accuracy_per_protein``: the mean over proteins of the share of their labelled residues that are right.

    This is the accuracy that BioNeMo's secondary-structure task reports.
    """
    share = 1 / np.bincount(rows.example)[rows.example]
    hits = share * (rows.predicted.argmax(1) == rows.truth)
    return lambda counts: (counts @ hits / (counts @ share),)


def _class_log_loss(rows: _Rows) -> Count:
    """``log_loss``: the mean of -ln(probability of the true class)."""
    losses = -np.log(np.clip(rows.predicted[np.arange(len(rows.truth)), rows.truth.astype(np.int64)], SMALLEST, 1))
    return lambda counts: (counts @ losses / counts.sum(),)


def _class_areas(rows: _Rows) -> Count:
    """``auroc`` and ``auprc``, of each class against all others (``Ranking.areas``).

    With two classes, of the second; with more, the mean over the classes that occur.
    """
    first = 1 if rows.predicted.shape[1] == 2 else 0
    positive = rows.truth[:, None] == np.arange(rows.predicted.shape[1])
    return _mean_areas(rows.predicted[:, first:], positive[:, first:], np.ones_like(positive[:, first:]))


def _label_areas(rows: _Rows) -> Count:
    """``macro_auroc`` and ``macro_auprc``: means over the labels that some, but not all, rows have."""
    return _mean_areas(rows.predicted, rows.truth == 1, ~np.isnan(rows.truth))


def _all_areas(rows: _Rows) -> Count:
    """``micro_auroc`` and ``micro_auprc``: of all pairs of a row and a label in one ranking."""
    known = ~np.isnan(rows.truth)
    row = np.nonzero(known)[0]
    areas = _mean_areas(rows.predicted[known][:, None], rows.truth[known][:, None] == 1, np.ones((len(row), 1), bool))
    return lambda counts: areas(counts[row])


def _mean_areas(predicted: Floats, positive: NDArray[np.bool_], known: NDArray[np.bool_]) -> Count:
    """Means over columns ``[R, K]``, without those in which all ``known`` rows are of one class."""
    columns = []
    for scores, hits, rows in zip(predicted.T, positive.T, known.T, strict=True):
        chosen = np.flatnonzero(rows)
        if 0 < hits[chosen].sum() < len(chosen):
            columns.append((Ranking(scores[chosen]), chosen, hits[chosen]))

    def count(counts: Floats) -> Iterable[float]:
        areas = np.array([ranking.areas(counts[chosen], hits) for ranking, chosen, hits in columns]).reshape(-1, 2)
        areas = areas[~np.isnan(areas[:, 0])]
        return areas.mean(0).tolist() if len(areas) else (nan, nan)

    return count


def _f1max(rows: _Rows) -> Count:
    """``f1max``: the largest F1 over thresholds 0.01, 0.02, ..., 1, as in CAFA (Radivojac et al. 2013).

    At a threshold, precision is the mean over proteins with a predicted label, recall the mean over all proteins; F1 is
    their harmonic mean. Proteins without a true label do not count, nor do labels that are missing.
    """
    rated = (rows.truth == 1).any(1)
    truth, predicted = rows.truth[rated], rows.predicted[rated]
    known, width = ~np.isnan(truth), len(_THRESHOLDS) + 1
    bucket = np.nonzero(known)[0] * width + np.searchsorted(_THRESHOLDS, predicted[known], side="right")

    def reached(weights: Floats) -> Floats:
        """``[R, 100]``: the sum of ``weights`` of the labels of a row that reach each threshold."""
        sums = np.bincount(bucket, weights, len(truth) * width).reshape(-1, width)
        totals: Floats = np.cumsum(sums[:, :0:-1], 1, np.float64)[:, ::-1]
        return totals

    taken, hits = reached(np.ones(len(bucket))), reached(truth[known].astype(np.float64))
    precision, some = hits / np.maximum(taken, 1), (taken > 0).astype(np.float64)
    recall = hits / np.nansum(truth, 1)[:, None]

    def count(counts: Floats) -> Iterable[float]:
        counts = counts[rated]
        if not counts.any():
            return (nan,)
        p, r = counts @ precision / np.maximum(counts @ some, 1), counts @ recall / counts.sum()
        return (np.max(2 * p * r / np.where(p + r > 0, p + r, 1)),)

    return count


def _label_log_loss(rows: _Rows) -> Count:
    """``log_loss``: the mean over all labels of all rows of -ln(probability of what is true)."""
    known = ~np.isnan(rows.truth)
    right = np.where(rows.truth == 1, rows.predicted, 1 - rows.predicted)
    losses = np.where(known, -np.log(np.clip(right, SMALLEST, 1)), 0).sum(1)
    return lambda counts: (counts @ losses / (counts @ known.sum(1)),)


def _order(rows: _Rows) -> Count:
    """``spearman``, ``ndcg`` and ``top_recall`` of the best tenth, which is ``RankAgreement.expected_top_recall``."""
    agreement = RankAgreement(rows.predicted, rows.truth.astype(np.float64))
    return lambda counts: (
        agreement.spearman(counts),
        agreement.ndcg(counts, _TOP),
        agreement.expected_top_recall(counts, _TOP),
    )


def _errors(rows: _Rows) -> Count:
    """``rmse``, ``mse``, ``mae``: root of the mean square, mean square and mean size of prediction minus target.

    ``r2``, the coefficient of determination, is 1 - mse / variance of the targets: 0 for their mean, below 0 for
    anything worse. ``pearson`` is the linear correlation.
    """
    truth = rows.truth.astype(np.float64)
    error = rows.predicted - truth

    def count(counts: Floats) -> Iterable[float]:
        total = counts.sum()
        square = counts @ error**2 / total
        present = truth[counts > 0]
        variance = counts @ (truth - counts @ truth / total) ** 2 / total if np.ptp(present) else nan
        yield from (np.sqrt(square), square, counts @ np.abs(error) / total, 1 - square / variance)
        yield pearson(rows.predicted, truth, counts)

    return count


_Table = Mapping[tuple[str, ...], Callable[[_Rows], Count]]
_MEASURES: Final[Mapping[Kind, _Table]] = {
    "class": {
        ("accuracy", "balanced_accuracy", "macro_f1", "mcc"): _decisions,
        ("accuracy_per_protein",): _by_protein,
        ("auroc", "auprc"): _class_areas,
        ("log_loss",): _class_log_loss,
    },
    "value": {
        ("spearman", "ndcg", "top_recall"): _order,
        ("rmse", "mse", "mae", "r2", "pearson"): _errors,
    },
    "labels": {
        ("macro_auroc", "macro_auprc"): _label_areas,
        ("micro_auroc", "micro_auprc"): _all_areas,
        ("f1max",): _f1max,
        ("log_loss",): _label_log_loss,
    },
}

_SELECTED: Final[Mapping[Kind, str]] = {"class": "mcc", "value": "spearman", "labels": "macro_auprc"}
SELECTED: Final = {name: (_SELECTED[task.kind], True) for name, task in TASKS.items()}
"""By the name of a task, the number that chooses between models, and whether higher is better.

MCC, not accuracy, for classes: where one class is frequent, accuracy hardly sees whether the others are found.
"""


def measures(task: Task) -> tuple[str, ...]:
    """The names of a task's numbers."""
    names = (name for group in _MEASURES[task.kind] for name in group)
    return tuple(name for name in names if name != "accuracy_per_protein" or task.unit == "residue")


class Meter:
    """All numbers of predictions, or those in ``names``, for examples that may count several times.

    Predictions have the rows of ``targets``: probabilities ``[rows, C]`` for classes and labels, values ``[rows]``.
    """

    def __init__(
        self, task: Task, predictions: Floats, targets: Targets, classes: tuple[str, ...], names: Collection[str] = ()
    ) -> None:
        shape = (len(targets.values),) if task.kind == "value" else (len(targets.values), len(classes))
        if predictions.shape != shape:
            raise ValueError(f"predictions have shape {list(predictions.shape)}, must have {list(shape)}")
        known = targets.known()
        rows = _Rows(np.asarray(predictions[known], np.float64), targets.values[known], targets.examples()[known])
        self.names = tuple(name for name in measures(task) if not names or name in names)
        self._example = rows.example
        self._counts: dict[tuple[str, ...], Count] = {}
        if len(self._example) and np.isfinite(rows.predicted).all():
            with np.errstate(all="ignore"):
                for group, make in _MEASURES[task.kind].items():
                    if set(group) & set(self.names):
                        self._counts[group] = make(rows)

    def __call__(self, counts: Floats) -> dict[str, float]:
        """The numbers if examples count ``counts`` ``[N]`` times, whole numbers from 0 up."""
        of_rows = counts[self._example]
        found = dict.fromkeys(self.names, nan)
        if of_rows.any():
            with np.errstate(all="ignore"):
                for group, count in self._counts.items():
                    found |= {name: float(value) for name, value in zip(group, count(of_rows), strict=True)}
        return {name: found[name] for name in self.names}


def measure(task: Task, predictions: Floats, targets: Targets, classes: tuple[str, ...]) -> dict[str, float]:
    """All numbers of a task's predictions, each example counted once."""
    return Meter(task, predictions, targets, classes)(np.ones(len(targets.offsets) - 1))


def confusion(predictions: Floats, targets: Targets) -> Ints:
    """``[C, C]``: how many labelled rows of a class (row) are predicted as a class (column)."""
    width, known = predictions.shape[1], targets.known()
    pairs = targets.values[known].astype(np.int64) * width + predictions[known].argmax(1)
    return np.bincount(pairs, minlength=width * width).reshape(width, width)


class Reliability(NamedTuple):
    """For B bins of equal width from 0 to 1: rows, their mean probability, and the share that was right; NaN if empty.

    ``error`` is the expected calibration error: the mean distance of the last two, weighted by rows (Guo et al. 2017).
    """

    rows: Ints
    probability: Floats
    right: Floats
    error: float


def reliability(predictions: Floats, targets: Targets, bins: int = 10) -> Reliability:
    """Probabilities beside how often they were right.

    For classes, of the most probable class of each row; for a multilabel task, of every label.
    """
    if targets.values.ndim == 1:
        known = targets.known()
        probability = predictions[known].max(1).astype(np.float64)
        right = predictions[known].argmax(1) == targets.values[known]
    else:
        present = ~np.isnan(targets.values)
        probability, right = predictions[present].astype(np.float64), targets.values[present] == 1
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    rows = np.bincount(place, minlength=bins)
    filled = np.where(rows, rows, nan)
    means, shares = (np.bincount(place, values, bins) / filled for values in (probability, right))
    error = float(np.nansum(np.abs(means - shares) * filled) / rows.sum()) if rows.sum() else nan
    return Reliability(rows, means, shares, error)
