"""What a report reads from the folder of a predictor, and its pictures of the predictions.

At most ``MOST_POINTS`` points and ``MOST_CLASSES`` classes are drawn, and the text beside them says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from protea.evaluate.ranking import Ranking
from protea.finetune.calibration import Calibration
from protea.finetune.measures import SELECTED, reliability
from protea.finetune.predictor import FILE
from protea.finetune.report_words import WORDS
from protea.finetune.tasks import MISSING, TASKS, Floats, Targets, Task
from protea.plot.charts import Bar, Markup, Series, bars, number_text, plot, shades
from protea.tables import read_table

MOST_CLASSES: Final = 30
MOST_POINTS: Final = 2_000
_CELLS: Final = 1 << 22  # probabilities that are in memory at once

Numbers = dict[str, dict[str, tuple[float, float, float]]]
"""By method and number: the value and its interval."""
Drawn = tuple[str, str, Markup]
"""Title, text and picture."""


@dataclass(frozen=True)
class Results:
    """A predictor's folder: what ``run.yaml`` and ``predictor.json`` say, and the numbers of one part."""

    folder: Path
    run: dict[str, Any]
    predictor: dict[str, Any]
    part: str
    numbers: Numbers

    @classmethod
    def of(cls, folder: Path, run: dict[str, Any]) -> Results:
        """Read a folder; the numbers are those of the test part, or of validation if there is no test part."""
        rows = table_rows(folder / "metrics.tsv")
        part, numbers = rows[-1]["part"], Numbers()
        for row in rows:
            if row["part"] == part:
                value, low, high = (as_number(row[name]) for name in ("value", "low", "high"))
                numbers.setdefault(row["method"], {})[row["number"]] = value, low, high
        return cls(folder, run, json.loads((folder / FILE).read_text(encoding="utf-8")), part, numbers)

    @property
    def task(self) -> Task:
        """What is predicted."""
        return TASKS[self.predictor["task"]]

    @property
    def chosen(self) -> str:
        """The number that chooses between models."""
        return SELECTED[self.task.name][0]

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a table; none if there is no table."""
        return table_rows(self.folder / f"{name}.tsv")

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The predictions of the part, some columns and rows at a time."""
        with parquet.ParquetFile(self.folder / "predictions.parquet") as file:
            for batch in file.iter_batches(max(1, _CELLS // len(columns)), columns=["part", *columns]):
                yield batch.filter(compute.equal(batch["part"], self.part))

    def columns(self, *names: str) -> list[list[Any]]:
        """Whole columns of the predictions of the part."""
        batches = list(self.batches(names))
        return [[value for batch in batches for value in batch[name].to_pylist()] for name in names]


def table_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table as text; none if there is no table."""
    return read_table(path).to_pylist() if path.exists() else []


def as_number(text: str) -> float:
    """A cell as a number; NaN if it is empty."""
    return float(text) if text else nan


def of_predictions(results: Results) -> Drawn:
    """The picture that fits the task."""
    return {"class": _confusion, "value": _scatter, "labels": _labels}[results.task.kind](results)


def _confusion(results: Results) -> Drawn:
    pairs = Counter(pair for pair in zip(*results.columns("target", "predicted"), strict=True) if pair[0] is not None)
    of_class = Counter[str]()
    for (truth, _), count in pairs.items():
        of_class[truth] += count
    names = sorted(results.predictor["classes"], key=lambda name: -of_class[name])[:MOST_CLASSES]
    counts = [[pairs[truth, predicted] for predicted in names] for truth in names]
    told = f"A darker square is a larger share of its row.{_most(results, 'classes')}"
    picture = shades("confusion matrix", "true class", "predicted class", names, counts)
    return "Which classes are confused", told, picture


def _most(results: Results, noun: str) -> str:
    count = len(results.predictor["classes"])
    return f" The {MOST_CLASSES} most frequent of {count:,} {noun} are shown." if count > MOST_CLASSES else ""


def _scatter(results: Results) -> Drawn:
    both = np.array(results.columns("target", "predicted"), np.float64)
    both = both[:, np.isfinite(both).all(0)]
    count, told = both.shape[1], "Points on the dotted line are right."
    if count > MOST_POINTS:
        both = both[:, np.sort(np.random.default_rng(0).choice(count, MOST_POINTS, replace=False))]
        told += f" {MOST_POINTS:,} of {count:,} points are shown, drawn at random."
    measured, predicted = both.tolist()
    ends = [float(both.min()), float(both.max())] if count else [0.0, 1.0]
    series = [Series("", measured, predicted, "dots"), Series("", ends, ends, "guide")]
    threshold = results.predictor["calibration"]["threshold"]
    if threshold is not None:
        series += [Series("", ends, [end + sign * threshold for end in ends]) for sign in (1, -1)]
        told += (
            f" Intervals are prediction ± {number_text(threshold)}: those of points between the solid lines are right."
        )
    unit = results.run["settings"]["target_column"] or "unit of target"
    picture = plot("predicted against measured", f"measured ({unit})", f"predicted ({unit})", series, equal=True)
    return "Predicted against measured", told, picture


def _labels(results: Results) -> Drawn:
    names = results.predictor["classes"]
    targets = [f"target_{name}" for name in names]
    counts = sum((np.nansum(_cells(batch, targets), 0) for batch in results.batches(targets)), np.zeros(len(names)))
    drawn = []
    for place in np.argsort(-counts, kind="stable")[:MOST_CLASSES]:
        found = results.columns(targets[place], f"probability_{names[place]}")
        truth, score = np.array(found, np.float64)
        known = ~np.isnan(truth)
        ranking = Ranking(score[known])
        area = ranking.areas(np.ones(int(known.sum())), truth[known] == 1)[0] if known.any() else nan
        drawn.append(Bar(f"{names[place]} ({counts[place]:,.0f})", area, ours=True))
    told = f"auroc: {WORDS['auroc']}. In parentheses: how many have the label.{_most(results, 'labels')}"
    return "Each label", told, bars("auroc of each label", "auroc", drawn)


def reliability_diagram(results: Results) -> Markup:
    """Probabilities beside the share that is right, before and after temperature."""
    classes, task = results.predictor["classes"], results.task
    calibrated = Calibration.from_numbers(task, results.predictor["calibration"])
    places = {name: place for place, name in enumerate(classes)}
    probabilities, targets = ([f"{what}_{name}" for name in classes] for what in ("probability", "target"))
    targets = ["target"] if task.kind == "class" else targets
    times = ("before", "after")[: 1 + calibrated.tempered]
    sums = np.zeros((len(times), 3, 10))  # of rows, probabilities and those that are right, in each bin
    for batch in results.batches([*probabilities, *targets]):
        if task.kind == "class":
            codes = [places.get(name, MISSING) for name in batch["target"].to_pylist()]
            truth = Targets(np.array(codes, np.int64), np.arange(len(batch) + 1))
        else:
            truth = Targets(_cells(batch, targets), np.arange(len(batch) + 1))
        values = _cells(batch, probabilities)
        for when, predicted in enumerate((values, calibrated.probabilities(values))[: len(times)]):
            rows, *means, _ = reliability(predicted, truth)
            sums[when] += np.nan_to_num([rows, *(rows * mean for mean in means)])
    series = [Series("", (0, 1), (0, 1), "guide")]
    for name, of_time in zip(times, sums, strict=True):
        rows, probability, right = of_time[:, of_time[0] > 0]
        series.insert(-1, Series(name, (probability / rows).tolist(), (right / rows).tolist(), "both"))
    return plot(f"reliability {' and '.join(times)} temperature", "probability", "share that is right", series)


def _cells(batch: pa.RecordBatch, columns: Sequence[str]) -> Floats:
    return np.stack([batch[name].to_numpy(zero_copy_only=False) for name in columns], 1)
