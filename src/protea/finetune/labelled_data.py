"""Reads labelled sequences of any form, cleans their letters with their labels, and says what is odd about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import ESM
from protea.errors import DataError, UsageError
from protea.fasta import Record
from protea.finetune.label_fasta import read_headers, read_separate
from protea.finetune.label_tables import LabelColumns, is_dataset, read_dataset, read_label_table
from protea.finetune.labels import Raw, RawExample, detect, numbered
from protea.finetune.tasks import PARTS, TASKS, Labelled, LabelledExample, Task
from protea.letters import GAPS, Doubts, Gaps, ReportRow, Unknown, clean
from protea.records import InputColumns, is_table, read_records
from protea.text import counted, shown

AUTO: Final = "auto"

_LISTED: Final = 20  # classes in a message
_MOST: Final = 1e30  # of a value that float32 can compute with
_LEAST_SPREAD: Final = 1e-5  # of values, by the largest, that float32 can tell apart

_BLANKS: Final = " \t\v\f"
_NO_BLANKS: Final = dict.fromkeys(map(ord, _BLANKS))


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """Where labelled data lie, and how to read them.

    Attributes:
        data: FASTA files, tables (CSV, TSV, Parquet), folders that ``datasets`` saved, or ``hf:owner/name``.
        labels: a FASTA file with the labels of the residues of ``data``; headers may hold ``SET=``, ``VALIDATION=``.
        mask: a FASTA file of 0 and 1 by residue; 0 means no label.
        task: the name of a task, or ``auto``.
        id_column: the column of ids in tables; the four columns are found by their names if they are not given.
        sequence_column: the column of sequences.
        target_column: the column of labels, or several of 0 and 1 for a multilabel task, as in ``a,b,c``.
        set_column: the column that names the part: train, validation or test.
        unknown: policy for letters outside the alphabet, as of ``embed``.
        gaps: policy for gaps; labels of residues that are removed are removed too.
    """

    data: tuple[str, ...]
    labels: Path | None = None
    mask: Path | None = None
    task: str = AUTO
    id_column: str | None = None
    sequence_column: str | None = None
    target_column: str | None = None
    set_column: str | None = None
    unknown: Unknown = "x"
    gaps: Gaps = "keep"


def read_labelled(files: DataFiles) -> Labelled:
    """The labelled data of all files together.

    Raises:
        UsageError: a task or a column that does not exist.
        DataError: labels that contradict their sequences or say nothing; the message names record, value and fix.
    """
    if files.task not in (AUTO, *TASKS):
        raise UsageError(f"task {shown(files.task)}: use {AUTO}, {', '.join(TASKS)}")
    raw = _read(files)
    _check_ids(raw)
    raw = _cleaned(raw, files)
    task = _task(raw, files)
    found = numbered(task, raw)
    examples = [LabelledExample(item.id, item.sequences, item.part, item.place) for item in raw.examples]
    labelled = Labelled(task, found.classes, examples, found.targets, [*raw.notes, *found.notes], raw.rows)
    check_targets(labelled)
    _note_absent_classes(labelled)
    _note_repeats(labelled)
    return labelled


def read_pairs(files: DataFiles) -> Raw:
    """Pairs of sequences in tables, cleaned; labels are not read."""
    columns, raw = LabelColumns(files.id_column, files.sequence_column), Raw()
    for name in files.data:
        if not is_table(name):
            raise DataError(f"{name}: pairs of sequences need a table with the columns sequence and sequence_2")
        prefix = f"{Path(name).name}:" if len(files.data) > 1 else ""
        raw.add(read_label_table(name, columns, prefix, labelled=False), name)
    single = next((example for example in raw.examples if len(example.sequences) == 1), None)
    if single is not None:
        raise DataError(f"{single.place}: has no second sequence; add a column sequence_2")
    _check_ids(raw)
    return _cleaned(raw, files)


def _read(files: DataFiles) -> Raw:
    if not files.data:
        raise UsageError("no data are given; name a FASTA file or a table with labels")
    if files.mask is not None and files.labels is None:
        raise UsageError(f"{files.mask}: a mask needs a FASTA file of labels: --labels")
    columns = LabelColumns(files.id_column, files.sequence_column, files.target_column, files.set_column)
    if files.labels is not None:
        if name := columns.target or columns.set:
            raise UsageError(f"column {name}: the labels and sets are those of {files.labels}; leave the column out")
        records = read_records(files.data, InputColumns(columns.id, columns.sequence))
        return read_separate(records, files.labels, files.mask)
    tables = [name for name in files.data if is_table(name) or is_dataset(name)]
    if columns != LabelColumns() and not tables:
        name = next(name for name in (columns.id, columns.sequence, columns.target, columns.set) if name)
        raise UsageError(f"{files.data[0]}: is no table and has no column {name}; leave its name out")
    raw = Raw()
    for name in files.data:
        prefix = f"{Path(name).name}:" if len(files.data) > 1 else ""
        if name not in tables:
            more = read_headers(name)
        else:
            more = (read_dataset if is_dataset(name) else read_label_table)(name, columns, prefix)
        raw.add(more, name)
    return raw


def _check_ids(raw: Raw) -> None:
    """Refuse ids that occur twice, and pairs beside single sequences."""
    found: dict[str, RawExample] = {}
    for example in raw.examples:
        first = found.setdefault(example.id, example)
        if first is not example:
            raise DataError(
                f"{example.place}: has the id of {first.place}; ids must be unique: rename one, or name another column "
                "of ids"
            )
        if len(example.sequences) != len(raw.examples[0].sequences):
            raise DataError(f"{example.place}: pairs and single sequences in one data set; separate them")
    if not found:
        raise DataError("no records with labels")


def _cleaned(raw: Raw, files: DataFiles) -> Raw:
    """Apply the policies of letters to all sequences, and remember which residues remain."""
    doubts, examples, rows = Doubts(), [], list(raw.rows)
    counts: Counter[str] = Counter()
    for example in raw.examples:
        results = [
            clean(Record(example.id, "", text, example.place), ESM, files.unknown, files.gaps)
            for text in example.sequences
        ]
        mine = [row for result in results for row in result.rows]
        doubts.add(mine, example.place)
        rows += mine
        counts.update({row.what for row in mine if row.what not in Doubts.kinds})
        kept = [result.sequence for result in results if result.sequence is not None]
        if len(kept) == len(results):
            remaining = _remaining_residues(example.sequences[0], files.gaps) if mine else None
            examples.append(replace(example, sequences=tuple(kept), kept=remaining))
    verbs = {"altered": "letters changed in", "skipped": "left out:"}
    notes = [
        f"{verbs[what]} {counted(number, 'record')}; the report lists {'it' if number == 1 else 'them'}"
        for what, number in counts.items()
    ]
    if not examples:
        raise DataError(f"{raw.examples[0].place}: no records remain, all were left out; {rows[0].detail}")
    return Raw(examples, [*raw.notes, *notes, *doubts.lines()], rows, raw.columns)


def _remaining_residues(text: str, gaps: Gaps) -> NDArray[np.bool_] | None:
    """Which residues of a sequence, blanks not counted, remain after the policies; ``None`` if all do."""
    text = text.translate(_NO_BLANKS)
    kept = np.array([not (gaps == "drop" and letter in GAPS) for letter in text], bool)
    places = np.flatnonzero(kept)
    stops = len(places)
    while stops and text[places[stops - 1]] == "*":
        stops -= 1
    kept[places[stops:]] = False
    return None if kept.all() else kept


def _task(raw: Raw, files: DataFiles) -> Task:
    """The task that the user names, if the data can be of it, or the one that the data show."""
    if files.task == AUTO:
        task, reason = detect(raw, separate=files.labels is not None)
        raw.notes.append(f"task: {task.name}, because {reason}")
        return task
    task, first = TASKS[files.task], raw.examples[0]
    if (task.unit == "pair") != (len(first.sequences) == 2):
        what = "pairs" if len(first.sequences) == 2 else "single sequences"
        names = ", ".join(name for name, other in TASKS.items() if (other.unit == "pair") == (what == "pairs"))
        raise UsageError(f"task {task.name}: the data are {what} ({first.place}); use {names}")
    if raw.columns and task.kind != "labels":
        raise UsageError(f"task {task.name}: {len(raw.columns)} columns of targets make a multilabel task; name one")
    return task


def check_targets(labelled: Labelled) -> None:
    """Refuse labels that nothing can be learned from."""
    targets = labelled.all_targets()
    known = targets.values[targets.known()]
    place = labelled.examples[0].place
    if not len(known):
        raise DataError(f"{place}: all labels are missing, here and in all other records; add labels")
    if labelled.task.kind == "class" and len(labelled.classes) == 1:
        raise DataError(f"{place}: {shown(labelled.classes[0])} is the only class; a task needs two or more")
    if labelled.task.kind == "value" and (known == known[0]).all():
        raise DataError(f"{place}: all targets are {known[0]:g}; nothing can be learned from a constant")
    if labelled.task.kind == "value":
        _check_precision(known, place)
    if labelled.task.kind == "labels" and not any(len(set(column[~np.isnan(column)])) > 1 for column in known.T):
        raise DataError(f"{place}: every label is the same in all records; nothing can be learned from a constant")


def _check_precision(known: NDArray[np.float64] | NDArray[np.int64], place: str) -> None:
    """Refuse values that training, in single precision, cannot hold or tell apart."""
    largest = float(np.abs(known).max())
    spread = 0.0 if largest > _MOST else float(known.std())
    if largest > _MOST or spread < max(1 / _MOST, _LEAST_SPREAD * largest):
        raise DataError(
            f"{place}: the targets lie between {known.min():.12g} and {known.max():.12g}, which single precision "
            "cannot tell apart; subtract a constant, rescale them, or take logarithms"
        )


def _note_absent_classes(labelled: Labelled) -> None:
    """Tell which classes, or labels that are 1, occur in other parts but not in the training part or in none."""
    if labelled.task.kind == "value":
        return
    counts = {part: class_counts(labelled.part(part)) for part in PARTS}
    counts["train"] += class_counts(labelled.part(""))  # becomes training data
    absent = [
        f"{name} ({', '.join(found) or 'nobody has it'})"
        for place, name in enumerate(labelled.classes)
        for found in [[f"{count[place]:,} in {part}" for part, count in counts.items() if count[place]]]
        if not counts["train"][place]
    ]
    if absent:
        more = f"; and {len(absent) - _LISTED:,} more" if len(absent) > _LISTED else ""
        noun = "labels" if labelled.task.kind == "labels" else "classes"
        labelled.notes.append(
            f"{noun} that the training part lacks, so that they cannot be learned: {'; '.join(absent[:_LISTED])}{more}"
        )


def class_counts(labelled: Labelled) -> NDArray[np.int64]:
    """``[C]``: how many rows have a class, or a label."""
    values = labelled.all_targets().values
    if values.ndim == 2:
        values = np.nonzero(values == 1)[1]
    return np.bincount(values[values >= 0].astype(np.int64), minlength=len(labelled.classes))


def _note_repeats(labelled: Labelled) -> None:
    """Report sequences that occur again, with another label or in another part."""
    first: dict[tuple[str, ...], int] = {}
    counts: Counter[str] = Counter()
    for place, example in enumerate(labelled.examples):
        before = first.setdefault(tuple(sorted(example.sequences)), place)
        if before == place:
            continue
        other = labelled.examples[before]
        problems = []
        if not _same(labelled.targets[before], labelled.targets[place]):
            problems.append(("contradiction", f"the sequence of {other.id} with another label"))
        if other.part != example.part:
            parts = f"{example.part or 'no part'}, and {other.id} of {other.part or 'no part'}"
            problems.append(("in two parts", f"one sequence: this record is of {parts}"))
        counts.update(["again", *(what for what, _ in problems)])
        labelled.rows += [ReportRow(example.id, what, detail) for what, detail in problems]
    if counts:
        labelled.notes.append(
            f"{counted(counts['again'], 'record')} repeat the sequence of an earlier one, {counts['contradiction']:,} "
            f"with another label, {counts['in two parts']:,} in another part; the report lists the latter two"
        )


def _same(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    return one.shape == other.shape and bool(np.all((one == other) | ((one != one) & (other != other))))  # noqa: PLR0124


def group_numbers(labelled: Labelled) -> NDArray[np.int64]:
    """``[N]``: equal numbers for examples with the same sequence, or the same two in either order."""
    places: dict[tuple[str, ...], int] = {}
    keys = (tuple(sorted(example.sequences)) for example in labelled.examples)
    return np.array([places.setdefault(key, len(places)) for key in keys], np.int64)


def groups_of(labelled: Labelled) -> NDArray[np.int64]:
    """``[N]``: the cluster of each example, if the data were divided by clusters; else as ``group_numbers``."""
    return group_numbers(labelled) if labelled.groups is None else labelled.groups
