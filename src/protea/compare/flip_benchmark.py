"""FLIP as a benchmark: ``protea evaluate flip`` with a head on each model as it is, and differences of its predictors.

Two predictors of a split were measured on the same test rows, except where one model shortens sequences more. Their
difference is resampled over families of test proteins, as each predictor's own interval is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import yaml
from pyarrow import parquet

from protea.compare.measured import Computing, Number, Paired
from protea.compare.published import Figure, called
from protea.finetune import flip_data
from protea.finetune.bootstrap import bootstrap
from protea.finetune.finetuning import RUN
from protea.finetune.flip import NUMBERS, SPLITS, TABLE, Benchmark, FlipRun
from protea.finetune.measuring import families
from protea.finetune.tasks import Floats, Labelled
from protea.infer.loading import ModelLoader
from protea.progress import SILENT, Progress
from protea.tables import read_table

_PREDICTIONS: Final = "predictions.parquet"

_Key = tuple[str, int]
"""An example: its id, and how often the id occurred before it."""


@dataclass(frozen=True)
class Flip:
    """FLIP's tasks in a folder, or some of them; ``limit`` is the number of training examples, for a quick look."""

    folder: Path
    tasks: Sequence[str] = ()
    limit: int | None = None

    name: ClassVar = "flip"
    needs: ClassVar = ""

    def check(self) -> None:
        """Refuse unknown tasks, and a folder that has none of those asked for."""
        self._run("", Path("flip"), Computing(ModelLoader())).check()

    def compute(self, model: str, folder: Path, how: Computing) -> None:
        """Do what ``protea evaluate flip`` does; finished splits are not trained again."""
        self._run(model, folder, how)()

    def output(self, folder: Path) -> Path:
        """The table in a model's folder that the numbers are read from."""
        return folder / self.name / TABLE

    def sources(self, folder: Path) -> list[Path]:
        """The predictions on all splits."""
        return [place / _PREDICTIONS for _, place in self._splits(folder)]

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The numbers of ``flip.tsv``, each once, with the figures that were published for the model."""
        column = called(known, self.name)
        rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in read_table(self.output(folder)).to_pylist():
            if not self.tasks or row["task"] in self.tasks:
                rows.setdefault(tuple(row[name] for name in ("task", "split", "test", "number")), []).append(row)
        for (task, split, test, number), same in rows.items():
            value, low, high = (float(same[0][name]) if same[0][name] else nan for name in ("value", "low", "high"))
            published = [
                Figure(float(row[column]), row["source"], "" if row["differs"] == "same" else row["differs"])
                for row in same
                if column and row.get(column)
            ]
            yield Number(f"flip {task} {split}", number, value, low, high, int(test), "test example", published)

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """On the test rows of each split that both predictors have; further test sets have no predictions."""
        theirs = dict(self._splits(other))
        for split, place in self._splits(folder):
            if split in theirs:
                yield from _paired(split, place, theirs[split], progress)

    def _run(self, model: str, folder: Path, how: Computing) -> FlipRun:
        return FlipRun(
            folder=self.folder,
            output=folder / self.name,
            tasks=self.tasks,
            limit=self.limit,
            options={"model": model, "method": "frozen", "dtype": how.load.dtype, "device": how.load.device}
            | {"token_budget": None},
            overwrite=how.overwrite,
            progress=how.progress,
        )

    def _splits(self, folder: Path) -> Iterator[tuple[Benchmark, Path]]:
        """The splits that are trained, each with the folder of its predictor."""
        for split in SPLITS:
            place = folder / self.name / split.place
            if (place / _PREDICTIONS).exists() and (not self.tasks or split.task in self.tasks):
                yield split, place


def _paired(split: Benchmark, ours: Path, theirs: Path, progress: Progress) -> Iterator[Paired]:
    """Each number of a task of the first predictor minus that of the second."""
    settings = yaml.safe_load((ours / RUN).read_text(encoding="utf-8"))["settings"]
    data = flip_data.read(settings).part("test")
    predicted = {place: _predictions(place, data) for place in (ours, theirs)}
    keys = _keys([example.id for example in data.examples])
    chosen = [place for place, key in enumerate(keys) if all(key in of for of in predicted.values())]
    test = data.chosen(chosen)
    rows = [min(len(of[keys[place]]) for of in predicted.values()) for place in chosen]
    test.targets = [target[:count] for target, count in zip(test.targets, rows, strict=True)]
    methods = {
        str(name): np.concatenate([of[keys[place]][:count] for place, count in zip(chosen, rows, strict=True)])
        for name, of in predicted.items()
    }
    names = NUMBERS[split.task]
    groups = families(test, "test", [], SILENT)
    found = bootstrap(data.task, methods, test.all_targets(), data.classes, groups, names=names, progress=progress)
    for name in names:
        yield Paired(
            f"flip {split.task} {split.name}", name, found.difference(str(ours), str(theirs), name), len(chosen)
        )


def _predictions(place: Path, data: Labelled) -> dict[_Key, Floats]:
    """The predictions of each test example: ``[n]`` values or ``[n, C]`` probabilities of its rows, in their order."""
    table = parquet.read_table(place / _PREDICTIONS, use_threads=False).to_pydict()
    columns = [f"probability_{name}" for name in data.classes] or ["predicted"]
    values = np.array([table[name] for name in columns], np.float64).T
    test = np.array([part == "test" for part in table["part"]])
    ids = [name for name, chosen in zip(table["id"], test, strict=True) if chosen]
    values = values[test] if data.classes else values[test, 0]
    firsts = np.ones(len(ids), bool)
    if data.task.unit == "residue":
        positions = np.array(table["position"])[test]
        firsts[1:] = positions[1:] <= positions[:-1]
    starts = np.flatnonzero(firsts)
    return dict(zip(_keys([ids[start] for start in starts]), np.split(values, starts[1:]), strict=True))


def _keys(ids: Sequence[str]) -> list[_Key]:
    seen: dict[str, int] = {}
    keys = []
    for name in ids:
        seen[name] = seen.get(name, -1) + 1
        keys.append((name, seen[name]))
    return keys
