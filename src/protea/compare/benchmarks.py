"""Contacts, deep mutational scans and perplexity as benchmarks. Each calls the function of its own command.

So a model's folder holds what ``protea evaluate contacts -o contacts.csv``, ``protea evaluate proteingym -o
proteingym.csv`` and ``protea perplexity -o perplexity.csv`` write, and these find out what is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from protea.alphabet import ESM
from protea.compare.measured import ComparedBenchmark, Items, as_float
from protea.compare.published import Figure, called
from protea.contacts.precision import mean
from protea.contacts.structure_run import evaluate_structures
from protea.contacts.structures import structure_files
from protea.evaluate.proteingym import PUBLISHED, assay_table, evaluate_assays, read_assays
from protea.score.effects import Scoring
from protea.score.perplexity import measure_perplexity, of_loss
from protea.score.proteins import AS_USUAL, read_proteins


@dataclass(frozen=True)
class Contacts(ComparedBenchmark):
    """Long-range P@L on structures: the mean over chains."""

    structures: Sequence[Path]

    name: ClassVar = "contacts"
    needs: ClassVar = "contacts"
    number: ClassVar = "long P@L"
    unit: ClassVar = "chain"

    def check(self) -> None:
        """Refuse structures that are absent."""
        structure_files(self.structures)

    def compute(self, model: str, folder: Path, **how: Any) -> None:
        """Do what ``protea evaluate contacts`` does."""
        evaluate_structures(self.structures, [], model=model, output=self.output(folder), **how)

    def items(self, folder: Path) -> Items:
        """The chains."""
        return Items.of_values({row["name"]: as_float(row["long_P@L"]) for row in self.rows(folder)})


@dataclass(frozen=True)
class Scans(ComparedBenchmark):
    """Spearman's correlation on deep mutational scans: the mean over proteins, each by the mean over its scans."""

    folder: Path
    assays: Sequence[str] | None = None
    method: str = "masked-marginals"

    name: ClassVar = "proteingym"
    needs: ClassVar = "logits"
    number: ClassVar = "spearman"
    unit: ClassVar = "protein"

    def check(self) -> None:
        """Refuse a folder without scans, and unknown assays."""
        read_assays(self.folder, self.assays)
        Scoring(method=self.method)

    def compute(self, model: str, folder: Path, **how: Any) -> None:
        """Do what ``protea evaluate proteingym`` does."""
        assays, scoring = read_assays(self.folder, self.assays), Scoring(method=self.method)
        evaluate_assays(self.folder, assays, scoring, models=[model], output=self.output(folder), **how)

    def items(self, folder: Path) -> Items:
        """The proteins."""
        return Items.of_values(self._by_protein(folder, self.number))

    def published(self, folder: Path, known: str | None) -> Sequence[Figure]:
        """The mean of a column of published correlations, over the same scans."""
        column = called(known, self.name)
        value, _, _, count = mean(list(self._by_protein(folder, f"{PUBLISHED}{column}").values()))
        differs = "" if count == len(self.items(folder).parts) else f"proteins: {count:,}"
        return [Figure(value, f"{column} in {assay_table(self.folder).name}", differs)] if count else []

    def _by_protein(self, folder: Path, column: str) -> dict[str, float]:
        """The mean over the scans of each protein, of those that the model scored and the column has."""
        values: dict[str, list[float]] = {}
        for row in self.rows(folder):
            value = as_float(row.get(column))
            if not isnan(value) and not isnan(as_float(row[self.number])):
                values.setdefault(row["protein"], []).append(value)
        return {protein: float(np.mean(found)) for protein, found in values.items()}


@dataclass(frozen=True)
class Perplexity(ComparedBenchmark):
    """Perplexity of masked residues of FASTA files.

    The same residues are masked for all models, but a model with another limit or alphabet lacks some of them.
    Differences are over the sequences of which both models predicted equally many.
    """

    inputs: Sequence[str]

    name: ClassVar = "perplexity"
    needs: ClassVar = "logits"
    number: ClassVar = "perplexity"
    unit: ClassVar = "sequence"

    def check(self) -> None:
        """Refuse files that are absent or damaged."""
        read_proteins(self.inputs, ESM, AS_USUAL, [])

    def compute(self, model: str, folder: Path, **how: Any) -> None:
        """Do what ``protea perplexity`` does."""
        measure_perplexity(self.inputs, model=model, output=self.output(folder), **how)

    def items(self, folder: Path) -> Items:
        """The sequences, by their number, with what they add to the loss, and how many residues were predicted."""
        parts = {}
        for place, row in enumerate(self.rows(folder)):
            if predicted := int(row["predicted"]):
                parts[f"{place:012}"] = (float(row["loss"]) * predicted, float(predicted))
        return Items(parts, of_loss)
