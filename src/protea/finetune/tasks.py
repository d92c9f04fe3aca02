"""What is predicted, and the form of labels and predictions that all parts of fine-tuning share.

A task predicts rows. A sequence task has one row for each sequence, a pair task one for each pair, a residue task one
for each residue. Rows of a data set stand in the order of its examples, so that every metric, baseline and head works
on two-dimensional arrays, whatever the task.

Shapes: N examples, R rows in all, C classes, or labels of a multilabel task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from protea.errors import DataError
from protea.letters import ReportRow
from protea.text import shown

Unit = Literal["residue", "sequence", "pair"]
Kind = Literal["class", "value", "labels"]
Part = Literal["", "train", "validation", "calibration", "test"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS: Final[tuple[Part, ...]] = ("train", "validation", "calibration", "test")
"""The parts of split data, in the order of messages; before a split, an example may have no part (``""``)."""

_PART_NAMES: Final[Mapping[Part, tuple[str, ...]]] = {
    "": ("", "na", "nan", "none", "null"),
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "development", "eval"),
    "calibration": ("calibration",),
    "test": ("test", "testing", "new_test_set"),  # new_test_set: the headers of FLIP's setHARD
}

MISSING: Final = -1
"""The class of a row without a label; missing values and labels are NaN."""


def part_of(name: str, place: str) -> Part:
    """The part that the data call ``name``; a ``DataError`` if nobody calls a part so."""
    folded = name.strip().lower()
    for part, names in _PART_NAMES.items():
        if folded in names:
            return part
    if folded in ("predict", "pred", "prediction"):
        raise DataError(
            f"{place}: set {shown(name)}: labelled data have no such part; give such records to a prediction"
        )
    known = ", ".join(alias for names in _PART_NAMES.values() for alias in names[:3] if names[0])
    raise DataError(f"{place}: unknown set {shown(name)}; known are {known}; name another column, or correct it")


@dataclass(frozen=True)
class Task:
    """One thing to predict: ``kind`` (a class, a value, or several labels) of each ``unit``."""

    unit: Unit
    kind: Kind

    @property
    def name(self) -> str:
        """The name as users write it: ``residue-class``, ``multilabel``."""
        return "multilabel" if self.kind == "labels" else f"{self.unit}-{self.kind}"


TASKS: Final = {
    task.name: task
    for task in (
        Task("residue", "class"),
        Task("residue", "value"),
        Task("sequence", "class"),
        Task("sequence", "value"),
        Task("sequence", "labels"),
        Task("pair", "class"),
        Task("pair", "value"),
    )
}
"""All tasks by their names."""


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A sequence, or a pair of sequences, with the part of the data that it belongs to.

    ``sequences`` holds residues as in the file, in upper case: one string, or two for a pair. ``place`` names file and
    record or row, for messages. ``part`` is ``""`` if the data name none and no split is made yet.
    """

    id: str
    sequences: tuple[str, ...]
    part: Part
    place: str


@dataclass
class Labelled:
    """A labelled data set of one task.

    Attributes:
        task: what its labels are.
        classes: names of the C classes, or of the labels of a multilabel task, sorted; none for values.
        examples: the N examples, in the order of the data.
        targets: by example, a row for each residue, else one row: class numbers ``[n]`` int64, with ``MISSING``;
            values ``[n]`` float64, with NaN; for multilabel ``[1, C]`` float64 of 0, 1 and NaN.
        notes: sentences that a user must see: how the task was detected, what is missing, what was left out.
        rows: rows of a report: what was changed or left out, and which records contradict each other.
        groups: ``[N]``, the cluster of each example, if the data were divided by clusters.
    """

    task: Task
    classes: tuple[str, ...]
    examples: list[LabelledExample]
    targets: list[NDArray[np.float64] | NDArray[np.int64]]
    notes: list[str] = field(default_factory=list)
    rows: list[ReportRow] = field(default_factory=list)
    groups: Ints | None = None

    def part(self, name: Part) -> Labelled:
        """The examples of one part, in order, without notes and rows."""
        chosen = [place for place, example in enumerate(self.examples) if example.part == name]
        return self.chosen(chosen)

    def chosen(self, places: Sequence[int]) -> Labelled:
        """The examples at these places, without notes and rows."""
        examples = [self.examples[place] for place in places]
        groups = None if self.groups is None else self.groups[np.array(places, np.int64)]
        return Labelled(self.task, self.classes, examples, [self.targets[place] for place in places], groups=groups)

    def all_targets(self) -> Targets:
        """All targets as one array."""
        counts = [len(target) for target in self.targets]
        width = (len(self.classes),) if self.task.kind == "labels" else ()
        empty = np.empty((0, *width), np.int64 if self.task.kind == "class" else np.float64)
        return Targets(np.concatenate([empty, *self.targets]), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


@dataclass(frozen=True)
class Targets:
    """Targets of many examples: ``values`` ``[R]`` or ``[R, C]``; rows of example i are ``offsets[i]:offsets[i+1]``.

    Predictions have the same rows: probabilities ``[R, C]`` for classes and labels, values ``[R]``.
    """

    values: NDArray[np.float64] | NDArray[np.int64]
    offsets: Ints

    def known(self) -> NDArray[np.bool_]:
        """``[R]``: whether a row has a label; for multilabel, whether it has any."""
        present = np.not_equal(self.values, MISSING) if self.values.dtype.kind == "i" else ~np.isnan(self.values)
        known: NDArray[np.bool_] = np.any(present, axis=tuple(range(1, self.values.ndim)))
        return known

    def examples(self) -> Ints:
        """``[R]``: the number of the example that a row belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
