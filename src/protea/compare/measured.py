"""The numbers that a benchmark gives for a model, and the differences between two models on the same items.

A number is a mean over items: chains of structures, proteins with scans, sequences. Two models are compared on the
items that both have; each resample of the bootstrap draws the same items for both, so that what is hard for both does
not blur their difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from protea.compare.published import Figure, figures
from protea.contacts.precision import mean
from protea.finetune.bootstrap import RESAMPLES, Bootstrap, Difference
from protea.progress import Progress
from protea.tables import read_table

LOWER_IS_BETTER: Final = ("mse", "rmse", "perplexity")


class Number(NamedTuple):
    """A number of a model with its 95 % interval over ``size`` items, each a ``unit``; NaN where not defined.

    Where items weigh differently, ``predicted`` is the number of residues that they have together.
    """

    benchmark: str
    name: str
    value: float
    low: float
    high: float
    size: int
    unit: str
    published: Sequence[Figure] = ()
    predicted: int | None = None


class Paired(NamedTuple):
    """How much higher a number of one model is than that of another, on the ``size`` items that both have."""

    benchmark: str
    name: str
    difference: Difference
    size: int


class Items(NamedTuple):
    """The items of a number by name: a sum and a weight each. The number is ``of_mean(Σ sums / Σ weights)``."""

    parts: Mapping[str, tuple[float, float]]
    of_mean: Callable[[float], float] = float

    @classmethod
    def of_values(cls, values: Mapping[str, float]) -> Items:
        """Items that count alike; those that are NaN do not count."""
        return cls({name: (value, 1.0) for name, value in values.items() if not np.isnan(value)})

    def interval(self) -> tuple[float, float, float]:
        """The number and its 95 % interval over items; a plain mean has that of ``protea evaluate contacts``."""
        if self.of_mean is float:
            value, low, high, _ = mean([value for value, _ in self.parts.values()])
        else:
            value, low, high, _ = resampled({"": self}, sorted(self.parts)).interval("", "")
        return (value, low, high) if len(self.parts) > 1 else (value, nan, nan)

    def minus(self, other: Items, seed: int = 0) -> tuple[Difference, int]:
        """The difference on the items that both have with the same weight, and their number."""
        common = sorted(name for name, part in self.parts.items() if part[1] == other.parts.get(name, (0, 0))[1])
        return resampled({"ours": self, "other": other}, common, seed).difference("ours", "other", ""), len(common)


def resampled(models: Mapping[str, Items], common: Sequence[str], seed: int = 0) -> Bootstrap:
    """The number of each model, named ``""``, on ``common`` items and on the same resamples of them."""
    parts = {model: np.array([items.parts[name] for name in common]).reshape(-1, 2) for model, items in models.items()}
    samples = {model: np.full(RESAMPLES + 1, nan) for model in models}
    generator = np.random.default_rng(seed)
    counts = np.ones(len(common))
    for place in range(RESAMPLES + 1 if common else 0):
        for model, items in models.items():
            total, weight = counts @ parts[model]
            samples[model][place] = items.of_mean(total / weight)
        counts = np.bincount(generator.integers(0, len(common), len(common)), minlength=len(common)).astype(float)
    values = {model: {"": float(found[0])} for model, found in samples.items()}
    return Bootstrap(len(common), values, {model: {"": found[1:]} for model, found in samples.items()})


class ComparedBenchmark(ABC):
    """A benchmark with its files; ``needs`` is a capability of models, or empty.

    Its command writes ``NAME.csv`` into a model's folder, of which it makes the items of one number. A benchmark of
    several numbers overrides the methods that say so.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    number: ClassVar[str]
    unit: ClassVar[str]

    @abstractmethod
    def check(self) -> None:
        """Refuse files that are absent or wrong, before a model computes."""

    @abstractmethod
    def compute(self, model: str, folder: Path, **how: Any) -> None:
        """Write what the benchmark's own command writes into a model's folder; ``FinishedError`` if it is there.

        ``how`` are ``load``, ``overwrite`` and ``progress``.
        """

    def items(self, folder: Path) -> Items:
        """The items of the number of a model."""
        raise NotImplementedError

    def published(self, folder: Path, known: str | None) -> Sequence[Figure]:
        """The published figures of the model ``known``."""
        return figures(known, self.name, self.number)

    def output(self, folder: Path) -> Path:
        """The table in a model's folder that the numbers are read from."""
        return folder / f"{self.name}.csv"

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """The rows of that table, as text."""
        rows: list[dict[str, Any]] = read_table(self.output(folder)).to_pylist()
        return rows

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The numbers of a model, beside the published ones of the model ``known``."""
        items = self.items(folder)
        published = self.published(folder, known)
        predicted = None if items.of_mean is float else round(sum(weight for _, weight in items.parts.values()))
        yield Number(self.name, self.number, *items.interval(), len(items.parts), self.unit, published, predicted)

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """Each number in a folder minus that in another."""
        yield Paired(self.name, self.number, *self.items(folder).minus(self.items(other)))


def as_float(cell: str | None) -> float:
    """A cell of a text table; NaN if it is empty."""
    return float(cell) if cell else nan
