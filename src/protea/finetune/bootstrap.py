"""How far the numbers of one test set can be trusted: a bootstrap over proteins or clusters of proteins.

Residues of one protein, and proteins of one family, are alike; drawing them one by one would give intervals that are
too narrow. So whole groups are drawn, with replacement, as many as there are (Efron 1979; Field and Welsh 2007). Every
method is measured on the same resamples, so that a difference between two methods has an interval of its own.

An interval covers the choice of test proteins. It does not cover the training data or the seeds of training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import nan
from typing import Final, NamedTuple

import numpy as np

from protea.finetune.measures import Meter
from protea.finetune.tasks import Floats, Ints, Targets, Task
from protea.progress import SILENT, Progress

RESAMPLES: Final = 1000


class Interval(NamedTuple):
    """A number and its 95 % interval; ``undefined`` resamples, in which it is NaN, were left out."""

    value: float
    low: float
    high: float
    undefined: int


class Difference(NamedTuple):
    """``a`` minus ``b`` and its 95 % interval, as ``Interval``.

    ``flips`` is the share of defined resamples in which the difference is 0 or has the other sign.
    """

    value: float
    low: float
    high: float
    undefined: int
    flips: float


@dataclass(frozen=True)
class Bootstrap:
    """Numbers of several methods on the test set, and on the same resamples of it.

    Attributes:
        groups: how many groups were drawn from; with fewer than 2 there are no intervals.
        values: by method and number, the number on the test set.
        samples: by method and number, the numbers of all resamples.
    """

    groups: int
    values: dict[str, dict[str, float]]
    samples: dict[str, dict[str, Floats]]

    def interval(self, method: str, name: str) -> Interval:
        """A method's number, from the 2.5 to the 97.5 percentile of the resamples."""
        samples = self.samples[method][name]
        return Interval(self.values[method][name], *self._limits(samples), int(np.isnan(samples).sum()))

    def difference(self, a: str, b: str, name: str) -> Difference:
        """How much higher a number of method ``a`` is than that of ``b``."""
        value = self.values[a][name] - self.values[b][name]
        samples = self.samples[a][name] - self.samples[b][name]
        known = samples[~np.isnan(samples)]
        flips = float(np.mean(known * value <= 0)) if len(known) and not np.isnan(value) else nan
        return Difference(value, *self._limits(samples), int(np.isnan(samples).sum()), flips)

    def _limits(self, samples: Floats) -> tuple[float, float]:
        known = samples[~np.isnan(samples)]
        if self.groups < 2 or not len(known):
            return nan, nan
        low, high = np.percentile(known, (2.5, 97.5))
        return float(low), float(high)


def bootstrap(
    task: Task,
    predictions: Mapping[str, Floats],
    targets: Targets,
    classes: tuple[str, ...],
    groups: Ints | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    names: Collection[str] = (),
    progress: Progress = SILENT,
) -> Bootstrap:
    """Measure ``predictions`` by method on ``resamples`` draws of whole ``groups``.

    ``groups`` ``[N]`` numbers the cluster of each example; by default each example is a group. Groups without a label
    are not drawn. ``names`` chooses numbers, by default all; those that sort rows take most of the time.
    """
    meters = {method: Meter(task, values, targets, classes, names) for method, values in predictions.items()}
    examples = len(targets.offsets) - 1
    rated = np.unique(targets.examples()[targets.known()])
    numbers, member = np.unique((np.arange(examples) if groups is None else groups)[rated], return_inverse=True)
    values = {method: meter(np.ones(examples)) for method, meter in meters.items()}
    samples = {method: {name: np.full(resamples, nan) for name in meter.names} for method, meter in meters.items()}
    generator = np.random.default_rng(seed)
    counts = np.zeros(examples)
    progress.begin("bootstrap", resamples)
    for resample in range(resamples if len(numbers) else 0):
        draws = generator.integers(0, len(numbers), len(numbers))
        counts[rated] = np.bincount(draws, minlength=len(numbers))[member]
        for method, meter in meters.items():
            for name, value in meter(counts).items():
                samples[method][name][resample] = value
        progress.advance()
    return Bootstrap(len(numbers), values, samples)
