"""Published figures of published models, by the benchmark and the number that they are of.

``figures.tsv`` holds figures with their source. ``names.tsv`` says what other tables call a published model: the table
of FLIP's figures (``finetune/published.tsv``), and the columns ``spearman NAME`` of ProteinGym's assays.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from protea.checkpoints.hub import architecture, published_models, short_name
from protea.checkpoints.summary import same_shape
from protea.models.encoder import Encoder
from protea.tables import read_table

FIGURES: Final = Path(__file__).with_name("figures.tsv")
NAMES: Final = Path(__file__).with_name("names.tsv")


class Figure(NamedTuple):
    """A published value, where it is from, and what it does not share with ours, as far as known."""

    value: float
    source: str
    differs: str


def published_name(model: str, module: Encoder) -> str | None:
    """The published model that a name means, or that a checkpoint is named after and has the shape of."""
    models = published_models()
    if short_name(model) in models:
        return short_name(model)
    base = Path(model).name.split(".")[0]
    return base if base in models and same_shape(module, architecture(models[base])) else None


def figures(known: str | None, benchmark: str, number: str) -> list[Figure]:
    """The figures of a published model for a number of a benchmark."""
    wanted = {"model": known, "benchmark": benchmark, "number": number}
    rows = (row for row in _rows(FIGURES) if all(row[name] == value for name, value in wanted.items()))
    return [Figure(float(row["value"]), row["source"], row["differs"]) for row in rows]


def called(known: str | None, table: str) -> str:
    """What a table, ``flip`` or ``proteingym``, calls a published model; empty if it does not have it."""
    return next((row[table] for row in _rows(NAMES) if row["model"] == known), "")


@cache
def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    return rows
