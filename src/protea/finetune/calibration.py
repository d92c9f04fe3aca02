"""Probabilities that can be believed, and intervals and sets that hold the truth as often as they say.

``temperature``     Guo et al. 2017: logits are divided by one number, which minimises the log-loss of the calibration
                    part. The most probable class stays the same. With n rows, the truth of a row counts as (n + 1) /
                    (n + C) of its class and 1 / (n + C) of each other one (Platt 1999, for two classes); else a few
                    predictions that are all right would make every probability 0 or 1.
``threshold``       split conformal prediction. A row's score is |target - prediction| for values, and 1 - probability
                    of the true class for classes (LAC; Sadinle et al. 2019). The threshold is a quantile of the scores.
                    An interval is prediction ± threshold; a set holds the classes with 1 - probability <= threshold.

Rows of one protein are alike, so proteins, not rows, are the units; examples of one sequence are one protein. With K
proteins, each row of a protein with n rows weighs 1 / ((K + 1) n), and infinity weighs 1 / (K + 1). The threshold is
the smallest score up to which the weights reach 1 - alpha. This is hierarchical conformal prediction (HCP; Lee, Barber
and Willett 2023). With one row for each protein it is the usual ceil((K + 1)(1 - alpha))-th smallest score (Vovk et al.
2005).

What is promised: if proteins of the calibration part and a new protein are exchangeable, the truth of a row drawn at
random from the new protein is inside with a probability of at least 1 - alpha, over the draw of all these proteins.
Nothing is promised for one given protein or class, for proteins that are less alike to the training data than the
calibration part is, or if the calibration part helped to train or choose the model. Sets use the model's own
probabilities, without the temperature, which comes from the same proteins and would break the promise.

Shapes: N examples, R rows, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protea.errors import DataError, UsageError
from protea.finetune.measures import SMALLEST
from protea.finetune.tasks import Floats, Ints, Targets, Task
from protea.text import counted

ALPHA: Final = 0.1
_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Calibration:
    """What the calibration part of a task's data taught.

    Attributes:
        task: the task of the predictions.
        temperature: by what logits are divided; 1 for values.
        threshold: the largest score inside an interval or a set; infinite if there were too few proteins. A multilabel
            task has no sets.
        alpha: the share of rows that may be outside.
        groups: how many proteins, or clusters of proteins, the threshold comes from.
        notes: sentences that a user must see.
    """

    task: Task
    temperature: float = 1.0
    threshold: float = inf
    alpha: float = ALPHA
    groups: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tempered(self) -> bool:
        """Whether probabilities were calibrated."""
        return self.temperature != 1

    @property
    def bounded(self) -> bool:
        """Whether there are sets or intervals."""
        return isfinite(self.threshold)

    def probabilities(self, predictions: Floats) -> Floats:
        """Probabilities ``[R, C]`` of the model at this temperature."""
        if not self.tempered:
            return predictions
        if self.task.kind == "labels":
            return _softmax(_both(predictions) / self.temperature)[..., 1]
        return _softmax(_logarithms(predictions) / self.temperature)

    def intervals(self, predictions: Floats) -> Floats:
        """``[R, 2]``: lower and upper ends for predicted values ``[R]``."""
        predictions = np.asarray(predictions, np.float64)
        return np.stack([predictions - self.threshold, predictions + self.threshold], 1)

    def sets(self, predictions: Floats) -> NDArray[np.bool_]:
        """``[R, C]``: which classes are in the set of a row, from the model's own probabilities; there may be none."""
        inside: NDArray[np.bool_] = 1 - np.asarray(predictions, np.float64) <= self.threshold
        return inside

    def numbers(self) -> dict[str, float | None]:
        """All numbers, for a file; None stands for an infinite threshold, which JSON does not have."""
        threshold = self.threshold if self.bounded else None
        return {"temperature": self.temperature, "threshold": threshold, "alpha": self.alpha, "groups": self.groups}

    @classmethod
    def from_numbers(cls, task: Task, numbers: Mapping[str, float | None]) -> Calibration:
        """The calibration of a task whose ``numbers()`` these are."""
        temperature, threshold, alpha, groups = map(numbers.get, ("temperature", "threshold", "alpha", "groups"))
        if temperature is None or alpha is None or groups is None:
            raise DataError(f"not the numbers of a calibration: {dict(numbers)}; calibrate again")
        return cls(task, float(temperature), inf if threshold is None else float(threshold), float(alpha), int(groups))


def calibrate(
    task: Task,
    predictions: Floats,
    targets: Targets,
    groups: Ints | None = None,
    alpha: float = ALPHA,
    noun: str = "protein",
) -> Calibration:
    """Calibrate a model by its predictions of the calibration part.

    Args:
        task: what is predicted.
        predictions: probabilities ``[R, C]``, or values ``[R]``.
        targets: their targets; rows without a label are left out.
        groups: ``[N]``, equal for examples that count as one unit together: of one sequence, or of one cluster; by
            default each example is a unit.
        alpha: the share of rows that may lie outside an interval or a set, above 0 and below 1.
        noun: what messages call a unit.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha: {alpha}: must be above 0 and below 1")
    known = targets.known()
    predicted, truth = np.asarray(predictions[known], np.float64), targets.values[known]
    notes: list[str] = []
    if task.kind == "value":
        temperature, scores = 1.0, np.abs(truth - predicted)
    elif task.kind == "class":
        classes = truth.astype(np.int64)
        temperature = _temperature(_logarithms(predicted), classes, notes)
        scores = 1 - predicted[np.arange(len(truth)), classes]
    else:
        present = ~np.isnan(truth)
        temperature = _temperature(_both(predicted[present]), truth[present].astype(np.int64), notes)
        return Calibration(task, temperature, alpha=alpha, notes=tuple(notes))
    example = targets.examples()[known]
    units, unit = np.unique(example if groups is None else groups[example], return_inverse=True)
    threshold = _threshold(scores, unit, len(units), alpha)
    if not isfinite(threshold):
        what = "intervals are infinite" if task.kind == "value" else "sets hold all classes"
        least = least_units(alpha)
        notes.append(
            f"{what}: coverage of {1 - alpha:.4g} needs calibration with at least "
            f"{counted(least, f'labelled {noun}')}, there are {len(units):,}; give more data, or lower the coverage"
            if len(units) < least
            else f"{what}: too many predictions of the calibration part are not finite"
        )
    return Calibration(task, temperature, threshold, alpha, len(units), tuple(notes))


def least_units(alpha: float) -> int:
    """Proteins or clusters from which on a threshold is finite."""
    return int(np.ceil(1 / alpha - 1e-9)) - 1


def _threshold(scores: Floats, unit: Ints, units: int, alpha: float) -> float:
    """HCP's quantile of ``scores``, where each of the ``units`` weighs the same; infinite if they are too few."""
    order = np.argsort(scores, kind="stable")
    weights = (1 / np.bincount(unit, minlength=units))[unit][order]
    reached = np.cumsum(weights) >= (1 - alpha) * (units + 1) - 1e-9  # sums of thirds may miss by rounding
    threshold = scores[order][np.argmax(reached)] if reached.any() else inf
    return float(threshold) if isfinite(threshold) else inf


def _temperature(logits: Floats, truth: Ints, notes: list[str]) -> float:
    """The temperature at which the smoothed log-loss of ``logits`` ``[R, C]`` is least; 1, with a note, where none is.

    The loss is convex in 1 / temperature, so bisection of its slope finds the minimum.
    """
    finite = np.isfinite(logits).all(1)
    logits, truth = logits[finite], truth[finite]
    rows, classes = logits.shape
    right = (rows * logits[np.arange(rows), truth] + logits.sum(1)) / (rows + classes)

    def slope(temperature: float) -> float:
        """Of the mean log-loss over 1 / temperature."""
        return float(np.mean((_softmax(logits / temperature) * logits).sum(1) - right))

    reason = ""
    if not len(truth):
        reason = "nothing to calibrate probabilities with"
    elif not np.ptp(logits, axis=1).any():
        reason = "all classes have the same probability"
    elif slope(_COLDEST) <= 0:
        reason = "on the calibration part, the probabilities are right, but nearly equal"
    elif slope(_HOTTEST) >= 0:
        reason = "on the calibration part, the probabilities are no better than equal ones"
    if reason:
        notes.append(f"probabilities were not calibrated: {reason}")
        return 1.0
    low, high = np.log(_COLDEST), np.log(_HOTTEST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def _logarithms(probabilities: Floats) -> Floats:
    logarithms: Floats = np.log(np.clip(np.asarray(probabilities, np.float64), SMALLEST, 1))
    return logarithms


def _both(probabilities: Floats) -> Floats:
    """``[..., 2]``: logarithms of the probabilities that a label is absent and present."""
    present = np.asarray(probabilities, np.float64)
    return _logarithms(np.stack([1 - present, present], -1))


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    softmax: Floats = powers / powers.sum(-1, keepdims=True)
    return softmax
