"""What a benchmark gives of a model, and differences between two models that share its items.

A number is a mean over items: chains of structures, proteins with scans, sequences. Two models are compared on the
items that both have; each resample of the bootstrap draws the same items for both, so that what is hard for both does
not blur their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol

import numpy as np

from protea.compare.published import Figure
from protea.finetune.bootstrap import RESAMPLES, Bootstrap, Difference
from protea.finetune.tasks import Floats
from protea.infer.loading import ModelLoader
from protea.progress import SILENT, Progress

LOWER_IS_BETTER: Final = ("mse", "rmse", "perplexity")


class Number(NamedTuple):
    """A number of a model with its 95 % interval over ``count`` items, each a ``unit``; NaN where not defined."""

    benchmark: str
    name: str
    value: float
    low: float
    high: float
    count: int
    unit: str
    published: Sequence[Figure] = ()


class Paired(NamedTuple):
    """How much higher a number of one model is than that of another, on the ``count`` items that both have."""

    benchmark: str
    name: str
    difference: Difference
    count: int


class Items(NamedTuple):
    """The items of a number by name: a sum and a weight each. The number is ``of_mean(Σ sums / Σ weights)``."""

    parts: Mapping[str, tuple[float, float]]
    of_mean: Callable[[float], float] = float

    @classmethod
    def of_values(cls, values: Mapping[str, float]) -> Items:
        """Items that count alike; those that are NaN do not count."""
        return cls({name: (value, 1.0) for name, value in values.items() if not np.isnan(value)})


@dataclass(frozen=True)
class Computing:
    """How the numbers of a model are computed."""

    load: ModelLoader
    overwrite: bool = False
    progress: Progress = SILENT


class ComparedBenchmark(Protocol):
    """A benchmark with its files; ``needs`` is a capability of models, or empty."""

    name: ClassVar[str]
    needs: ClassVar[str]

    def check(self) -> None:
        """Refuse files that are absent or wrong, before a model computes."""

    def compute(self, model: str, folder: Path, how: Computing) -> None:
        """Write what the benchmark's own command writes into a model's folder; ``FinishedError`` if it is there."""

    def output(self, folder: Path) -> Path:
        """The table in a model's folder that the numbers are read from."""

    def sources(self, folder: Path) -> list[Path]:
        """The files in a model's folder that differences are computed from."""

    def numbers(self, folder: Path, known: str | None) -> Iterable[Number]:
        """The numbers of a model, beside the published ones of the model ``known``."""

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterable[Paired]:
        """Each number in a folder minus that in another."""


def paired(benchmark: str, name: str, items: Items, minus: Items, seed: int = 0) -> Paired:
    """The difference of a number of two models, on the items that both have."""
    common = sorted(items.parts.keys() & minus.parts.keys())
    found = resampled({"ours": items, "other": minus}, common, seed)
    return Paired(benchmark, name, found.difference("ours", "other", name=_NUMBER), len(common))


def interval(items: Items, seed: int = 0) -> tuple[float, float, float]:
    """A number and its 95 % interval, by bootstrap over its items."""
    return resampled({"ours": items}, sorted(items.parts), seed).interval("ours", _NUMBER)[:3]


_NUMBER: Final = "number"


def resampled(models: Mapping[str, Items], common: Sequence[str], seed: int) -> Bootstrap:
    """The number of each model on ``common`` items, and on the same resamples of them."""
    parts = {model: np.array([items.parts[name] for name in common]).reshape(-1, 2) for model, items in models.items()}
    numbers = {model: _Ratio(parts[model], items.of_mean) for model, items in models.items()}
    values = {model: {_NUMBER: number(np.ones(len(common)))} for model, number in numbers.items()}
    samples = {model: {_NUMBER: np.full(RESAMPLES, nan)} for model in models}
    generator = np.random.default_rng(seed)
    for resample in range(RESAMPLES if common else 0):
        counts = np.bincount(generator.integers(0, len(common), len(common)), minlength=len(common)).astype(float)
        for model, number in numbers.items():
            samples[model][_NUMBER][resample] = number(counts)
    return Bootstrap(len(common), values, samples)


class _Ratio(NamedTuple):
    """A number for any counts of its items, of which ``parts`` ``[N, 2]`` has sums and weights."""

    parts: Floats
    of_mean: Callable[[float], float]

    def __call__(self, counts: Floats) -> float:
        total, weight = counts @ self.parts
        return self.of_mean(total / weight) if weight else nan
