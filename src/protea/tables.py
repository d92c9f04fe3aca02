"""Tables on disk: CSV, TSV and Parquet, with a report and the settings of the run beside them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from protea import output
from protea.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET: Final = ".parquet"
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_SUFFIXES: Final = re.compile(r"(\.csv|\.tsv)(\.gz|\.bz2|\.zst)?$|\.parquet$")


def check_output(path: Path, *, overwrite: bool, others: Sequence[str] = ()) -> None:
    """Refuse a table, or a file with one of the ``others`` as suffix, that cannot be written, before any work."""
    if path.suffix not in others and not path.is_dir():
        _format(path)
    output.check_output(path, overwrite=overwrite, beside=True)


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


def read_table(path: Path) -> pa.Table:
    """A table. Cells of text files are read as text, so that they can be written again unchanged."""
    import pyarrow as pa
    from pyarrow import parquet

    kind, compression = _format(path)
    try:
        with path.open("rb") as file:
            if kind == _PARQUET:
                return parquet.ParquetFile(file).read(use_threads=False)
            return _read_text(file, _DELIMITERS[kind], compression)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _format(path: Path) -> tuple[str, str | None]:
    """``.csv``, ``.tsv`` or ``.parquet``, and Arrow's name of the compression."""
    match = _SUFFIXES.search(path.name.lower())
    if match is None:
        raise UsageError(f"{path}: unknown kind of table; name a .csv or .tsv (each also with .gz), or a .parquet")
    return match[1] or _PARQUET, _COMPRESSIONS.get(match[2])


def _read_text(file: BinaryIO, delimiter: str, compression: str | None) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    content = pa.input_stream(file, compression=compression).read()
    # If an error ends the program while Arrow's threads work, the threads abort the program.
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
