"""Tables on disk: CSV, TSV and Parquet, with a report and the settings of the run beside them.

Text tables are written with the delimiter of their suffix. They are read with whichever delimiter their first lines
have, comma, tab or semicolon; in UTF-8 or, with a byte order mark, UTF-16; and without comments. These are lines that
begin with ``#``, above the header or, if they have not as many cells as the header, below it.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from protea import output
from protea.errors import DataError, UsageError
from protea.journal import read_finished
from protea.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET: Final = ".parquet"
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_READ: Final = (b",", b"\t", b";")
_FIRST_LINES: Final = 100_000  # bytes in which the first two lines are expected
_ABOVE_HEADER: Final = re.compile(rb"\A(#[^\r\n]*[\r\n]+|[\r\n]+)*")
_COMMENT: Final = re.compile(rb"[\r\n]#")
_QUOTED: Final = re.compile(rb'"[^"]*"')
_SUFFIXES: Final = re.compile(r"(\.csv|\.tsv)(\.gz|\.bz2|\.zst)?$|\.parquet$")


def check_output(
    path: Path,
    run: Mapping[str, Any],
    models: Callable[[], Mapping[str, Any]],
    *,
    overwrite: bool,
    others: Sequence[str] = (),
) -> None:
    """Refuse a table, or a file with one of the ``others`` as suffix, that cannot be written, before any work.

    ``run`` is what the run file will hold, and ``models`` gives the ``identities`` of the models. If these are the
    same as those of an existing output, the error is a ``FinishedError``.
    """
    if path.suffix not in others and not path.is_dir():
        _format(path)
    from protea.rerun import end_finished

    exists = os.path.lexists(path)
    output.check_output(path, overwrite=overwrite or exists, beside=True)
    if exists and not overwrite:
        end_finished(path, read_finished(path), {**run, "models": models()})


class Beside(NamedTuple):
    """The contents of ``OUT.report.tsv`` (its header with tabs, the cells of its lines) and of ``OUT.run.yaml``."""

    header: str
    lines: Iterable[Sequence[object]]
    settings: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write both files beside an output that is being written."""
        output.write_report(path, self.lines, self.header.split("\t"))
        output.write_run(path, self.settings)


def write_table(path: Path, table: pa.Table, beside: Beside | None = None) -> None:
    """Write a table and what lies beside it; an older one is replaced when the new one is complete."""
    from pyarrow import parquet

    kind, compression = _format(path)
    with output.staged(path, overwrite=True) as aside:
        with aside.open("wb") as file:
            if kind == _PARQUET:
                parquet.write_table(table, file)
            else:
                _write_text(file, table, _DELIMITERS[kind], compression)
        if beside is not None:
            beside.write(aside)


def read_table(path: Path, notes: list[str] | None = None) -> pa.Table:
    """A table. Cells of text files are read as text, so that they can be written again unchanged.

    ``notes`` receives a sentence if lines below the header were left out as comments.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kind, compression = _format(path)
    try:
        with path.open("rb") as file:
            if kind == _PARQUET:
                return parquet.ParquetFile(file).read(use_threads=False)
            content = _in_utf8(pa.input_stream(file, compression=compression).read())
            content = _ABOVE_HEADER.sub(b"", content, count=1)
            delimiter = _delimiter(content, _DELIMITERS[kind])
            content, comments = _without_comments(content, delimiter.encode())
            if comments and notes is not None:
                left_out = counted(comments, "comment")
                notes.append(f"{path}: left out {left_out} below the header (lines that begin with #)")
            return _read_text(content, delimiter)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _format(path: Path) -> tuple[str, str | None]:
    """``.csv``, ``.tsv`` or ``.parquet``, and Arrow's name of the compression."""
    match = _SUFFIXES.search(path.name.lower())
    if match is None:
        raise UsageError(f"{path}: unknown kind of table; name a .csv or .tsv (each also with .gz), or a .parquet")
    return match[1] or _PARQUET, _COMPRESSIONS.get(match[2])


def _in_utf8(content: bytes) -> bytes:
    """The content without a byte order mark; UTF-16 becomes UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16").encode()
    return content.removeprefix(codecs.BOM_UTF8)


def _without_comments(content: bytes, delimiter: bytes) -> tuple[bytes, int]:
    """The content without comments below the header, and their number."""
    if not _COMMENT.search(content):
        return content, 0
    lines = content.splitlines(keepends=True)
    cells = _QUOTED.sub(b"", lines[0]).count(delimiter)
    kept: list[bytes] = []
    quoted = False
    for line in lines:
        ends = line.count(b'"') % 2 == 0  # a cell may go on in the next line
        if not line.startswith(b"#") or quoted or not ends or _QUOTED.sub(b"", line).count(delimiter) == cells:
            kept.append(line)
            quoted ^= not ends
    return b"".join(kept), len(lines) - len(kept)


def _delimiter(content: bytes, usual: str) -> str:
    """The delimiter that header and first row have equally often: the usual one, else the most frequent."""
    first_lines = _QUOTED.sub(b"", content[:_FIRST_LINES]).splitlines()
    header, row = [*(line for line in first_lines if line.strip()), b"", b""][:2]
    counts = {delimiter.decode(): header.count(delimiter) for delimiter in _READ if delimiter in header}
    equal = {delimiter: count for delimiter, count in counts.items() if row.count(delimiter.encode()) == count}
    choices = equal or counts
    return usual if usual in choices or not choices else max(choices, key=choices.__getitem__)


def _read_text(content: bytes, delimiter: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    # If an error ends the program while Arrow's threads are at work, they abort it.
    reading = arrow_csv.ReadOptions(use_threads=False)
    parsing = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # This pass only reads the names. Faster ways in Arrow start threads, or fail on tables without rows.
    names = arrow_csv.read_csv(pa.BufferReader(content), read_options=reading, parse_options=parsing).column_names
    if len(names) == 1:
        # In a table of one column, an empty line is a row, except at the end.
        content = content.strip() + b"\n"
        parsing.ignore_empty_lines = False
    as_text = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return arrow_csv.read_csv(
        pa.BufferReader(content), read_options=reading, parse_options=parsing, convert_options=as_text
    )


def _write_text(file: BinaryIO, table: pa.Table, delimiter: str, compression: str | None) -> None:
    import pyarrow as pa

    with (
        pa.output_stream(file, compression=compression) as stream,
        TextIOWrapper(stream, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(table.column_names)
        for batch in table.to_batches():
            writer.writerows(zip(*(_as_text_holds(column).to_pylist() for column in batch.columns), strict=True))


def _as_text_holds(column: pa.Array) -> pa.Array:
    """Times as text, because Python's times end at microseconds and the year 9999, and Arrow's do not."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        # UTC is the same moment, and this machine may not know the other time zone.
        column = column.cast(pa.timestamp(column.type.unit, "UTC"))
    if pa.types.is_duration(column.type):
        counts = column.cast(pa.int64()).to_pylist()
        return pa.array([None if count is None else f"{count} {column.type.unit}" for count in counts], pa.string())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column
