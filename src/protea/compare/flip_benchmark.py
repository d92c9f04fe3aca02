"""FLIP as a benchmark: ``protea evaluate flip`` with a head on each model as it is, and differences of its predictors.

Differences are resampled over families of test proteins, as each predictor's own interval is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import compute, parquet

from protea.compare.measured import ComparedBenchmark, Number, Paired, as_float
from protea.compare.published import Figure, called
from protea.finetune import flip_data
from protea.finetune.bootstrap import bootstrap
from protea.finetune.finetuning import RUN
from protea.finetune.flip import NUMBERS, SPLITS, TABLE, FlipRun
from protea.finetune.measuring import families
from protea.finetune.tasks import MISSING, Floats, Labelled, Targets
from protea.progress import SILENT, Progress

_PREDICTIONS: Final = "predictions.parquet"


@dataclass(frozen=True)
class Flip(ComparedBenchmark):
    """FLIP's tasks in a folder, or some of them; ``limit`` is the number of training examples, for a quick look."""

    folder: Path
    tasks: Sequence[str] = ()
    limit: int | None = None

    name: ClassVar = "flip"
    needs: ClassVar = ""
    unit: ClassVar = "test example"

    def check(self) -> None:
        """Refuse unknown tasks, and a folder that has none of those asked for."""
        FlipRun(folder=self.folder, output=Path(), tasks=self.tasks, options={}).check()

    def compute(self, model: str, folder: Path, **how: Any) -> None:
        """Do what ``protea evaluate flip`` does; finished splits are not trained again."""
        load = how.pop("load")
        options = {"model": model, "method": "frozen", "dtype": load.dtype, "device": load.device, "token_budget": None}
        output = folder / self.name
        FlipRun(folder=self.folder, output=output, tasks=self.tasks, limit=self.limit, options=options, **how)()

    def output(self, folder: Path) -> Path:
        """The table in a model's folder that the numbers are read from."""
        return folder / self.name / TABLE

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The numbers of ``flip.tsv``, each once, with the figures that were published for the model."""
        column = called(known, self.name)
        rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows(folder):
            if not self.tasks or row["task"] in self.tasks:
                rows.setdefault(tuple(row[name] for name in ("task", "split", "test", "number")), []).append(row)
        first: dict[tuple[str, str], str] = {}
        for (task, split, test, number), same in rows.items():
            other = "" if first.setdefault((task, split), test) == test else f", test set of {int(test):,}"
            value, low, high = (as_float(same[0][name]) for name in ("value", "low", "high"))
            published = [
                Figure(float(row[column]), row["source"], "" if row["differs"] == "same" else row["differs"])
                for row in same
                if column and row.get(column)
            ]
            yield Number(f"flip {task} {split}{other}", number, value, low, high, int(test), self.unit, published)

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """Compare two predictors on each split whose test rows both have; further test sets have no predictions."""
        for split in SPLITS:
            if self.tasks and split.task not in self.tasks:
                continue
            places = [of / self.name / split.place for of in (folder, other)]
            tables = [_of_test(place / _PREDICTIONS) for place in places if (place / _PREDICTIONS).exists()]
            if len(tables) < len(places):
                continue
            settings = yaml.safe_load((places[0] / RUN).read_text(encoding="utf-8"))["settings"]
            test = flip_data.read(settings).part("test")
            targets = _targets(tables[0], test)
            if not _rows(tables[0]).equals(_rows(tables[1])) or len(targets.offsets) != len(test.examples) + 1:
                progress.note(f"{split.task}, {split.name}: {folder.name} and {other.name} have other test rows")
                continue
            predicted = {str(of): _values(table, test.classes) for of, table in zip(places, tables, strict=True)}
            names, groups = NUMBERS[split.task], families(test, "test", [], SILENT)
            found = bootstrap(test.task, predicted, targets, test.classes, groups, names=names, progress=progress)
            for name in names:
                difference = found.difference(str(places[0]), str(places[1]), name)
                yield Paired(f"flip {split.task} {split.name}", name, difference, len(test.examples))


def _of_test(path: Path) -> pa.Table:
    table = parquet.read_table(path, use_threads=False)
    return table.filter(compute.equal(table["part"], "test"))


def _rows(table: pa.Table) -> pa.Table:
    """The columns that identify a test row."""
    return table.select([name for name in ("id", "position", "target") if name in table.column_names])


def _targets(table: pa.Table, data: Labelled) -> Targets:
    """The targets as the table has them, without what was cut off."""
    number = {name: place for place, name in enumerate(data.classes)}
    values = np.array([number.get(target, MISSING) for target in table["target"].to_pylist()])
    if not data.classes:
        values = table["target"].to_numpy()
    firsts = np.equal(table["position"], 1) if "position" in table.column_names else np.ones(len(table), bool)
    return Targets(values, np.append(np.flatnonzero(firsts), len(table)))


def _values(table: pa.Table, classes: Sequence[str]) -> Floats:
    """Predictions ``[R]``, or probabilities ``[R, C]`` of classes."""
    names = [f"probability_{name}" for name in classes] or ["predicted"]
    values = np.array([table[name].to_numpy() for name in names], np.float64).T
    return values if classes else values[:, 0]
