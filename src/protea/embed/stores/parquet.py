"""Parquet: a row for each sequence, a column for each kind of array and layer.

A single column is named ``embedding``; with several poolings ``embedding_mean``, with several layers
``embedding_layer6``, with both ``embedding_mean_layer6``; predictions are ``log_probabilities`` and ``entropy``. A
vector is a ``fixed_size_list``; the vectors of residues are a list of those, their entropies a list of numbers.
``truncated_from`` is null for a record that is not truncated.

A Parquet file cannot be read before its last byte is written. So the store writes parts, each a complete file, and
joins them at the end. The end of a row group depends on the rows alone, not on interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protea.embed.stores import ENTROPY, Array, ArrayLayout, Arrays, Contents, State, StoredRecord, by_residue

_RECORD_COLUMNS: Final = [
    ("id", pa.string()),
    ("description", pa.string()),
    ("length", pa.int64()),
    ("truncated_from", pa.int64()),
    ("sequence_sha256", pa.string()),
]
"""The fields of ``StoredRecord``."""

_ROW_GROUP_BYTES: Final = 32 << 20
_ROW_GROUP_ROWS: Final = 4096
"""Limit on rows that wait in memory; each takes kilobytes beside its arrays."""


class ParquetStore:
    """Writes a file, one row group at a time."""

    def __init__(self, work: Path, layout: ArrayLayout, state: State | None) -> None:
        self._work = work
        self._layout = layout
        self._schema = _schema(layout)
        self._parts: int = 0 if state is None else state["parts"]
        self._commits: int = 0 if state is None else state["commits"]
        self._rows: list[tuple[StoredRecord, dict[str, Array]]] = []
        self._bytes = 0
        tail = None if state is None else state["tail"]
        kept = {self._part(number).name for number in range(self._parts)} | {tail}
        for path in work.glob("*.parquet"):  # files written after the commit
            if path.name not in kept:
                path.unlink()
        for record, arrays in _entries(work / tail, layout) if tail else ():
            self._hold(record, arrays())

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a row."""
        self._hold(record, dict(arrays))
        if self._bytes >= _ROW_GROUP_BYTES or len(self._rows) >= _ROW_GROUP_ROWS:
            pq.write_table(self._table(), self._part(self._parts))
            self._parts += 1
            self._rows, self._bytes = [], 0

    def commit(self) -> State:
        """Write the rows of the unfinished row group to a separate file."""
        self._commits += 1
        tail = f"tail-{self._commits}.parquet" if self._rows else None
        if tail:
            pq.write_table(self._table(), self._work / tail)
        for old in self._work.glob("tail-*.parquet"):
            if old.name not in {tail, f"tail-{self._commits - 1}.parquet"}:
                old.unlink()
        return {"parts": self._parts, "tail": tail, "commits": self._commits}

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Join the parts to one file."""
        target = self._work / "data.parquet"
        with pq.ParquetWriter(target, self._schema) as writer:
            writer.add_key_value_metadata({"protea": json.dumps(dict(provenance))})
            for number in range(self._parts):
                writer.write_table(pq.read_table(self._part(number), schema=self._schema))
            if self._rows:
                writer.write_table(self._table())
        return target

    def abandon(self) -> None:
        """Drop the rows in memory."""
        self._rows = []

    def _hold(self, record: StoredRecord, arrays: dict[str, Array]) -> None:
        self._rows.append((record, arrays))
        self._bytes += sum(array.nbytes for array in arrays.values())

    def _part(self, number: int) -> Path:
        return self._work / f"part-{number}.parquet"

    def _table(self) -> pa.Table:
        fields = zip(*(record for record, _ in self._rows), strict=True)
        columns = [pa.array(values, kind) for values, (_, kind) in zip(fields, _RECORD_COLUMNS, strict=True)]
        for kind, number in product(self._layout.kinds, range(len(self._layout.layers))):
            arrays = [arrays[kind][number] for _, arrays in self._rows]
            columns.append(_column(arrays, kind, self._layout.width))
        return pa.table(columns, schema=self._schema)


def _schema(layout: ArrayLayout) -> pa.Schema:
    number = pa.from_numpy_dtype(np.dtype(layout.dtype))
    metadata = {"layout": layout.to_json()} | ({"letters": layout.letters} if layout.letters else {})
    arrays = []
    for kind, layer in product(layout.kinds, layout.layers):
        of_one = number if kind == ENTROPY else pa.list_(number, layout.width)
        arrays.append((layout.name(kind, layer), pa.list_(of_one) if by_residue(kind) else of_one))
    return pa.schema(_RECORD_COLUMNS + arrays, metadata=metadata)


def _column(arrays: list[Array], kind: str, width: int) -> pa.Array:
    """Arrays ``[D]`` as fixed-size lists, arrays ``[L, D]`` as lists of those, arrays ``[L]`` as lists of numbers."""
    flat = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    values = flat if kind == ENTROPY else pa.FixedSizeListArray.from_arrays(flat, width)
    if not by_residue(kind):
        return values
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def read(path: Path) -> Contents:
    """Read a finished file."""
    metadata = pq.read_metadata(path).metadata
    layout = ArrayLayout.from_json(metadata[b"layout"])
    return Contents(json.loads(metadata[b"protea"]), layout, _entries(path, layout))


def _entries(path: Path, layout: ArrayLayout) -> Iterator[tuple[StoredRecord, Callable[[], Arrays]]]:
    file = pq.ParquetFile(path)  # closed when nothing refers to it, arrays still to be read included
    columns = [column for column in StoredRecord._fields if column in file.schema_arrow.names]
    names = {kind: [layout.name(kind, layer) for layer in layout.layers] for kind in layout.kinds}

    @lru_cache(maxsize=1)
    def group(number: int) -> Any:
        table = file.read_row_group(number, [name for several in names.values() for name in several])
        return table.combine_chunks()

    def arrays(number: int, row: int) -> Arrays:
        table = group(number)
        return {
            kind: np.stack([_values(table.column(name)[row], kind, layout.width) for name in several])
            for kind, several in names.items()
        }

    for number in range(file.num_row_groups):
        for row, entry in enumerate(file.read_row_group(number, columns).to_pylist()):
            yield StoredRecord(**{"sequence_sha256": "", **entry}), partial(arrays, number, row)


def _values(cell: Any, kind: str, width: int) -> Array:
    inner = cell.values
    if kind != ENTROPY and by_residue(kind):
        inner = inner.flatten()
    array: Array = inner.to_numpy(zero_copy_only=False)
    return array.reshape(-1, width) if kind != ENTROPY and by_residue(kind) else array
