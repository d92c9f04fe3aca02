"""Sequences on their way into a store: a table on disk, which is read in batches, and an index of its ids.

Both can hold more records than fit into memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Digests = NDArray[np.bytes_]
"""``[N]`` of 16 bytes: BLAKE2b of each id. Ids are compared by it; two of a thousand million have the same one with a
probability of 1e-21."""

BATCH_BYTES: Final = 4 << 20
"""Approximate residues in a batch. The memory of every step is a multiple of it."""

ENTRIES: Final = 1 << 16
"""Numbers or lines processed at a time."""

_SEQUENCES: Final = "sequences.arrow"
_INDEX: Final = "ids.index"
_LEFT_OUT: Final = "ids.left_out"
_SCHEMA: Final = pa.schema([pa.field("id", pa.string()), pa.field("tokens", pa.binary())])
_DIGEST: Final = np.dtype("S16")
_ENTRY: Final = np.dtype([("id", "S16"), ("row", ">u8")])
_ENTRY_BYTES: Final = np.dtype("S24")
"""An entry as one string of bytes: entries sort by digest, then by row."""


# pyarrow.array() and to_numpy() would import pandas if it is installed, which takes a second or two.


def integers(values: NDArray[np.integer]) -> pa.Array:
    """An Arrow array that shares the memory of a NumPy array."""
    flat = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])


def numbers_of(array: pa.Array) -> NDArray[np.int64]:
    """A NumPy array that shares the memory of an Arrow array of 64-bit integers."""
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.int64, len(array), array.offset * 8) if len(array) else np.zeros(0, np.int64)


def offsets_of(array: pa.Array) -> NDArray[np.int32]:
    """Where each value of a binary or string array begins in its buffer, and where the last one ends."""
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.int32, len(array) + 1, array.offset * 4) if len(array) else np.zeros(1, np.int32)


def flat_of(array: pa.Array) -> NDArray[np.uint8]:
    """The values of a binary or string array end to end, without a copy."""
    offsets, buffer = offsets_of(array), array.buffers()[2]
    if buffer is None or offsets[-1] == offsets[0]:
        return np.zeros(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, int(offsets[-1] - offsets[0]), int(offsets[0]))


def token_batch(ids: Sequence[bytes], lengths: NDArray[np.int64], tokens: bytes) -> pa.RecordBatch:
    """A batch of a table, from ids in UTF-8 and all token ids end to end, one byte each."""
    id_lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    columns = [_joined(pa.string(), id_lengths, b"".join(ids)), _joined(pa.binary(), lengths, tokens)]
    return pa.record_batch(columns, schema=_SCHEMA)


def _joined(kind: pa.DataType, lengths: NDArray[np.int64], values: bytes) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(kind, len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def take(batch: pa.RecordBatch, rows: NDArray[np.integer]) -> pa.RecordBatch:
    """Some rows of a batch, in the given order."""
    return batch.take(integers(rows))


def lengths_of(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """The number of residues of each sequence."""
    return np.diff(offsets_of(batch.column("tokens"))).astype(np.int64)


def digests_of(ids: Iterable[bytes]) -> Digests:
    """The digest of each id in UTF-8."""
    return np.frombuffer(b"".join([blake2b(name, digest_size=16).digest() for name in ids]), _DIGEST)


class TableWriter:
    """Appends batches to a table in a new folder, and indexes its ids when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sink = pa.OSFile(str(folder / _SEQUENCES), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._index = (folder / _INDEX).open("wb")
        self._left_out = (folder / _LEFT_OUT).open("wb")
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in (self._writer, self._sink, self._index, self._left_out):
            file.close()
        if kind is None:
            # Sorted in place: this needs no memory, because the system can write pages of a mapped file back to disk.
            map_file(self._folder / _INDEX, _ENTRY_BYTES, mode="r+").sort()
            map_file(self._folder / _LEFT_OUT, _DIGEST, mode="r+").sort()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        self._writer.write_batch(batch)
        ids = batch.column("id")
        offsets, text = offsets_of(ids), flat_of(ids).tobytes()
        entries = np.empty(len(ids), _ENTRY)
        entries["id"] = digests_of(text[start:end] for start, end in pairwise((offsets - offsets[0]).tolist()))
        entries["row"] = np.arange(self.rows, self.rows + len(ids))
        entries.tofile(self._index)
        self.rows += len(ids)

    def leave_out(self, ids: Sequence[bytes]) -> None:
        """Note ids of the source that the table does not have."""
        digests_of(ids).tofile(self._left_out)


class Table:
    """A finished table, mapped into memory.

    Attributes:
        folder: in which it was written.
        left_out: sorted digests of the ids in its source that the table does not have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / _SEQUENCES)))
        counts = [self._reader.get_batch(number).num_rows for number in range(self.parts)]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._index: Any = map_file(folder / _INDEX, _ENTRY_BYTES)
        self.left_out: Digests = map_file(folder / _LEFT_OUT, _DIGEST)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parts(self) -> int:
        """The number of batches."""
        return int(self._reader.num_record_batches)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """All batches in order, or some, each with the number of its first row."""
        for number in range(start, self.parts if stop is None else stop):
            yield int(self._starts[number]), self._reader.get_batch(number)

    def names(self, rows: NDArray[np.integer]) -> list[str]:
        """The ids of a few rows."""
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        places = zip(batches.tolist(), (rows - self._starts[batches]).tolist(), strict=True)
        return [self._reader.get_batch(batch).column("id")[int(place)].as_py() for batch, place in places]

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The first row that has each id, or -1."""
        rows = np.full(len(digests), -1, np.int64)
        if len(self._index):
            order = np.argsort(digests)  # so that neighbours in the index are read one after the other
            wanted = digests[order]
            # An entry is a digest and a row; so a digest padded with zeros never sorts after its own entries.
            entries = _at_or_after(self._index, wanted.astype(_ENTRY_BYTES)).view(_ENTRY)
            rows[order] = np.where(entries["id"] == wanted, entries["row"].astype(np.int64), -1)
        return rows

    def was_left_out(self, digests: Digests) -> NDArray[np.bool_]:
        """For each id, whether the source had it but the table does not."""
        if not len(self.left_out):
            return np.zeros(len(digests), np.bool_)
        same: NDArray[np.bool_] = _at_or_after(self.left_out, digests) == digests
        return same

    def repeated(self) -> NDArray[np.int64]:
        """Pairs of rows with the same id: ``[K, 2]``, an earlier row and the next one, ordered by the latter."""
        entries = self._index.view(_ENTRY)
        places = np.flatnonzero(entries["id"][:-1] == entries["id"][1:])
        pairs = np.column_stack([entries["row"][places], entries["row"][places + 1]]).astype(np.int64)
        return pairs[np.argsort(pairs[:, 1])]


def _at_or_after(values: Any, wanted: Digests) -> Any:
    """For each wanted value, the first of some sorted values that is not smaller; the last one if all are smaller."""
    return values[np.minimum(np.searchsorted(values, wanted), len(values) - 1)]


def map_file(path: Path, dtype: Any, *, mode: str = "r") -> Any:
    """The array in a file, mapped into memory."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode=mode)  # type: ignore[call-overload]


def new_file(path: Path, dtype: Any, length: int) -> Any:
    """A new array of zeros in a file, mapped into memory."""
    size = length * np.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.truncate(size)
        # If the disk is full, this fails now with an error, and not later with a signal.
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
    return map_file(path, dtype, mode="r+")
