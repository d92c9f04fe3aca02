"""Tables on disk: what a suffix means, written aside and then renamed, with a report and the settings beside."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import yaml

from protea.disk import check_new, replacing
from protea.errors import OutputError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_COMPRESSED: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_SUFFIXES: Final = "name a .csv, a .tsv (also .gz) or a .parquet"


def kind_of(path: Path) -> str:
    """``.csv``, ``.tsv`` or ``parquet``.

    Raises:
        UsageError: the suffix names no format.
    """
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    if path.suffix.lower() == ".parquet":
        return "parquet"
    if Path(name).suffix in DELIMITERS:
        return Path(name).suffix
    raise UsageError(f"{path}: no kind of table; {_SUFFIXES}")


def compression(path: Path) -> str | None:
    """What a path's last suffix says that its content is compressed with, as Arrow calls it."""
    return _COMPRESSED.get(path.suffix.lower())


def check_output(path: Path, *, overwrite: bool, others: Sequence[str] = ()) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Args:
        path: of a table.
        overwrite: it may exist.
        others: suffixes that may be named besides those of tables.

    Raises:
        UsageError: the suffix names no format.
        OutputError: it or what will lie beside it exists, or its folder does not.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; create it first")
    if path.suffix not in others and not path.is_dir():
        kind_of(path)
    for place in (path, *_beside(path)):
        if place.is_dir():
            raise OutputError(f"{place}: is a folder; name a file")
        check_new(place, overwrite=overwrite)


class Beside(NamedTuple):
    """What lies beside an output: ``OUT.report.tsv``, a line for each problem, and ``OUT.run.yaml``.

    Attributes:
        header: of the report.
        lines: of the report, cell by cell.
        settings: plain values, of what was run.
    """

    header: str
    lines: Iterable[Iterable[Any]]
    settings: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write both; to be called when the output is written and has not yet its name: where it is, they are.

        Raises:
            OutputError: they cannot be written.
        """
        cells = ("\t".join(" ".join(str(cell).split()) for cell in line) for line in self.lines)
        shown = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
        report, run = _beside(path)
        with replacing(report) as report_aside, replacing(run) as run_aside:
            report_aside.write_text("\n".join([self.header, *cells, ""]), encoding="utf-8")
            run_aside.write_text(shown, encoding="utf-8")


def write_table(path: Path, table: pa.Table, beside: Beside | None = None) -> None:
    """Write a table, aside and then renamed; CSV and TSV with quotes where they are needed.

    Args:
        path: of the table.
        table: any.
        beside: what is to lie beside it.

    Raises:
        UsageError: the suffix names no format.
        OutputError: it cannot be written.
    """
    from pyarrow import parquet

    kind = kind_of(path)
    with replacing(path) as aside:
        with aside.open("wb") as file:
            if kind == "parquet":
                parquet.write_table(table, file)
            else:
                _write_text(file, table, DELIMITERS[kind], compression(path))
        if beside is not None:
            beside.write(path)


def _write_text(file: BinaryIO, table: pa.Table, delimiter: str, compressed: str | None) -> None:
    import pyarrow as pa

    with (
        pa.output_stream(file, compression=compressed) as stream,
        TextIOWrapper(stream, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(table.column_names)
        for batch in table.to_batches():
            writer.writerows(zip(*(_plain(column).to_pylist() for column in batch.columns), strict=True))


def _plain(column: pa.Array) -> pa.Array:
    """A column as text can hold it: Python's times end at microseconds and the year 9999, Arrow's do not."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        # A zone that this machine does not know changes nothing about the moment.
        column = column.cast(pa.timestamp(column.type.unit, "UTC"))
    if pa.types.is_duration(column.type):
        counts = column.cast(pa.int64()).to_pylist()
        return pa.array([None if one is None else f"{one} {column.type.unit}" for one in counts], pa.string())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.report.tsv"), path.with_name(f"{path.name}.run.yaml")
