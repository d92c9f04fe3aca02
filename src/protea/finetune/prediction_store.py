"""Tables of predictions: Parquet, CSV, TSV or HDF5, one row for each residue, sequence or pair.

A killed run loses the rows since its last commit alone. Rows wait in parts, one Parquet file a commit; at the end they
become one output, whose bytes do not depend on when the commits were.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protea.embed.stores import State
from protea.errors import UsageError
from protea.text import shown

SUFFIXES: Final = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".h5": "h5", ".hdf5": "h5"}
_DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_ROWS: Final = 1 << 16  # of a row group, and of what is in memory
_PROVENANCE: Final = "protea"


class PredictionStore:
    """Receives tables of rows in a work folder."""

    def __init__(self, work: Path, kind: str, schema: pa.Schema, state: State | None) -> None:
        self._work, self._kind, self._schema = work, kind, schema
        self._parts: int = 0 if state is None else state["parts"]
        self._waiting: list[pa.Table] = []
        for path in work.glob("part-*.parquet"):  # written after the commit
            if int(path.stem.partition("-")[2]) >= self._parts:
                path.unlink()

    def write(self, _: object, rows: Mapping[str, Any]) -> None:
        """Add the rows of a record, a value of each column for each row."""
        self._waiting.append(pa.table(dict(rows), schema=self._schema))

    def commit(self) -> State:
        """Write the waiting rows to a part."""
        if self._waiting:
            pq.write_table(pa.concat_tables(self._waiting), self._part(self._parts))
            self._parts, self._waiting = self._parts + 1, []
        return {"parts": self._parts}

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Join the parts."""
        self.commit()
        target = self._work / f"data.{self._kind}"
        {"parquet": self._parquet, "h5": self._h5}.get(self._kind, self._text)(target, json.dumps(dict(provenance)))
        return target

    def abandon(self) -> None:
        """Drop the waiting rows."""
        self._waiting = []

    def _part(self, number: int) -> Path:
        return self._work / f"part-{number}.parquet"

    def _tables(self) -> Iterator[pa.Table]:
        """All rows, in tables of ``_ROWS`` rows but the last."""
        held = self._schema.empty_table()
        for number in range(self._parts):
            with pq.ParquetFile(self._part(number)) as file:
                for batch in file.iter_batches(_ROWS):
                    held = pa.concat_tables([held, pa.Table.from_batches([batch], self._schema)])
                    while len(held) >= _ROWS:
                        yield held.slice(0, _ROWS).combine_chunks()
                        held = held.slice(_ROWS)
        if len(held):
            yield held.combine_chunks()

    def _parquet(self, target: Path, provenance: str) -> None:
        with pq.ParquetWriter(target, self._schema) as writer:
            writer.add_key_value_metadata({_PROVENANCE: provenance})
            for table in self._tables():
                writer.write_table(table)

    def _text(self, target: Path, provenance: str) -> None:
        with target.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter=_DELIMITERS[self._kind], lineterminator="\n")
            writer.writerow(self._schema.names)
            for table in self._tables():
                writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def _h5(self, target: Path, provenance: str) -> None:
        with h5py.File(target, "w", libver=("v108", "v108"), track_order=True) as file:
            file.attrs[_PROVENANCE] = provenance
            for column in self._schema:
                kind = h5py.string_dtype() if pa.types.is_string(column.type) else column.type.to_pandas_dtype()
                file.create_dataset(column.name, (0,), kind, maxshape=(None,), chunks=(_ROWS // 4,), compression="gzip")
            for table in self._tables():
                for name, column in zip(table.column_names, table.columns, strict=True):
                    dataset = file[name]
                    dataset.resize(len(dataset) + len(table), axis=0)
                    dataset[-len(table) :] = _values(column)


def _values(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A column for HDF5: missing text is empty; missing whole numbers are 0, as ``truncated_from`` in embeddings."""
    if pa.types.is_string(column.type):
        return np.array(["" if value is None else value for value in column.to_pylist()], object)
    if pa.types.is_integer(column.type):
        column = column.fill_null(0)
    return np.asarray(column.to_numpy())


def check_names(path: Path, kind: str, names: Sequence[str]) -> None:
    """Refuse columns that HDF5 cannot hold: a slash begins a group there, which cannot also be a column."""
    for name in names if kind == "h5" else ():
        parts = name.split("/")
        groups = {"/".join(parts[:end]) for end in range(1, len(parts))}
        if {"", ".", ".."} & set(parts) or "\0" in name or groups & set(names):
            raise UsageError(f"-o {path}: HDF5 has no place for the column {shown(name)}; write .parquet, .csv or .tsv")


def provenance_of(path: Path, kind: str) -> dict[str, Any] | None:
    """The provenance inside a finished output; ``None`` for text, which holds none. Raises if the file is damaged."""
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            return dict(json.loads(file.metadata.metadata[_PROVENANCE.encode()]))
    if kind == "h5":
        with h5py.File(path) as file:
            return dict(json.loads(file.attrs[_PROVENANCE]))
    return None
