"""Labels as files hold them, the task that they are of, and the numbers that they become.

A label is text, or a list of texts: one for each residue, or the labels of a multilabel task. ``MISSING_LABELS`` and
masked residues are missing; they carry no loss.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protea.errors import DataError
from protea.finetune.tasks import MISSING, TASKS, Part, Task
from protea.letters import ReportRow
from protea.text import counted, shown

MISSING_LABELS: Final = frozenset(
    ("", "NA", "NaN", "nan", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>", "?"),
)
"""Labels that say that there is none; also ``NaN`` in any case where numbers stand."""

_WHOLE: Final = re.compile(r"[+-]?\d+(?:\.0+)?")
_MOST_CLASSES: Final = 20  # more whole numbers than these are rather measurements
_LONGEST_NUMBER: Final = 25  # in letters; longer digits are rather classes of residues
_SHORT: Final = 10  # residues, on average
_NAMES: Final = 10  # as many classes or more, each of which occurs once, are rather names
_YES, _NO = ("1", "1.0", "true", "True", "TRUE"), ("0", "0.0", "false", "False", "FALSE")


@dataclass(slots=True)
class RawExample:
    """An example whose label is not understood yet.

    ``kept`` ``[n]`` says which of the n residues in the file remain in ``sequences[0]``; ``None`` if all do.
    """

    id: str
    sequences: tuple[str, ...]
    place: str
    part: Part = ""
    target: str | list[str] = ""
    mask: str = ""
    kept: NDArray[np.bool_] | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """The residues in the file, and those that remain; labels may have either number."""
        remaining = len(self.sequences[0])
        return (remaining if self.kept is None else len(self.kept)), remaining

    @property
    def missing(self) -> bool:
        """Whether it has no label at all."""
        return isinstance(self.target, str) and self.target in MISSING_LABELS


@dataclass
class Raw:
    """The examples of some files; ``columns`` names the labels of a multilabel task with a column for each."""

    examples: list[RawExample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[ReportRow] = field(default_factory=list)
    columns: tuple[str, ...] = ()

    def add(self, other: Raw, place: str) -> None:
        """Append the examples of another file."""
        if self.examples and self.columns != other.columns:
            raise DataError(f"{place}: its columns of targets are not those of the files before; give them one form")
        self.columns = other.columns
        self.examples += other.examples
        self.notes += other.notes
        self.rows += other.rows


class Numbered(NamedTuple):
    """Labels as numbers: ``classes`` and ``targets`` as in ``Labelled``, and a note about what is missing."""

    classes: tuple[str, ...]
    targets: list[NDArray[np.float64] | NDArray[np.int64]]
    notes: list[str]


# ---- reading one label ----
def by_residue(example: RawExample) -> list[str]:
    """The label of each residue: a list, values between ``;`` or blanks, or one letter each; a number is one label."""
    target = listed(example)
    if not isinstance(target, str):
        return target
    if ";" in target:
        items = [item.strip() for item in target.split(";")]
        # A last ";" may end the list, or stand before a missing label.
        return items[:-1] if not items[-1] and len(items) not in example.lengths else items
    if " " in target:
        return target.split()
    return [target] if len(target) not in example.lengths and number(target) is not None else list(target)


def listed(example: RawExample) -> str | list[str]:
    """The target, as a list if it is written as one in JSON."""
    target = example.target
    if not (isinstance(target, str) and target.startswith("[") and target.endswith("]")):
        return target
    try:
        items = json.loads(target)
    except json.JSONDecodeError as error:
        if len(target) in example.lengths:
            return target
        raise DataError(
            f"{example.place}: target {shown(target)} is not a list in JSON: {error}; correct it"
        ) from error
    return ["" if item is None else str(item) for item in items]


def _several(example: RawExample) -> list[str]:
    """The labels of an example of a multilabel task."""
    target = listed(example)
    items = re.split(r"[;|]", target) if isinstance(target, str) else target
    return [item.strip() for item in items if item.strip()]


def number(text: str) -> float | None:
    """The number that a text stands for, NaN if it is missing; ``None`` if it is no number."""
    if text in MISSING_LABELS:
        return nan
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


# ---- which task ----
def detect(raw: Raw, *, separate: bool) -> tuple[Task, str]:
    """The task of the data and the reason in words; ``separate``: the labels lie in a FASTA file of their own."""
    examples = [example for example in raw.examples if not example.missing]
    if not examples:
        raise DataError(f"{raw.examples[0].place}: all labels are missing, here and in all other records; add labels")
    if raw.columns:
        return TASKS["multilabel"], f"there are {len(raw.columns)} columns of targets"
    unit = "pair" if len(raw.examples[0].sequences) == 2 else "sequence"
    if separate:
        return _residue_task(examples, "the labels are in a file of their own")
    if unit == "sequence" and _fit_residues(examples):
        return _residue_task(examples, "every target has as many letters or items as its sequence")
    if any(not isinstance(target := listed(example), str) or re.search(r"[;|]", target) for example in examples):
        if unit == "pair":
            raise DataError(f"{examples[0].place}: pairs with several labels are not supported; give one label a pair")
        return TASKS["multilabel"], "targets hold several labels, separated by ; or | or in a list"
    return _whole_task(unit, examples)


def _fit_residues(examples: list[RawExample]) -> bool:
    """Whether the targets have a label for each residue; if most do, those that do not are errors.

    With short sequences the name of a class may fit by chance; then all targets must fit, and few be the same.
    """
    fitting = sum(len(by_residue(example)) in example.lengths for example in examples)
    short = sum(len(example.sequences[0]) for example in examples) < _SHORT * len(examples)
    plain = [example.target for example in examples if isinstance(example.target, str)]
    if len(plain) == len(examples) and all(
        number(text) is not None and len(text) < _LONGEST_NUMBER and ";" not in text for text in plain
    ):
        return fitting == len(examples) and all(_WHOLE.fullmatch(text) and len(text) > 3 for text in plain)
    if short:
        different = len({str(example.target) for example in examples})
        return fitting == len(examples) and 2 * different > len(examples)
    return 2 * fitting > len(examples)


def _residue_task(examples: list[RawExample], why: str) -> tuple[Task, str]:
    """Classes, unless the items are numbers of more than one letter that are rather values."""
    counts = Counter(item for example in examples for item in by_residue(example) if item not in MISSING_LABELS)
    if counts and max(map(len, counts)) > 1 and all(number(item) is not None for item in counts):
        if not _few_whole(counts):
            return TASKS["residue-value"], f"{why}, and they are numbers"
        return TASKS["residue-class"], f"{why}, and they are {_whole_words(counts, 'residue-value')}"
    return TASKS["residue-class"], why


def _whole_task(unit: str, examples: list[RawExample]) -> tuple[Task, str]:
    """The task of examples with one label each."""
    counts = Counter(str(example.target) for example in examples)
    numbers = {text for text in counts if number(text) is not None}
    if len(numbers) == len(counts):
        if _few_whole(counts):
            return TASKS[f"{unit}-class"], f"the targets are {_whole_words(counts, f'{unit}-value')}"
        return TASKS[f"{unit}-value"], "every target is a number"
    if all(number(text.replace(",", ".")) is not None for text in counts):
        comma = next(example for example in examples if example.target not in numbers)
        raise DataError(
            f"{comma.place}: target {shown(comma.target)} has a comma; write numbers like 1.5 and 1000, or pass --task "
            f"{unit}-class"
        )
    if len(numbers) > max(_MOST_CLASSES, len(counts) / 2):
        wrong = next(example for example in examples if example.target not in numbers)
        raise DataError(
            f"{wrong.place}: target {shown(wrong.target)} is not a number, but {len(numbers):,} other targets are; "
            f"correct it or leave it empty, or pass --task {unit}-class"
        )
    if len(counts) >= _NAMES and len(counts) == len(examples):
        raise DataError(
            f"{examples[0].place}: each of the {len(counts)} targets occurs once, as {shown(examples[0].target)} does; "
            f"name the column of the labels, or pass --task {unit}-class"
        )
    return TASKS[f"{unit}-class"], f"the targets are {counted(len(counts), 'different text')}"


def _few_whole(counts: Counter[str]) -> bool:
    few = len(counts) <= min(_MOST_CLASSES, counts.total() / 2)
    return few and all(map(_WHOLE.fullmatch, counts))


def _whole_words(counts: Counter[str], other: str) -> str:
    return f"{counted(len(counts), 'distinct whole number')}: classes; pass --task {other} if they are values"


# ---- labels as numbers ----
def numbered(task: Task, raw: Raw) -> Numbered:
    """The targets of all examples; an error names the record, its label and the fix."""
    if task.unit == "residue":
        return _residues(task, raw.examples)
    if masked := next((example for example in raw.examples if example.mask), None):
        raise DataError(f"{masked.place}: a mask needs a residue task, this is {task.name}; remove the mask")
    if task.kind == "labels":
        return _multilabel(raw)
    cells = [[_one(example)] for example in raw.examples]
    result = _classes(cells) if task.kind == "class" else _values(cells, raw.examples)
    missing = sum(len(row) - int(_known(row).sum()) for row in result.targets)
    return _with_note(result, missing, len(cells), "target")


def _one(example: RawExample) -> str:
    target = listed(example)
    if isinstance(target, str):
        return target
    if len(target) == 1:
        return target[0]
    raise DataError(f"{example.place}: {len(target)} labels instead of one; pass --task multilabel")


def _residues(task: Task, examples: list[RawExample]) -> Numbered:
    rows = [_residue_row(example) for example in examples]
    result = _classes(rows) if task.kind == "class" else _values(rows, examples)
    missing = sum(len(row) - int(_known(row).sum()) for row in result.targets)
    return _with_note(result, missing, sum(map(len, rows)), "residue label")


def _residue_row(example: RawExample) -> list[str]:
    """A label for each remaining residue, ``""`` where none is known."""
    if example.missing:
        return [""] * len(example.sequences[0])
    labels = _remaining(example, by_residue(example), "labels")
    if example.mask:
        mask = _remaining(example, list(example.mask), "letters in the mask")
        if strange := set(mask) - {"0", "1"}:
            raise DataError(f"{example.place}: the mask holds {shown(min(strange))}; write 1 for residues that count")
        labels = [label if flag == "1" else "" for label, flag in zip(labels, mask, strict=True)]
    return labels


def _remaining(example: RawExample, items: list[str], noun: str) -> list[str]:
    """The items of the residues that remain; items may have been given for these alone."""
    file_length, length = example.lengths
    if len(items) not in (file_length, length):
        residues = counted(file_length, "residue")
        if file_length != length:
            residues += f" ({length:,} after gaps and stops are removed)"
        raise DataError(f"{example.place}: {len(items):,} {noun} for {residues}; give one for each residue")
    if len(items) == length or example.kept is None:
        return items
    return [item for item, kept in zip(items, example.kept.tolist(), strict=True) if kept]


def _classes(rows: Sequence[Sequence[str]]) -> Numbered:
    found = {item for row in rows for item in row} - MISSING_LABELS
    renamed, notes = dict(zip(found, found, strict=True)), []
    if any("." in item for item in found) and all(map(_WHOLE.fullmatch, found)):
        renamed = {item: str(int(float(item))) for item in found}
        notes.append("classes: whole numbers that are written like 1.0 are named like 1")
    classes = tuple(sorted(set(renamed.values())))
    places = {name: place for place, name in enumerate(classes)}
    codes = {item: places[name] for item, name in renamed.items()}
    targets = [np.array([codes.get(item, MISSING) for item in row], np.int64) for row in rows]
    return Numbered(classes, [*targets], notes)


def _values(rows: Sequence[Sequence[str]], examples: Sequence[RawExample]) -> Numbered:
    targets = []
    for row, example in zip(rows, examples, strict=True):
        values = [_value(item, example) for item in row]
        targets.append(np.array(values, np.float64))
    return Numbered((), [*targets], [])


def _value(text: str, example: RawExample) -> float:
    value = number(text)
    if value is None:
        comma = "write a point instead of the comma" if "," in text else "correct it, or leave it empty"
        raise DataError(f"{example.place}: target {shown(text)} is not a number; {comma}")
    if not (isfinite(value) or isnan(value)):
        raise DataError(f"{example.place}: target {shown(text)} is not a finite number; correct it, or leave it empty")
    return value


def _multilabel(raw: Raw) -> Numbered:
    targets: list[NDArray[np.float64]]
    if raw.columns:
        order = sorted(range(len(raw.columns)), key=raw.columns.__getitem__)
        classes = tuple(raw.columns[place] for place in order)
        cells = [[_flag(example, raw.columns, place) for place in order] for example in raw.examples]
        targets = [np.array([row], np.float64) for row in cells]
    else:
        sets = [None if example.missing else set(_several(example)) for example in raw.examples]
        classes = tuple(sorted(set().union(*(labels for labels in sets if labels))))
        targets = [
            np.full((1, len(classes)), nan)
            if labels is None
            else np.array([[name in labels for name in classes]], float)
            for labels in sets
        ]
    missing = sum(int(np.isnan(target).sum()) for target in targets)
    return _with_note(Numbered(classes, [*targets], []), missing, len(targets) * len(classes), "label")


def _flag(example: RawExample, columns: Sequence[str], place: int) -> float:
    cell = example.target[place]
    if cell in MISSING_LABELS:
        return nan
    if cell not in (*_YES, *_NO):
        raise DataError(f"{example.place}, column {columns[place]}: {shown(cell)} is neither 0 nor 1; correct the cell")
    return float(cell in _YES)


def _known(row: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.bool_]:
    known: NDArray[np.bool_] = row != MISSING if row.dtype.kind == "i" else ~np.isnan(row)
    return known


def _with_note(result: Numbered, missing: int, total: int, noun: str) -> Numbered:
    if missing:
        result.notes.append(f"missing: {missing:,} of {counted(total, noun)}; they carry no loss")
    return result
