"""Tables on disk: CSV, TSV and Parquet, with a report and the settings of the run beside them.

Text tables are written with the delimiter of their suffix, and read as ``delimited.py`` says.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from protea import output
from protea.delimited import text_rows
from protea.errors import DataError, FastaError, UsageError
from protea.fasta import opened
from protea.journal import read_finished

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET: Final = ".parquet"
_BATCH: Final = 1 << 12
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
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

    output.check_output(path, overwrite=True, beside=True)
    if os.path.lexists(path) and not overwrite:
        end_finished(path, read_finished(path), {**run, "models": models()})
    output.note_what_is_replaced(path)


class Beside(NamedTuple):
    """The contents of ``OUT.report.tsv`` (its header with tabs, the cells of its lines) and of ``OUT.run.yaml``."""

    header: str
    lines: Iterable[Sequence[object]]
    settings: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write both files beside an output that is being written."""
        output.write_report(path, self.lines, self.header.split("\t"))
        output.write_run(path, {**self.settings, output.WRITTEN: output.measured(path)})


def write_table(path: Path, table: pa.Table, beside: Beside | None = None) -> None:
    """Write a table and what lies beside it; an older one is replaced when the new one is complete."""
    from pyarrow import parquet

    kind, compression = _format(path)

    def write(file: BinaryIO) -> None:
        if kind == _PARQUET:
            parquet.write_table(table.combine_chunks(), file)  # the bytes do not depend on how the rows came
        else:
            _write_text(file, table, _DELIMITERS[kind], compression)

    _write(path, write, beside)


def join_tables(path: Path, parts: Sequence[Path], beside: Beside) -> None:
    """Write one table from several with the same columns, their rows one after the other, as ``write_table`` would."""
    import pyarrow as pa

    kind, compression = _format(path)
    if kind == _PARQUET:
        write_table(path, pa.concat_tables([read_table(part) for part in parts]), beside)
    else:
        _write(path, lambda file: _join_text(file, parts, _DELIMITERS[kind], compression), beside)


def _write(path: Path, write: Callable[[BinaryIO], None], beside: Beside | None) -> None:
    with output.staged(path, overwrite=True) as aside:
        with aside.open("wb") as file:
            write(file)
        if beside is not None:
            beside.write(aside)


def read_table(path: Path, notes: list[str] | None = None, known: Container[str] = ()) -> pa.Table:
    """A table. Cells of text files are read as text, so that they can be written again unchanged.

    ``known`` and ``notes`` are those of ``text_rows``.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kind, _ = _format(path)
    try:
        if kind != _PARQUET:
            return _read_text(path, _DELIMITERS[kind], known, notes)
        with opened(path) as file:
            return parquet.ParquetFile(file).read(use_threads=False)
    except FastaError as error:
        raise DataError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _format(path: Path) -> tuple[str, str | None]:
    """``.csv``, ``.tsv`` or ``.parquet``, and Arrow's name of the compression."""
    match = _SUFFIXES.search(path.name.lower())
    if match is None:
        raise UsageError(f"{path}: unknown kind of table; name a .csv or .tsv (each also with .gz), or a .parquet")
    return match[1] or _PARQUET, _COMPRESSIONS.get(match[2])


def _read_text(path: Path, delimiter: str, known: Container[str], notes: list[str] | None) -> pa.Table:
    import pyarrow as pa

    rows = text_rows(path, delimiter, known, notes)
    schema = pa.schema([(name, pa.string()) for name in next(rows)])
    batches = []
    while some := list(islice(rows, _BATCH)):
        columns = [pa.array(cells, pa.string()) for cells in zip(*some, strict=True)]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema)


@contextmanager
def _text(file: BinaryIO, compression: str | None) -> Iterator[TextIOWrapper]:
    import pyarrow as pa

    with (
        pa.output_stream(file, compression=compression) as stream,
        TextIOWrapper(stream, encoding="utf-8", newline="") as text,
    ):
        yield text


def _join_text(file: BinaryIO, parts: Sequence[Path], delimiter: str, compression: str | None) -> None:
    """The first header, and the lines below all headers as they are."""
    header: list[str] = []
    with _text(file, compression) as text:
        for part in parts:
            with opened(part) as stream, TextIOWrapper(stream, "utf-8", newline="") as lines:
                names = next(csv.reader(lines, delimiter=delimiter), [])
                if not header:
                    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerow(header := names)
                if names != header:
                    raise DataError(f"{part}: its columns are {', '.join(names)}, not {', '.join(header)}")
                text.writelines(lines)


def _write_text(file: BinaryIO, table: pa.Table, delimiter: str, compression: str | None) -> None:
    with _text(file, compression) as text:
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
