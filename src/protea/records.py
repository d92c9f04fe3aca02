"""Records from all kinds of input: FASTA files, and tables with a column of ids and a column of sequences.

A table is read a few rows at a time and gives the records that a FASTA file would give, with the same errors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from protea.errors import FastaError, ProteaWarning, UsageError
from protea.fasta import Block, Record, damaged, opened, read_blocks, read_fasta

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE: Final = re.compile(r"\.(?:(csv|tsv)(?:\.(?:gz|bz2|xz|zst))?|(parquet))$")
_DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_BATCH: Final = 1 << 12
_BUFFER: Final = 1 << 20
ID_NAMES: Final = (
    *("id", "identifier", "name", "entry", "accession", "uniprot", "uniprot_id"),
    *("protein", "protein_id", "seq_id", "sequence_id"),
)
SEQUENCE_NAMES: Final = (
    *("sequence", "seq", "protein_sequence", "protein_seq", "target_sequence", "target_seq"),
    *("aa_sequence", "aa_seq", "amino_acid_sequence"),
)
"""Names of columns, in lower case, with ``_`` for blanks and signs."""
_BLANKS: Final = " \t\v\f"
MISSING: Final = frozenset(("", "NaN", "nan", "None", "none", "null", "N/A", "n/a", "#N/A", "<NA>"))
"""Cells without a value, as programs write them."""
UNCLEAR: Final = frozenset(("NA", "NAN", "NULL", "NONE"))
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
    for path in checked(paths, columns):
        yield from _table(str(path), columns) if is_table(path) else read_fasta([path])


def read_groups(paths: Iterable[str | Path], columns: InputColumns = RECOGNISED) -> Iterator[Block | list[Record]]:
    """The records thousands at a time: those of a FASTA file as blocks."""
    for path in checked(paths, columns):
        if not is_table(path):
            yield from read_blocks([path])
            continue
        records = _table(str(path), columns)
        while group := list(islice(records, _BATCH)):
            yield group


def checked(paths: Iterable[str | Path], columns: InputColumns) -> list[str | Path]:
    """The inputs; a ``UsageError`` if columns are named and no input is a table."""
    paths = list(paths)
    if columns != RECOGNISED and paths and not any(map(is_table, paths)):
        name = columns.id or columns.sequence
        raise UsageError(f"{paths[0]}: is no table (.csv, .tsv, .parquet) and has no column {name}; leave its name out")
    return paths


def is_table(path: str | Path) -> bool:
    """Whether an input is a table, by its suffix: ``.csv`` or ``.tsv``, compressed or not, or ``.parquet``."""
    return _TABLE.search(str(path).lower()) is not None


def _table(name: str, columns: InputColumns) -> Iterator[Record]:
    match = _TABLE.search(name.lower())
    assert match is not None
    rows = _parquet_rows(name, columns) if match[2] else _text_rows(name, columns, _DELIMITERS[match[1]])
    number = 0
    for number, (cell, sequence) in enumerate(rows, start=1):
        yield row_record(f"{name}, row {number}", cell.strip(), sequence)
    if not number:
        raise FastaError(f"{name}: no records; the table has no rows")


def row_record(place: str, name: str, sequence: str) -> Record:
    """The record of a row, with the letters that the lines of a FASTA file would give."""
    if name in ("", "NaN", "nan"):
        raise FastaError(f"{place}: a record without an id; fill its cell")
    place = f"{place}, record {name!r}"
    if "\0" in name:
        raise FastaError(f"{place}: the id holds a NUL byte; remove it")
    letters = "".join(line.strip(_BLANKS) for line in re.split("[\r\n]", sequence))
    if letters in UNCLEAR:
        raise FastaError(
            f"{place}: {letters} is either a missing value or {len(letters)} residues; leave the cell empty, or give "
            "these residues in a FASTA file"
        )
    return Record(name, "", "" if letters in MISSING else letters, place)


def _text_rows(name: str, columns: InputColumns, delimiter: str) -> Iterator[tuple[str, str]]:
    """Id and sequence of the rows of a CSV or TSV file."""
    from protea.delimited import folded, text_rows

    notes: list[str] = []
    known = {*ID_NAMES, *SEQUENCE_NAMES, *(folded(column) for column in (columns.id, columns.sequence) if column)}
    # Every byte is kept. As in FASTA, the encoding of ids is found later.
    rows = text_rows(name, delimiter, known, notes, any_bytes=True)
    chosen = itemgetter(*_places(name, [_decoded(cell) for cell in next(rows)], columns))
    for row in rows:
        cell, sequence = chosen(row)
        yield _decoded(cell), sequence if sequence.isascii() else _latin1(sequence)
    for note in notes:
        _warn(note)


@cache
def _warn(note: str) -> None:
    """Warn once, because some commands read their inputs twice."""
    warnings.warn(note, ProteaWarning, stacklevel=2)


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
                    yield cell, _latin1(sequence)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(name, error) from error


def _places(name: str, header: Sequence[str], columns: InputColumns) -> tuple[int, int]:
    return (
        _place(name, header, columns.id, ID_NAMES, "ids", "--id-column"),
        _place(name, header, columns.sequence, SEQUENCE_NAMES, "sequences", "--sequence-column"),
    )


def _place(name: str, header: Sequence[str], wanted: str | None, known: Sequence[str], noun: str, option: str) -> int:
    """The place of the column that is wanted, or of the only one with a known name."""
    from protea.delimited import folded

    names = known if wanted is None else (folded(wanted),)
    fitting = [place for place, column in enumerate(header) if column == wanted]
    fitting = fitting or [place for place, column in enumerate(header) if folded(column) in names]
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
    """The text of a cell, which is Latin-1 if it is not UTF-8."""
    return _latin1(cell) if re.search("[\udc80-\udcff]", cell) else cell


def _latin1(cell: str) -> str:
    return cell.encode("utf-8", "surrogateescape").decode("latin-1")
