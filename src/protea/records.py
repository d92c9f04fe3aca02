"""Records from all kinds of input: FASTA files, and tables with a column of ids and a column of sequences.

A table is read a few rows at a time and gives the records that a FASTA file would give, with the same errors.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from protea.errors import FastaError
from protea.fasta import DAMAGED, Block, Record, damaged, opened, read_blocks, read_fasta
from protea.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE: Final = re.compile(r"\.(?:(csv|tsv)(?:\.(?:gz|bz2|xz|zst))?|(parquet))$")
_DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_BATCH: Final = 1 << 12
_BUFFER: Final = 1 << 20
_IDS: Final = (
    *("id", "identifier", "name", "entry", "accession", "uniprot", "uniprot_id"),
    *("protein", "protein_id", "seq_id", "sequence_id"),
)
_SEQUENCES: Final = (
    *("sequence", "seq", "protein_sequence", "protein_seq", "target_sequence", "target_seq"),
    *("aa_sequence", "aa_seq", "amino_acid_sequence"),
)
"""Names of columns, in lower case, with ``_`` for blanks and signs."""
_BLANKS: Final = " \t\v\f"
_MISSING: Final = frozenset(("", "NaN", "nan", "None", "none", "null", "N/A", "n/a", "#N/A", "<NA>"))
"""Cells without a value, as programs write them."""
_UNCLEAR: Final = frozenset(("NA", "NAN", "NULL", "NONE"))
"""Cells without a value for some programs, and sequences for others."""


@dataclass(frozen=True)
class InputColumns:
    """The columns of ids and of sequences in tables; ``None`` for one that is recognised by its name."""

    id: str | None = None
    sequence: str | None = None


RECOGNISED: Final = InputColumns()


def read_records(paths: Iterable[str | Path], columns: InputColumns = RECOGNISED) -> Iterator[Record]:
    """Yield the records of several inputs in order: tables by their suffix, all others as FASTA.

    A ``DamagedFileError`` comes after the records before the damage.
    """
    for path in paths:
        yield from _table(str(path), columns) if is_table(path) else read_fasta([path])


def read_groups(paths: Iterable[str | Path], columns: InputColumns = RECOGNISED) -> Iterator[Block | list[Record]]:
    """The records thousands at a time: those of a FASTA file as blocks."""
    for path in paths:
        if not is_table(path):
            yield from read_blocks([path])
            continue
        records = _table(str(path), columns)
        while group := list(islice(records, _BATCH)):
            yield group


def is_table(path: str | Path) -> bool:
    """Whether an input is a table, by its suffix: ``.csv`` or ``.tsv``, compressed or not, or ``.parquet``."""
    return _TABLE.search(str(path).lower()) is not None


def _table(name: str, columns: InputColumns) -> Iterator[Record]:
    match = _TABLE.search(name.lower())
    assert match is not None
    rows = _parquet_rows(name, columns) if match[2] else _text_rows(name, columns, _DELIMITERS[match[1]])
    number = 0
    for number, (cell, sequence) in enumerate(rows, start=1):
        yield _record(f"{name}, row {number}", cell.strip(), sequence)
    if not number:
        raise FastaError(f"{name}: no records; the table has no rows")


def _record(place: str, name: str, sequence: str) -> Record:
    """The record of a row, with the letters that the lines of a FASTA file would give."""
    if name in ("", "NaN", "nan"):
        raise FastaError(f"{place}: a record without an id; fill its cell")
    place = f"{place}, record {name!r}"
    if "\0" in name:
        raise FastaError(f"{place}: the id holds a NUL byte; remove it")
    letters = "".join(line.strip(_BLANKS) for line in re.split("[\r\n]", sequence))
    if letters in _UNCLEAR:
        raise FastaError(
            f"{place}: {letters} is either a missing value or {len(letters)} residues; leave the cell empty, or give "
            "these residues in a FASTA file"
        )
    return Record(name, "", "" if letters in _MISSING else letters, place)


def _text_rows(name: str, columns: InputColumns, delimiter: str) -> Iterator[tuple[str, str]]:
    """Id and sequence of the rows of a CSV or TSV file, with the delimiter of its header; blank lines are no rows."""
    # Latin-1 keeps every byte. As in FASTA, the encoding of ids is found later.
    with opened(name) as stream, TextIOWrapper(stream, encoding="latin-1", newline="") as text:
        reader = csv.reader(text)
        try:
            first = text.readline()
            delimiter = next((sign for sign in (delimiter, *_DELIMITERS.values(), ";") if sign in first), delimiter)
            reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
            rows = filter(None, reader)
            header = [_decoded(cell).removeprefix("\ufeff") for cell in next(rows, [])]
            if not header:
                raise FastaError(f"{name}: no records; the file is empty")
            chosen = itemgetter(*_places(name, header, columns))
            for row in rows:
                if len(row) != len(header):
                    counts = f"{counted(len(row), 'cell')}, but the header has {len(header)}"
                    raise FastaError(f"{name}, line {reader.line_num}: {counts}; correct the row")
                cell, sequence = chosen(row)
                yield _decoded(cell), sequence
        except DAMAGED as error:
            raise damaged(name, error) from error
        except csv.Error as error:
            raise FastaError(f"{name}, line {reader.line_num}: not a table of this kind: {error}") from error


def _parquet_rows(name: str, columns: InputColumns) -> Iterator[tuple[str, str]]:
    """Id and sequence of the rows of a Parquet file, read in pieces of a row group."""
    import pyarrow as pa
    from pyarrow import parquet

    opened(name).close()  # refuses what is no file
    try:
        with parquet.ParquetFile(name, buffer_size=_BUFFER, pre_buffer=False) as file:
            schema = file.schema_arrow
            chosen = [schema.names[place] for place in _places(name, schema.names, columns)]
            for column in chosen:
                _check_type(name, schema.field(column))
            for batch in file.iter_batches(batch_size=_BATCH, columns=chosen, use_threads=False):
                for row in zip(*(batch.column(column).to_pylist() for column in chosen), strict=True):
                    cell, sequence = ("" if value is None else str(value) for value in row)
                    yield cell, sequence.encode().decode("latin-1")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(name, error) from error


def _places(name: str, header: Sequence[str], columns: InputColumns) -> tuple[int, int]:
    return (
        _place(name, header, columns.id, _IDS, "ids", "--id-column"),
        _place(name, header, columns.sequence, _SEQUENCES, "sequences", "--sequence-column"),
    )


def _place(name: str, header: Sequence[str], wanted: str | None, known: Sequence[str], noun: str, option: str) -> int:
    """The place of the column that is wanted, or of the only one with a known name."""
    fitting = [
        place
        for place, column in enumerate(header)
        if (column == wanted if wanted is not None else re.sub(r"[\W_]+", "_", column.strip().lower()) in known)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if wanted is not None:
        problem = f"{option} {wanted}: {'two columns have this name' if fitting else 'there is no such column'}"
    elif fitting:
        problem = f"{len(fitting)} columns may be the {noun}; choose one by {option}"
    else:
        problem = f"no column has a usual name for {noun} ({', '.join(known)}); name it by {option}"
    raise FastaError(f"{name}: {problem}; the columns: {', '.join(header)}")


def _check_type(name: str, field: pa.Field) -> None:
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(is_kind(kind) for is_kind in kinds):
        raise FastaError(f"{name}: the column {field.name} holds {field.type}; store it as text")


def _decoded(cell: str) -> str:
    """The text of a cell whose bytes were taken for Latin-1."""
    try:
        return cell if cell.isascii() else cell.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return cell
