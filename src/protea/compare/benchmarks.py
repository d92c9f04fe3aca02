"""Contacts, deep mutational scans and perplexity as benchmarks. Each calls the function of its own command.

So a model's folder holds what ``protea evaluate contacts -o contacts.csv``, ``protea evaluate proteingym -o
proteingym.csv`` and ``protea perplexity -o perplexity.csv`` write, and these find out what is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from protea.alphabet import ESM
from protea.compare.measured import Computing, Items, Number, Paired, interval, paired
from protea.compare.published import Figure, called, figures
from protea.contacts.precision import mean
from protea.contacts.structure_run import evaluate_structures
from protea.contacts.structures import structure_files
from protea.errors import DataError
from protea.evaluate.proteingym import PUBLISHED, Assay, assay_table, evaluate_assays
from protea.finetune.bootstrap import Difference
from protea.progress import Progress
from protea.score.effects import Scoring
from protea.score.perplexity import measure_perplexity, of_loss
from protea.score.proteins import AS_USUAL, read_proteins
from protea.tables import read_table

_UNDEFINED: Final = Difference(nan, nan, nan, 0, nan)


class TableBenchmark:
    """A benchmark whose command writes one table with a row for each item, or for several that make one."""

    name: ClassVar[str]

    def output(self, folder: Path) -> Path:
        """The table in a model's folder that the numbers are read from."""
        return folder / f"{self.name}.csv"

    def sources(self, folder: Path) -> list[Path]:
        """The files in a model's folder that differences are computed from."""
        return [self.output(folder)]

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """The rows of the table."""
        return read_table(self.output(folder)).to_pylist()


@dataclass(frozen=True)
class Contacts(TableBenchmark):
    """Long-range P@L on structures: the mean over chains."""

    structures: Sequence[Path]

    name: ClassVar = "contacts"
    needs: ClassVar = "contacts"
    _NUMBER: ClassVar = "long P@L"

    def check(self) -> None:
        """Refuse structures that are absent."""
        structure_files(self.structures)

    def compute(self, model: str, folder: Path, how: Computing) -> None:
        """Do what ``protea evaluate contacts`` does."""
        evaluate_structures(
            self.structures,
            [],
            model=model,
            output=self.output(folder),
            overwrite=how.overwrite,
            load=how.load,
            progress=how.progress,
        )

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The mean, with the interval of ``protea evaluate contacts``."""
        value, low, high, count = mean(list(self._values(folder).values()))
        yield _number(
            self.name, self._NUMBER, (value, low, high), count, "chain", figures(known, self.name, self._NUMBER)
        )

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """On the chains that both models predict."""
        ours, theirs = (Items.of_values(self._values(place)) for place in (folder, other))
        yield paired(self.name, self._NUMBER, ours, theirs)

    def _values(self, folder: Path) -> dict[str, float]:
        return {row["name"]: _float(row["long_P@L"]) for row in self.rows(folder)}


@dataclass(frozen=True)
class Scans(TableBenchmark):
    """Spearman's correlation on deep mutational scans: the mean over proteins, each by the mean over its scans."""

    folder: Path
    assays: Sequence[Assay]
    how: Scoring

    name: ClassVar = "proteingym"
    needs: ClassVar = "logits"
    _NUMBER: ClassVar = "spearman"

    def check(self) -> None:
        """Refuse a choice of assays without any scan."""
        if not any(assay.path.exists() for assay in self.assays):
            raise DataError(f"{self.folder}: has none of the scans, such as {self.assays[0].path.name}")

    def compute(self, model: str, folder: Path, how: Computing) -> None:
        """Do what ``protea evaluate proteingym`` does."""
        evaluate_assays(
            self.folder,
            self.assays,
            self.how,
            models=[model],
            output=self.output(folder),
            overwrite=how.overwrite,
            load=how.load,
            progress=how.progress,
        )

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The mean; the published one is over the same scans."""
        values = self._by_protein(folder, self._NUMBER)
        value, low, high, count = mean(list(values.values()))
        published = []
        if column := called(known, self.name):
            theirs = mean(list(self._by_protein(folder, f"{PUBLISHED}{column}").values()))
            source = f"{column} in {assay_table(self.folder).name}"
            published = [Figure(theirs.value, source, "" if theirs.chains == count else f"{theirs.chains} proteins")]
        published = [figure for figure in published if not isnan(figure.value)]
        yield _number(self.name, self._NUMBER, (value, low, high), count, "protein", published)

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """On the proteins that both models score."""
        ours, theirs = (Items.of_values(self._by_protein(place, self._NUMBER)) for place in (folder, other))
        yield paired(self.name, self._NUMBER, ours, theirs)

    def _by_protein(self, folder: Path, column: str) -> dict[str, float]:
        """The mean over the scans of each protein, of those that the model scored and the column has."""
        values: dict[str, list[float]] = {}
        for row in self.rows(folder):
            value = _float(row.get(column))
            if not isnan(value) and not isnan(_float(row[self._NUMBER])):
                values.setdefault(row["protein"], []).append(value)
        return {protein: float(np.mean(found)) for protein, found in values.items()}


@dataclass(frozen=True)
class Perplexity(TableBenchmark):
    """Perplexity of masked residues of FASTA files."""

    inputs: Sequence[str]

    name: ClassVar = "perplexity"
    needs: ClassVar = "logits"

    def check(self) -> None:
        """Refuse files that are absent or damaged."""
        read_proteins(self.inputs, ESM, AS_USUAL, [])

    def compute(self, model: str, folder: Path, how: Computing) -> None:
        """Do what ``protea perplexity`` does."""
        measure_perplexity(
            self.inputs,
            model=model,
            output=self.output(folder),
            overwrite=how.overwrite,
            load=how.load,
            progress=how.progress,
        )

    def numbers(self, folder: Path, known: str | None) -> Iterator[Number]:
        """The perplexity of all residues together, with an interval by bootstrap over sequences."""
        items = self._items(folder)
        published = figures(known, self.name, self.name)
        yield _number(self.name, self.name, interval(items), len(items.parts), "sequence", published)

    def differences(self, folder: Path, other: Path, progress: Progress) -> Iterator[Paired]:
        """On the same masks alone: perplexities of other residues are not compared."""
        ours, theirs = self._items(folder), self._items(other)
        counts = ({name: weight for name, (_, weight) in items.parts.items()} for items in (ours, theirs))
        if len({tuple(sorted(of.items())) for of in counts}) > 1:
            progress.note(
                f"perplexity: {folder.name} and {other.name} predicted other residues, because their limits or their "
                "tokens around a sequence differ; no difference is computed"
            )
            yield Paired(self.name, self.name, _UNDEFINED, 0)
        else:
            yield paired(self.name, self.name, ours, theirs)

    def _items(self, folder: Path) -> Items:
        """By the number of the sequence; a sequence of which nothing is masked does not count."""
        rows = enumerate(self.rows(folder))
        parts = {
            f"{place:012}": (_float(row["loss"]) * int(row["predicted"]), float(row["predicted"]))
            for place, row in rows
        }
        return Items({name: part for name, part in parts.items() if part[1]}, of_loss)


def _number(
    benchmark: str, name: str, value: Sequence[float], count: int, unit: str, published: Sequence[Figure]
) -> Number:
    """A number; a single item has no interval."""
    of, low, high = value
    low, high = (low, high) if count > 1 else (nan, nan)
    return Number(benchmark, name, of, low, high, count, unit, published)


def _float(cell: str | None) -> float:
    return float(cell) if cell else nan
