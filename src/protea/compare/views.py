"""A comparison for people: one table with a column for each model, and a page with pictures.

Rows are numbers. Published figures stand in rows of their own below them. What needs more words than a cell has is a
note with a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan
from typing import Final, NamedTuple

from protea.compare.compared import Cell, Compared
from protea.compare.measured import LOWER_IS_BETTER, Number
from protea.plot.charts import Bar, Markup, bars, element, number_text
from protea.plot.documents import document, html_table, section
from protea.text import counted

NOTHING: Final = "-"
FEW: Final = 10
"""Items below which an interval over them is too narrow to be trusted."""
PAIRS: Final = ("benchmark", "number", "models", "difference (95 % interval)", "flips", "items")


class Grid(NamedTuple):
    """A table: its header, its rows, and notes that its cells name by number."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def grid(compared: Compared) -> Grid:
    """One column for each model; rows for size and licence, for each number, and for its published figures."""
    notes = _Notes()
    names = [model.name for model in compared.models]
    rows = [
        ["parameters", *(f"{model.parameters:,}" for model in compared.models)],
        ["licence", *(model.licence for model in compared.models)],
    ]
    for benchmark in dict.fromkeys(cell.benchmark for cell in compared.cells):
        cells = {cell.model.name: cell for cell in compared.cells if cell.benchmark == benchmark}
        numbers = {name: {(one.benchmark, one.name): one for one in cells[name].numbers} for name in names}
        for key in dict.fromkeys(key for name in names for key in numbers[name]) or [(benchmark, "")]:
            found = {name: numbers[name].get(key) for name in names}
            values = [_value(found[name], cells[name], notes) for name in names]
            rows.append([_title(key, found.values()) + _told(found.values(), notes), *values])
            rows += _published(found, notes)
    return Grid(["", *names], rows, notes.texts())


class _Notes:
    """Texts, each once, with a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        return f" [{self._numbers.setdefault(text, len(self._numbers) + 1)}]" if text else ""

    def texts(self) -> list[str]:
        return [f"[{number}] {text}" for text, number in self._numbers.items()]


def _title(key: tuple[str, str], numbers: Iterable[Number | None] = ()) -> str:
    """What a number is of: benchmark, name, and how many items it is over."""
    benchmark, name = key
    counts = [(number.size, number.unit) for number in numbers if number is not None]
    told = [*dict.fromkeys(counted(*one) for one in counts), *(["lower is better"] if name in LOWER_IS_BETTER else [])]
    named = benchmark if name in ("", benchmark) else f"{benchmark}: {name}"
    return f"{named} ({', '.join(told)})" if told else named


def _told(numbers: Iterable[Number | None], notes: _Notes) -> str:
    """Notes on what a row's numbers cannot tell."""
    there = [number for number in numbers if number is not None]
    few = [number for number in there if number.size < FEW and not isnan(number.low)]
    told = notes(f"fewer than {FEW} items: intervals over them are too narrow" if few else "")
    predicted = sorted({number.predicted for number in there if number.predicted is not None})
    if len(predicted) > 1:
        told += notes(
            f"the models predicted {' or '.join(f'{count:,}' for count in predicted)} residues, since they cut long "
            "sequences elsewhere or know other letters; the differences below are over the same residues"
        )
    return told


def _value(number: Number | None, cell: Cell, notes: _Notes) -> str:
    if cell.reason:
        return NOTHING + notes(f"{cell.model.name}: {cell.reason}")
    told = notes(f"{cell.model.name}, {cell.benchmark}: {cell.failed}" if cell.failed else "")
    return (NOTHING if number is None else number_text(*number[2:5])) + told


def _published(found: dict[str, Number | None], notes: _Notes) -> list[list[str]]:
    """A row for each source, with a model's figure in its column."""
    sources = dict.fromkeys(figure.source for number in found.values() if number for figure in number.published)
    rows = []
    for source in sources:
        cells = []
        for number in found.values():
            figures = [figure for figure in (number.published if number else ()) if figure.source == source]
            told = (f"{number_text(figure.value)}{notes(figure.differs)}" for figure in figures)
            cells.append(", ".join(told))
        rows.append([f"  published: {source}", *cells])
    return rows


def pairs(compared: Compared) -> list[list[str]]:
    """The differences between models in words, columns as in ``PAIRS``."""
    rows = []
    for model, minus, (benchmark, name, difference, count) in compared.differences:
        flips = NOTHING if isnan(difference.low) else f"{difference.flips:.3f}"
        value = number_text(*difference[:3]) if count else "nothing that both measured alike"
        items = f"{count:,} (few: the interval is too narrow)" if 1 < count < FEW else f"{count:,}"
        cells = (f"{model} minus {minus}", value, flips, items)
        rows.append([benchmark, name, *cells])
    return rows


def page(compared: Compared, title: str) -> str:
    """A page in HTML: the table, a picture of each number, and the differences between models."""
    shown = grid(compared)
    notes = element("ul", *(element("li", note) for note in shown.notes)) if shown.notes else None
    told = "95 % intervals in parentheses: what another draw of chains, proteins or sequences could have given."
    colours = "Blue: measured here. Grey: published figures; the notes of the table say how they differ."
    drawn = section("Pictures", colours, *_pictures(compared))
    words = (
        "Both models are measured on the same resamples, so a difference has its own 95 % interval. If it holds 0, the "
        "two are not distinguishable. Flips: share of resamples with no difference or the other sign."
    )
    differences = section("Differences", words, html_table(PAIRS, pairs(compared))) if compared.differences else None
    return document(title, [section("Numbers", told, html_table(shown.header, shown.rows), notes), drawn, differences])


def _pictures(compared: Compared) -> list[Markup]:
    """Bars of each number: a model's own, and the figures that were published for it."""
    found: dict[str, list[Bar]] = {}
    for cell in compared.cells:
        for number in cell.numbers:
            drawn = found.setdefault(_title((number.benchmark, number.name)), [])
            drawn.append(Bar(cell.model.name, number.value, number.low, number.high, ours=True))
            drawn += [Bar(f"{cell.model.name}, {figure.source}", figure.value) for figure in number.published]
    return [element("figure", element("figcaption", title), bars(title, title, rows)) for title, rows in found.items()]
