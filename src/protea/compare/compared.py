"""The result of a comparison: models, what each gave on each benchmark, and differences between models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Final, NamedTuple

from protea.compare.measured import Number, Paired

ROW: Final = (
    *("model", "parameters", "licence", "benchmark", "number", "value", "low", "high", "items", "unit", "predicted"),
    *("published", "source", "differs", "reason"),
)
"""Columns of the table of numbers."""
PAIR: Final = ("model", "minus", "benchmark", "number", "difference", "low", "high", "flips", "items")
"""Columns of the table of differences."""


class ComparedModel(NamedTuple):
    """A model: what the user typed, its name here, its size, licence and what it lacks."""

    model: str
    name: str
    parameters: int
    family: str
    licence: str
    known: str | None
    lacks: Mapping[str, str]


class Cell(NamedTuple):
    """A model on a benchmark: its numbers, or the reason why there are none; ``failed`` says what was left out."""

    model: ComparedModel
    benchmark: str
    numbers: Sequence[Number]
    reason: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Compared:
    """All cells, and the differences between models: of each pair, the later one minus the earlier one."""

    models: Sequence[ComparedModel]
    cells: Sequence[Cell]
    differences: Sequence[tuple[str, str, Paired]] = ()

    @property
    def failed(self) -> bool:
        """Whether something was not computed although the model can do it, or was left out."""
        return any(cell.failed for cell in self.cells)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each number of a model and each source of published figures, or for the reason of a missing one."""
        for cell in self.cells:
            model = {"model": cell.model.name, "parameters": cell.model.parameters, "licence": cell.model.licence}
            if cell.reason:
                yield model | {"benchmark": cell.benchmark, "reason": cell.reason}
            for number in cell.numbers:
                row = model | {"benchmark": number.benchmark, "number": number.name}
                row |= _finite(number, "value", "low", "high")
                row |= {"items": number.size, "unit": number.unit, "predicted": number.predicted}
                row["reason"] = cell.failed
                if not number.published:
                    yield row
                for figure in number.published:
                    yield row | {"published": figure.value, "source": figure.source, "differs": figure.differs}

    def pairs(self) -> Iterator[dict[str, Any]]:
        """A row for each difference."""
        for model, minus, (benchmark, name, difference, count) in self.differences:
            values = _finite(difference, "value", "low", "high", "flips")
            cells = (model, minus, benchmark, name, *values.values(), count)
            yield dict(zip(PAIR, cells, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        models = [model._asdict() for model in self.models]
        return {"models": models, "numbers": list(self.rows()), "differences": list(self.pairs())}


def _finite(values: Any, *names: str) -> dict[str, float | None]:
    """Fields of a tuple; ``None`` for NaN."""
    return {name: None if isnan(getattr(values, name)) else getattr(values, name) for name in names}
