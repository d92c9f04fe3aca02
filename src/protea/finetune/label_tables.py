"""Labelled sequences in tables: CSV, TSV, Parquet, and data sets of Hugging Face's ``datasets``.

Columns are found by their usual names, without regard to case; a note says which were taken and which were not. A
folder that ``datasets`` saved holds Arrow files, which need no other package; a data set on the hub needs ``datasets``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protea.delimited import find_column, folded
from protea.errors import DataError, UsageError
from protea.finetune.label_fasta import given_part
from protea.finetune.labels import Raw, RawExample
from protea.optional import extra
from protea.records import ID_NAMES, SEQUENCE_NAMES, row_record
from protea.tables import read_table
from protea.text import printable, shown

if TYPE_CHECKING:
    import pyarrow as pa

HUB: Final = "hf:"

_IDS: Final = (*ID_NAMES, "mutant", "pdb_id")
_FIRST: Final = (
    *(*SEQUENCE_NAMES, "sequence_1", "sequence1", "seq_1", "seq1", "seq_a", "sequence_a"),
    *("mutated_sequence", "protein_1", "protein1", "proteins", "sequences", "primary", "protein"),
)
_SECOND: Final = ("sequence_2", "sequence2", "seq_2", "seq2", "seq_b", "sequence_b", "protein_2", "protein2")
_TARGETS: Final = (
    *("target", "targets", "label", "labels", "class", "value", "y", "fitness", "dms_score", "score"),
    *("secondary_structure", "property"),
)
_SETS: Final = ("set", "stage", "split", "subset")
_VALIDATION: Final = ("validation",)
_MASKS: Final = ("mask",)
_KNOWN: Final = frozenset((*_IDS, *_FIRST, *_SECOND, *_TARGETS, *_SETS, *_VALIDATION, *_MASKS))


@dataclass(frozen=True)
class LabelColumns:
    """Columns that a user names; ``None`` for one that is found by its name. ``target`` may be several: ``a,b,c``."""

    id: str | None = None
    sequence: str | None = None
    target: str | None = None
    set: str | None = None


@dataclass(frozen=True)
class _Chosen:
    """The columns of one table; empty where it has none."""

    id: str
    first: str
    second: str
    targets: tuple[str, ...]
    set: str
    validation: str
    mask: str

    def used(self) -> dict[str, str]:
        names = {"id": self.id, "sequence": self.first, "second sequence": self.second, "set": self.set}
        names |= {"target": ", ".join(self.targets), "validation": self.validation, "mask": self.mask}
        return {role: name for role, name in names.items() if name}


def is_hub(name: str) -> bool:
    """Whether an input is a data set on Hugging Face's hub."""
    return name.startswith(HUB)


def is_dataset(name: str) -> bool:
    """Whether an input is a data set of ``datasets``: on the hub, or a folder that it saved."""
    return is_hub(name) or any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


def read_label_table(name: str, columns: LabelColumns, prefix: str, *, labelled: bool = True) -> Raw:
    """One table; rows without ids are named ``prefix`` and ``row1``, ``row2``, ...; it may be without labels."""
    notes: list[str] = []
    wanted = [folded(text) for text in (columns.id, columns.sequence, columns.set) if text]
    wanted += [folded(text) for text in (columns.target or "").split(",") if text]
    table = read_table(Path(name), notes, known=_KNOWN.union(wanted))
    raw = _rows(name, table, columns, prefix, labelled=labelled)
    raw.notes[:0] = notes
    return raw


def read_dataset(name: str, columns: LabelColumns, prefix: str) -> Raw:
    """A data set; its splits are parts unless a column names parts."""
    raw = Raw()
    for split, table, classes in _hub(name) if is_hub(name) else _saved(Path(name)):
        place = f"{name}, split {split}" if split else name
        raw.add(_rows(place, table, columns, f"{prefix}{split}:" if split else prefix, split, classes), place)
    return raw


def _rows(
    name: str,
    table: pa.Table,
    columns: LabelColumns,
    prefix: str,
    split: str = "",
    classes: Mapping[str, Sequence[str]] | None = None,
    *,
    labelled: bool = True,
) -> Raw:
    """The examples of a table; ``classes`` names the classes that columns hold as numbers."""
    chosen = _choose(name, table.column_names, columns, labelled=labelled)
    if not table.num_rows:
        raise DataError(f"{name}: no records; the table has no rows")
    used = chosen.used()
    cells = {column: _cells(name, table, column, (classes or {}).get(column)) for column in set(table.column_names)}
    spare = [column for column in table.column_names if column not in _flat(chosen)]
    raw = Raw(columns=chosen.targets if len(chosen.targets) > 1 else ())
    for row in range(table.num_rows):
        place = f"{name}, row {row + 1}"
        first = row_record(
            place, _text(cells, chosen.id, row) or f"{prefix}row{row + 1}", _text(cells, chosen.first, row)
        )
        pair = (row_record(place, first.id, _text(cells, chosen.second, row)).sequence,) if chosen.second else ()
        targets = [cells[column][row] for column in chosen.targets]
        raw.examples.append(
            RawExample(
                first.id,
                (first.sequence, *pair),
                first.place,
                given_part(_text(cells, chosen.set, row) or split, _text(cells, chosen.validation, row), first.place),
                targets[0] if len(targets) == 1 else [str(cell) for cell in targets] or "",
                _text(cells, chosen.mask, row),
            )
        )
    words = ", ".join(f"{role} = {printable(column)}" for role, column in used.items())
    rest = f"; not used: {', '.join(map(printable, spare))}" if spare else ""
    raw.notes.append(f"{name}: columns: {words}{rest}" + ("" if chosen.id else "; rows are named by their numbers"))
    return raw


def _flat(chosen: _Chosen) -> set[str]:
    return {chosen.id, chosen.first, chosen.second, *chosen.targets, chosen.set, chosen.validation, chosen.mask}


def _choose(name: str, header: Sequence[str], columns: LabelColumns, *, labelled: bool) -> _Chosen:
    """Which columns hold what; a ``UsageError`` if one that is needed is not found."""
    twice = {column for column in header if header.count(column) > 1}
    taken: set[str] = set()

    def find(wanted: str | None, names: Sequence[str], option: str = "", noun: str = "") -> str:
        free = [column for column in header if column not in taken]
        found = find_column(free, [wanted] if wanted else names, name)
        if found is None and (wanted or noun):
            what = f"there is no column {shown(wanted)}" if wanted else f"no column has a usual name for {noun}"
            raise UsageError(f"{name}: {what}; choose by {option} one of: {', '.join(map(printable, header))}")
        if found in twice:
            raise DataError(f"{name}: two columns are named {shown(found)}; rename one")
        taken.add(found or "")
        return found or ""

    named = [text.strip() for text in (columns.target or "").split(",") if text.strip()]
    targets = tuple(find(text, (), "--target-column") for text in named)
    part = find(columns.set, _SETS, "--set-column")
    key = find(columns.id, (), "--id-column") if columns.id else ""
    first = find(columns.sequence, _FIRST, "--sequence-column", "sequences")
    second = find(None, _SECOND)
    key = key or find(None, _IDS)
    if labelled:
        targets = targets or (find(None, _TARGETS, "--target-column", "targets"),)
    return _Chosen(key, first, second, targets, part, find(None, _VALIDATION), find(None, _MASKS))


def _text(cells: Mapping[str, list[str | list[str]]], column: str, row: int) -> str:
    cell = cells[column][row] if column else ""
    return cell if isinstance(cell, str) else "".join(cell)


def _cells(name: str, table: pa.Table, column: str, classes: Sequence[str] | None) -> list[str | list[str]]:
    """The cells of a column as text, or as lists of texts; empty where there is no value."""

    def one(value: Any) -> str:
        if value is None:
            return ""
        if classes is not None and isinstance(value, int):
            return "" if value < 0 else classes[value]
        return str(value)

    try:
        values = table.column(column).to_pylist()
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: column {shown(column)} cannot be read: {error}") from error
    return [[one(item) for item in value] if isinstance(value, list) else one(value).strip() for value in values]


# ---- Hugging Face's datasets ----
_Split = tuple[str, "pa.Table", dict[str, list[str]]]


def _saved(folder: Path) -> Iterator[_Split]:
    """The splits of a folder that ``save_to_disk`` wrote: name, table, and the names of classes by column."""
    import pyarrow as pa

    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        else:
            names = [""]
        for name in names:
            state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
            info = json.loads((folder / name / "dataset_info.json").read_text(encoding="utf-8"))
            tables = []
            for file in state["_data_files"]:
                with pa.OSFile(str(folder / name / file["filename"])) as stream:
                    tables.append(pa.ipc.open_stream(stream).read_all())
            features = {column: _class_names(feature) for column, feature in info["features"].items()}
            classes = {column: found for column, found in features.items() if found}
            yield name, pa.concat_tables(tables), classes
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: is no data set that `datasets` saved, or is damaged: {reason}") from error


def _class_names(feature: Any) -> list[str] | None:
    """The names of a feature that is a ``ClassLabel``, or a list of them."""
    if not isinstance(feature, dict):
        return None
    return feature.get("names") if feature.get("_type") == "ClassLabel" else _class_names(feature.get("feature"))


def _hub(name: str) -> Iterator[_Split]:
    """The splits of a data set on the hub, given as ``hf:owner/name`` or ``hf:owner/name:configuration``."""
    with extra("datasets", f"{name}: a data set on Hugging Face's hub needs datasets"):
        import datasets

    repository, _, configuration = name.removeprefix(HUB).partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # whatever the hub and the package raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: cannot be loaded: {reason}; check its name and the network") from error
    for split, data in loaded.items():
        features = {column: getattr(value, "feature", value) for column, value in data.features.items()}
        classes = {column: value.names for column, value in features.items() if hasattr(value, "names")}
        yield str(split), data.with_format("arrow")[:], classes


def hub_fingerprint(name: str) -> str:
    """A hash of the contents of a data set on the hub: of its splits, classes, columns and rows."""
    digest = sha256()
    for split, table, classes in _hub(name):
        digest.update(repr((split, sorted(classes.items()), table.num_rows)).encode())
        for batch in table.to_batches():
            for row in batch.to_pylist():
                digest.update(repr(row).encode())
    return digest.hexdigest()
