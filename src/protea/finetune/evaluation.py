"""The tables that say how good a predictor is, beside baselines.

``metrics.tsv``      every number of every method on a part, with a 95 % interval where the bootstrap gives one.
``comparison.tsv``   the predictor minus each other method, on the same resamples.
``by_identity.tsv``  the numbers on test examples that resemble the training examples more or less.
``predictions.parquet``  targets and predictions of every row of validation and test.

Shapes: N examples, R rows, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from protea.finetune.bootstrap import RESAMPLES, Bootstrap, bootstrap
from protea.finetune.measures import SELECTED, measure, measures
from protea.finetune.tasks import Floats, Ints, Labelled, Part, Task
from protea.progress import SILENT, Progress

OURS: Final = "predictor"
"""The name of the trained predictor among the methods."""

BINS: Final = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
"""Limits of identity to the nearest training example."""

_SORTING: Final = frozenset({"auroc", "auprc", "ndcg", "top_recall"})
_MANY_ROWS: Final = 20_000


def resampled_names(task: Task, rows: int) -> tuple[str, ...]:
    """The numbers that get intervals: all, or for many rows those that need no sorting, and the one that chooses."""
    names = measures(task)
    if rows <= _MANY_ROWS:
        return names
    chosen = SELECTED[task.name][0]
    return tuple(name for name in names if name == chosen or name not in _SORTING)


def resample(
    data: Labelled, methods: Mapping[str, Floats], groups: Ints | None, seed: int, progress: Progress = SILENT
) -> Bootstrap:
    """All methods on the same resamples of a part; ``groups`` ``[N]`` are clusters of its examples."""
    targets = data.all_targets()
    names = resampled_names(data.task, len(targets.values))
    return bootstrap(
        data.task,
        methods,
        targets,
        data.classes,
        groups,
        resamples=RESAMPLES,
        seed=seed,
        names=names,
        progress=progress,
    )


def metrics_table(data: Labelled, part: Part, methods: Mapping[str, Floats], resamples: Bootstrap | None) -> pa.Table:
    """One row for each method and number."""
    targets = data.all_targets()
    rows = []
    for method, predicted in methods.items():
        for name, value in measure(data.task, predicted, targets, data.classes).items():
            known = resamples is not None and name in resamples.values[method]
            low = high = None
            if known and resamples is not None:
                _, low, high, _ = resamples.interval(method, name)
            rows.append((part, method, name, value, _finite(low), _finite(high)))
    return _table(rows, ("part", "method", "number", "value", "low", "high"), strings=3)


def comparison_table(resamples: Bootstrap) -> pa.Table:
    """The predictor minus each other method; ``flips`` is the share of resamples in which the sign changes."""
    rows = []
    for method in resamples.values:
        for name in resamples.values[method] if method != OURS else ():
            found = resamples.difference(OURS, method, name)
            rows.append((OURS, method, name, *map(_finite, (found.value, found.low, found.high, found.flips))))
    return _table(rows, ("method", "minus", "number", "difference", "low", "high", "flips"), strings=3)


def identity_table(data: Labelled, methods: Mapping[str, Floats], identity: Floats) -> pa.Table:
    """Numbers by the identity of test examples to the nearest training example; empty bins are left out."""
    targets = data.all_targets()
    example = targets.examples()
    places = np.clip(np.searchsorted(BINS, identity, side="left") - 1, 0, len(BINS[:-1]) - 1)
    rows = []
    for number in np.unique(places):
        chosen = np.flatnonzero(places == number)
        of_rows = np.isin(example, chosen)
        part = data.chosen(chosen.tolist())
        for method, predicted in methods.items():
            for name, value in measure(data.task, predicted[of_rows], part.all_targets(), data.classes).items():
                rows.append((method, name, BINS[number], BINS[number + 1], len(chosen), value))
    columns = ("method", "number", "identity_from", "identity_to", "examples", "value")
    return _table(rows, columns, strings=2)


def predictions_table(data: Labelled, part: Part, predicted: Floats) -> pa.Table:
    """One row for each row of the task: part, id, position for residues, target and prediction."""
    targets = data.all_targets()
    example = targets.examples()
    columns: dict[str, pa.Array] = {
        "part": pa.array([part] * len(example), pa.string()),
        "id": pa.array([data.examples[place].id for place in example], pa.string()),
    }
    if data.task.unit == "residue":
        columns["position"] = pa.array(np.arange(len(example)) - targets.offsets[:-1][example] + 1)
    if data.task.kind == "labels":
        for place, name in enumerate(data.classes):
            columns[f"target_{name}"] = _numbers(targets.values[:, place])
    elif data.task.kind == "class":
        names = np.array([*data.classes, None], object)
        columns["target"] = pa.array(names[targets.values.astype(np.int64)].tolist(), pa.string())
        columns["predicted"] = pa.array(names[predicted.argmax(1)].tolist(), pa.string())
    else:
        columns |= {"target": _numbers(targets.values), "predicted": _numbers(predicted)}
    if predicted.ndim == 2:
        for place, name in enumerate(data.classes):
            columns[f"probability_{name}"] = _numbers(predicted[:, place])
    return pa.table(columns)


def _numbers(values: Floats | Ints) -> pa.Array:
    return pa.array(np.asarray(values, np.float64), from_pandas=True)


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _table(rows: Sequence[tuple[object, ...]], names: tuple[str, ...], strings: int) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    kinds = [pa.string() if place < strings else None for place in range(len(names))]
    return pa.table({name: pa.array(values, kind) for name, values, kind in zip(names, columns, kinds, strict=True)})
