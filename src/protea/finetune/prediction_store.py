"""Tables of predictions: Parquet, CSV, TSV or HDF5, one row for each residue, sequence or pair.

A killed run loses the rows since its last commit alone. Rows wait in parts, one Parquet file a commit; at the end they
become one output, whose bytes do not depend on when the commits were.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protea.embed.outputs import EmbeddingOutput
from protea.embed.stores import Contents, EmbeddingStore, State
from protea.errors import UsageError
from protea.output import WRITTEN, read_run
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


def read_predictions(path: Path, kind: str) -> tuple[pa.Schema, Iterator[dict[str, Any]]]:
    """The columns of a finished table, and its rows in blocks; cells of a text stay text."""
    if kind == "parquet":
        schema = pq.read_schema(path).remove_metadata()
    elif kind == "h5":
        with h5py.File(path) as file:
            text = {name: h5py.check_string_dtype(column.dtype) is not None for name, column in file.items()}
            types = {name: pa.string() if text[name] else pa.from_numpy_dtype(file[name].dtype) for name in file}
        schema = pa.schema(list(types.items()))
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            names = next(csv.reader(stream, delimiter=_DELIMITERS[kind]))
        schema = pa.schema([(name, pa.string()) for name in names])
    return schema, _blocks(path, kind, schema)


def _blocks(path: Path, kind: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    if kind == "parquet":
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(_ROWS):
                yield dict(zip(schema.names, batch.columns, strict=True))
    elif kind == "h5":
        with h5py.File(path) as file:
            columns = [
                column.asstr() if pa.types.is_string(schema.field(name).type) else column
                for name, column in file.items()
            ]
            for start in range(0, len(file[schema.names[0]]), _ROWS):
                yield {name: column[start : start + _ROWS] for name, column in zip(schema.names, columns, strict=True)}
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream, delimiter=_DELIMITERS[kind])
            next(rows)
            while some := list(islice(rows, _ROWS)):
                yield dict(zip(schema.names, map(list, zip(*some, strict=True)), strict=True))


def _values(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """A column for HDF5: missing text is empty; missing whole numbers are 0, as ``truncated_from`` in embeddings."""
    if pa.types.is_string(column.type):
        return np.array(["" if value is None else value for value in column.to_pylist()], object)
    if pa.types.is_integer(column.type):
        column = column.fill_null(0)
    return np.asarray(column.to_numpy())


@dataclass(frozen=True)
class PredictionTable(EmbeddingOutput):
    """A table of predictions with some columns; ``layout`` is that of the embedding that a prediction reads."""

    schema: pa.Schema

    def open(self, folder: Path, state: State | None) -> EmbeddingStore:
        """The store of the table."""
        return PredictionStore(folder, self.kind, self.schema, state)

    def contents(self) -> Contents:
        """The provenance of the finished table."""
        inside = _provenance_of(self.path, self.kind)
        if inside is None:  # a text, which its size alone vouches for
            inside = {name: value for name, value in read_run(self.path).items() if name != WRITTEN}
        return Contents(inside, self.layout, iter(()))


def check_names(path: Path, kind: str, names: Sequence[str]) -> None:
    """Refuse columns that HDF5 cannot hold: a slash begins a group there, which cannot also be a column."""
    for name in names if kind == "h5" else ():
        parts = name.split("/")
        groups = {"/".join(parts[:end]) for end in range(1, len(parts))}
        if {"", ".", ".."} & set(parts) or "\0" in name or groups & set(names):
            raise UsageError(f"-o {path}: HDF5 has no place for the column {shown(name)}; write .parquet, .csv or .tsv")


def _provenance_of(path: Path, kind: str) -> dict[str, Any] | None:
    """The provenance inside a finished output; ``None`` for text, which holds none. Raises if the file is damaged."""
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            return dict(json.loads(file.metadata.metadata[_PROVENANCE.encode()]))
    if kind == "h5":
        with h5py.File(path) as file:
            return dict(json.loads(file.attrs[_PROVENANCE]))
    return None
