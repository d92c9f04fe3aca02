"""The run behind ``protea compare``: every model on every benchmark, into one folder.

The folder of a model in OUT holds what the benchmarks' own commands write, and they know what is finished, so the same
command continues after an interruption, and one with further models or benchmarks computes only these. OUT's own
tables are made of those files each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.checkpoints.summary import licence_of, parameter_count
from protea.compare.compared import PAIR, ROW, Cell, Compared, ComparedModel
from protea.compare.measured import ComparedBenchmark, Paired
from protea.compare.published import published_name
from protea.compare.views import page
from protea.embed.stores import file_name
from protea.errors import (
    CapabilityError,
    DeviceError,
    FinishedError,
    NonFiniteError,
    PartlyFailedError,
    ProteaError,
    SequenceTooLongError,
    UnknownResidueError,
    UsageError,
)
from protea.infer.loading import ModelLoader
from protea.journal import WorkFolder
from protea.output import check_output, read_run, run_path, write_durably, write_run
from protea.progress import SILENT, Progress
from protea.rerun import FAILED
from protea.tables import Beside, write_table
from protea.text import counted

TABLE: Final = "compare.csv"
DIFFERENCES: Final = "differences.csv"
JSON: Final = "compare.json"
PAGE: Final = "compare.html"

_OF_THE_MODEL: Final = (CapabilityError, DeviceError, NonFiniteError, SequenceTooLongError, UnknownResidueError)
"""Errors that say what one model, on this machine, cannot do; all others end the comparison."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of models, as users name them, on benchmarks."""

    models: Sequence[str]
    benchmarks: Sequence[ComparedBenchmark]
    output: Path
    load: ModelLoader
    overwrite: bool = False
    progress: Progress = SILENT

    def __call__(self) -> Compared:
        """Compute what is not computed yet, and write the tables.

        Raises:
            UsageError: a model is unknown or named twice, or there is no benchmark.
            OutputError: OUT is of something else, or a finished cell is of other settings, weights or files.
        """
        if not self.benchmarks:
            raise UsageError("no benchmark: add --structures DIR, --proteingym DIR, --flip DIR or --sequences FASTA")
        check_output(self.output, overwrite=True, ours=_is_ours)
        for benchmark in self.benchmarks:
            benchmark.check()
        models = described(self.models)
        settings = {"command": "compare", "models": list(self.models), "computed_in": self.load.dtype}
        settings["benchmarks"] = [benchmark.name for benchmark in self.benchmarks]
        with WorkFolder(self.output) as work:
            try:
                self.output.mkdir(exist_ok=True)
                write_run(self.output / TABLE, settings)
                cells = list(self._cells(models))
                compared = Compared(models, cells, list(self._differences(models, cells)))
                self._write(compared, settings)
            finally:
                work.remove()
        return compared

    def _write(self, compared: Compared, settings: dict[str, Any]) -> None:
        """Write the tables and the page; ``compare.csv``, with the settings, comes last."""
        title = f"{self.output.name}: {counted(len(compared.models), 'model')}"
        write_durably(self.output / JSON, json.dumps(compared.as_json(), indent=2) + "\n")
        write_durably(self.output / PAGE, page(compared, title))
        write_table(self.output / DIFFERENCES, _table(PAIR, compared.pairs()))
        beside = Beside("model\twhat\tdetail", list(_report(compared.cells)), settings)
        write_table(self.output / TABLE, _table(ROW, compared.rows()), beside)

    def _cells(self, models: Sequence[ComparedModel]) -> Iterator[Cell]:
        total, number = len(models) * len(self.benchmarks), 0
        for benchmark in self.benchmarks:
            for model in models:
                number += 1
                if reason := model.lacks.get(benchmark.needs):
                    yield Cell(model, benchmark.name, (), reason)
                else:
                    self.progress.note(f"{model.name}: {benchmark.name} ({number:,} of {total:,})")
                    yield self._cell(model, benchmark)

    def _cell(self, model: ComparedModel, benchmark: ComparedBenchmark) -> Cell:
        folder = self._folder(model)
        folder.mkdir(exist_ok=True)
        try:
            how = {"load": self.load, "overwrite": self.overwrite, "progress": self.progress}
            benchmark.compute(model.model, folder, **how)
        except (FinishedError, PartlyFailedError):
            self.progress.note(f"{model.name}: {benchmark.name}: computed before")
        except CapabilityError as error:
            return Cell(model, benchmark.name, (), str(error))
        except _OF_THE_MODEL as error:
            return Cell(model, benchmark.name, (), str(error), failed=str(error))
        output = benchmark.output(folder)
        numbers = list(benchmark.numbers(folder, model.known))
        failed = read_run(output).get(FAILED)
        failed = f"{failed}; see {output}.report.tsv" if failed else ""
        if all(isnan(number.value) for number in numbers):
            return Cell(model, benchmark.name, (), failed or f"nothing could be measured; see {output}", failed)
        return Cell(model, benchmark.name, numbers, failed=failed)

    def _folder(self, model: ComparedModel) -> Path:
        return self.output / file_name(model.name)

    def _differences(self, models: Sequence[ComparedModel], cells: Sequence[Cell]) -> Iterator[tuple[str, str, Paired]]:
        """The differences of all pairs of models, of each benchmark that has numbers of both."""
        there = {(cell.model.name, cell.benchmark) for cell in cells if cell.numbers}
        for benchmark in self.benchmarks:
            for minus, model in combinations(models, 2):
                if {(model.name, benchmark.name), (minus.name, benchmark.name)} <= there:
                    folders = self._folder(model), self._folder(minus)
                    for pair in benchmark.differences(*folders, self.progress):
                        yield model.name, minus.name, pair


def described(names: Sequence[str]) -> list[ComparedModel]:
    """The models, without their weights; a ``ProteaError`` for a wrong name, or for a model that is named twice."""
    paths = {name: locate(name) for name in names}
    if len({path.resolve() for path in paths.values()}) < len(names):
        raise UsageError(f"-m {' -m '.join(names)}: a model is named twice; name each model once")
    bases = {name: Path(name).name or path.resolve().name for name, path in paths.items()}
    alike = [base for base in bases.values() if list(bases.values()).count(base) > 1]
    models = []
    for name, path in paths.items():
        with open_checkpoint(path) as checkpoint:
            module = checkpoint.model
        lacks = {}
        for capability in ("contacts", "logits"):
            try:
                module.require(capability)
            except ProteaError as error:
                lacks[capability] = str(error)
        known = licence_of(name, path, module)
        forbids = f" ({known['restriction']})" if known.get("restriction") else ""
        models.append(
            ComparedModel(
                name,
                name if bases[name] in alike else bases[name],
                parameter_count(module),
                module.config.family,
                (known.get("licence") or "not stated") + forbids,
                published_name(name, module),
                lacks,
            )
        )
    return models


def _is_ours(path: Path) -> bool:
    return path.is_dir() and (run_path(path / TABLE).is_file() or not any(path.iterdir()))


def _table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> pa.Table:
    found = list(rows)
    return pa.table({name: pa.array([row.get(name) for row in found]) for name in columns})


def _report(cells: Iterable[Cell]) -> Iterator[tuple[str, str, str]]:
    for cell in cells:
        if cell.reason:
            yield cell.model.name, f"{cell.benchmark}: not measured", cell.reason
        elif cell.failed:
            yield cell.model.name, f"{cell.benchmark}: in part", cell.failed
