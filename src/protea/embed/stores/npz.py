"""NPZ: NumPy arrays with a row for each sequence, which ``numpy.load`` reads without pickle.

``ids`` is an array of text, ``embedding`` the matrix ``[N, D]``, named as in Parquet where there are several poolings
or layers. Beside them are the other fields of ``StoredRecord`` and, as text, ``layout`` and ``protea``, the provenance.

A run appends to a CSV file of records and a file of raw numbers, which are joined at the end.
"""

from __future__ import annotations

import csv
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protea.embed.stores import Array, ArrayLayout, Arrays, Contents, State, StoredRecord, record_of


class NpzStore:
    """Writes a file. ``truncated_from`` is 0 for a record that is not truncated."""

    def __init__(self, work: Path, layout: ArrayLayout, state: State | None) -> None:
        self._layout = layout
        self._path = work / "data.npz"
        self._records = (work / "records.csv").open("a+", newline="", encoding="utf-8")
        self._numbers = (work / "numbers").open("a+b")
        self._records.truncate(state["records"] if state else 0)
        self._numbers.truncate(state["numbers"] if state else 0)
        self._rows = csv.writer(self._records)

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a record and its vectors."""
        self._rows.writerow(record)
        for array in arrays.values():
            self._numbers.write(np.ascontiguousarray(array).tobytes())

    def commit(self) -> State:
        """Flush."""
        for stream in (self._records, self._numbers):
            stream.flush()
            os.fsync(stream.fileno())
        sizes = (os.fstat(stream.fileno()).st_size for stream in (self._records, self._numbers))
        return dict(zip(("records", "numbers"), sizes, strict=True))

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Join the two files to one."""
        self._numbers.flush()
        self._records.seek(0)
        records = [record_of(dict(zip(StoredRecord._fields, row, strict=True))) for row in csv.reader(self._records)]
        with zipfile.ZipFile(self._path, "w") as file:
            _add(file, "ids", np.array([record.id for record in records], np.str_))
            for name, values in self._matrices(len(records)):
                _add(file, name, values)
            _add(file, "length", np.array([record.length for record in records], np.int64))
            _add(file, "truncated_from", np.array([record.truncated_from or 0 for record in records], np.int64))
            _add(file, "description", np.array([record.description for record in records], np.str_))
            _add(file, "sequence_sha256", np.array([record.sequence_sha256 for record in records], np.str_))
            _add(file, "layout", np.array(self._layout.to_json()))
            _add(file, "protea", np.array(json.dumps(dict(provenance))))
        self.abandon()
        return self._path

    def abandon(self) -> None:
        """Close. Opening the store again cuts off what was written after the commit."""
        with suppress(OSError):
            self._records.close()
            self._numbers.close()

    def _matrices(self, count: int) -> Iterator[tuple[str, Array]]:
        layout = self._layout
        shape = (count, len(layout.kinds), len(layout.layers), layout.width)
        empty: Array = np.empty(shape, layout.dtype)
        numbers = np.memmap(self._numbers, layout.dtype, "r", shape=shape) if count else empty
        for (place, kind), (row, layer) in product(enumerate(layout.kinds), enumerate(layout.layers)):
            yield layout.name(kind, layer), numbers[:, place, row]


def _add(file: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    # The same content gives the same bytes: no time, and always the headers of large files.
    with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, values, allow_pickle=False)


def read(path: Path) -> Contents:
    """Read a finished file."""
    # NumPy leaves a damaged file open that it has opened itself.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        layout = ArrayLayout.from_json(str(file["layout"]))
        return Contents(json.loads(str(file["protea"])), layout, _entries(path, layout))


def _entries(path: Path, layout: ArrayLayout) -> Iterator[tuple[StoredRecord, Callable[[], Arrays]]]:
    with np.load(path, allow_pickle=False) as file:
        columns = [file["ids" if field == "id" else field].tolist() for field in StoredRecord._fields]
        matrices = {kind: [file[layout.name(kind, layer)] for layer in layout.layers] for kind in layout.kinds}
    for row, fields in enumerate(zip(*columns, strict=True)):
        record = StoredRecord(*fields)
        record = record._replace(truncated_from=record.truncated_from or None)
        yield record, partial(_arrays, matrices, row)


def _arrays(matrices: Mapping[str, list[Array]], row: int) -> Arrays:
    return {kind: np.stack([matrix[row] for matrix in layers]) for kind, layers in matrices.items()}
