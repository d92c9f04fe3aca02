"""Sequences on their way into a store: a file that is written once and read from its beginning, and an index of ids.

Both are made for more records than memory holds: a table is read a batch at a time, the index is two sorted arrays
that are mapped into memory, built a part at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
"""``[N, 2]``: 128 bits of BLAKE2b of each id, by which ids are compared; two of a thousand million share one with a
probability of 1e-21."""

BATCH_BYTES: Final = 4 << 20
"""Residues to a batch, about; what the memory of every step is counted in."""

_PART: Final = 1 << 20
_SCHEMA: Final = pa.schema([pa.field("id", pa.string()), pa.field("tokens", pa.binary())])


@dataclass(frozen=True)
class TokenRows:
    """Some sequences.

    Attributes:
        ids: one a sequence.
        tokens: token ids of the residues, one byte each.
        first: the number of the first of them in its table.
    """

    ids: pa.StringArray
    tokens: pa.BinaryArray
    first: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: Sequence[bytes], lengths: NDArray[np.int64], tokens: bytes) -> Self:
        """From ids, lengths and the sequences end to end."""
        return cls(strings(ids), _joined(pa.binary(), lengths, tokens))

    def take(self, rows: NDArray[np.integer]) -> TokenRows:
        """The sequences at some places, in that order."""
        places = integers(rows)
        return TokenRows(self.ids.take(places), self.tokens.take(places), self.first)

    def lengths(self) -> NDArray[np.int64]:
        """Residues of each sequence."""
        return np.diff(offsets_of(self.tokens)).astype(np.int64)

    def flat(self) -> NDArray[np.uint8]:
        """All token ids end to end."""
        return flat_of(self.tokens)


# pyarrow.array() and to_numpy() would import pandas where it is installed, for a second or two.


def strings(values: Sequence[bytes]) -> pa.StringArray:
    """An Arrow array of text, given as UTF-8."""
    return _joined(pa.string(), np.fromiter(map(len, values), np.int64, len(values)), b"".join(values))


def integers(values: NDArray[np.integer]) -> pa.Array:
    """An Arrow array of a NumPy array, its memory shared."""
    flat = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])


def numbers_of(array: pa.Array) -> NDArray[np.int64]:
    """The NumPy array of an Arrow array of 64-bit integers, its memory shared."""
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.int64, len(array), array.offset * 8) if len(array) else np.zeros(0, np.int64)


def _joined(kind: pa.DataType, lengths: NDArray[np.int64], values: bytes) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(kind, len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def offsets_of(array: pa.Array) -> NDArray[np.int32]:
    """Where the values of a binary or string array begin, with the end of the last."""
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.int32, len(array) + 1, array.offset * 4) if len(array) else np.zeros(1, np.int32)


def flat_of(array: pa.Array) -> NDArray[np.uint8]:
    """The values of a binary or string array end to end, without a copy."""
    offsets = offsets_of(array)
    buffer = array.buffers()[2]
    if buffer is None or offsets[-1] == offsets[0]:
        return np.zeros(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, int(offsets[-1] - offsets[0]), int(offsets[0]))


def keys_of(ids: Iterable[bytes]) -> Keys:
    """What ids, in UTF-8, are compared by."""
    digests = b"".join([blake2b(name, digest_size=16).digest() for name in ids])
    # Read as big-endian, so that the numbers are the same on every machine.
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


class TableWriter:
    """Appends batches to a table.

    It is ``NAME.arrow``, with ``NAME.keys`` for the index of ids, and ``NAME.left``, likewise, for the ids of records
    that were read and left out.
    """

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path.with_suffix(".arrow")), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._keys = path.with_suffix(".keys").open("wb")
        self._left = path.with_suffix(".left").open("wb")
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._sink.close()
        self._keys.close()
        self._left.close()

    def leave_out(self, ids: Sequence[bytes]) -> None:
        """Remember ids that the table does not have though its source did."""
        keys_of(ids).tofile(self._left)

    def write(self, batch: TokenRows, keys: Keys | None = None) -> None:
        """Append a batch, and the keys of its ids if they will be looked up."""
        self._writer.write_batch(pa.record_batch([batch.ids, batch.tokens], schema=_SCHEMA))
        if keys is not None:
            keys.tofile(self._keys)
        self.rows += len(batch)


class Table:
    """A finished table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path.with_suffix(".arrow"))) as source:
            reader = pa.ipc.open_file(source)
            self._counts: list[int] = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        self.rows = sum(self._counts)

    def __len__(self) -> int:
        return self.rows

    @property
    def parts(self) -> int:
        """How many batches it is in."""
        return len(self._counts)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[TokenRows]:
        """All sequences in order, or some batches of them."""
        first = sum(self._counts[:start])
        with pa.OSFile(str(self.path.with_suffix(".arrow"))) as source:
            reader = pa.ipc.open_file(source)
            for number in range(start, len(self._counts) if stop is None else stop):
                columns = reader.get_batch(number)
                yield TokenRows(columns.column(0), columns.column(1), first)
                first += columns.num_rows

    def lengths(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The first row of every batch and its lengths; the sequences themselves are not read."""
        first = 0
        with pa.memory_map(str(self.path.with_suffix(".arrow"))) as source:
            reader = pa.ipc.open_file(source)
            for number in range(len(self._counts)):
                lengths = np.diff(offsets_of(reader.get_batch(number).column(1))).astype(np.int64)
                yield first, lengths
                first += len(lengths)

    def keys(self, suffix: str = ".keys") -> Keys:
        """The keys of all ids, or with ``.left`` of those left out, mapped into memory."""
        keys: Keys = map_file(self.path.with_suffix(suffix), np.uint64).reshape(-1, 2)
        return keys

    def names(self, rows: NDArray[np.integer]) -> list[str]:
        """The ids at a few places, in that order."""
        starts = np.concatenate([[0], np.cumsum(self._counts)])
        found = {}
        with pa.memory_map(str(self.path.with_suffix(".arrow"))) as source:
            reader = pa.ipc.open_file(source)
            for row in sorted({int(row) for row in rows}):
                number = int(np.searchsorted(starts, row, side="right")) - 1
                found[row] = reader.get_batch(number).column(0)[row - int(starts[number])].as_py()
        return [found[int(row)] for row in rows]


class IdIndex:
    """Finds the row of an id: 28 bytes an id on disk, next to none in memory.

    Keys are cut into parts by their first bits, each part sorted in memory, and the parts laid end to end.
    """

    def __init__(self, folder: Path) -> None:
        self._high: Any = map_file(folder / "high", np.uint64)
        self._low: Any = map_file(folder / "low", np.uint64)
        self._rows: Any = map_file(folder / "rows", np.int64)

    @classmethod
    def build(cls, keys: Keys, folder: Path) -> Self:
        """Write the index of ``keys`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        bits = max(0, (len(keys) // _PART).bit_length())
        parts = [folder / f"part-{number}" for number in range(1 << bits)]
        for start in range(0, len(keys), _PART):
            chunk = np.array(keys[start : start + _PART])
            rows = np.arange(start, start + len(chunk), dtype=np.uint64)
            part = chunk[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(chunk), np.uint64)
            order = np.argsort(part, kind="stable")
            entries = np.column_stack([chunk, rows])[order]
            ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=len(parts)))
            for path, entry in zip(parts, np.split(entries, ends[:-1]), strict=True):
                if len(entry):
                    with path.open("ab") as stream:
                        entry.tofile(stream)
        with (
            (folder / "high").open("wb") as high,
            (folder / "low").open("wb") as low,
            (folder / "rows").open("wb") as numbers,
        ):
            for path in filter(Path.exists, parts):
                entries = np.fromfile(path, np.uint64).reshape(-1, 3)
                entries = entries[np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))]
                for column, stream in enumerate((high, low, numbers)):
                    np.ascontiguousarray(entries[:, column]).tofile(stream)
                path.unlink()
        return cls(folder)

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The row of each key, the first of several, or -1."""
        result = np.full(len(keys), -1, np.int64)
        total = len(self._high)
        order = np.argsort(keys[:, 0])  # neighbours are looked up after one another
        wanted = keys[order]
        places = np.searchsorted(self._high, wanted[:, 0])
        pending = np.flatnonzero(places < total)
        while pending.size:
            at = places[pending]
            same = self._high[at] == wanted[pending, 0]
            hit = same & (self._low[at] == wanted[pending, 1])
            result[order[pending[hit]]] = self._rows[at[hit]]
            # Two ids may share 64 bits of 128: the one looked for may be next.
            pending = pending[same & ~hit]
            places[pending] += 1
            pending = pending[places[pending] < total]
        return result

    def repeated(self) -> NDArray[np.int64]:
        """The rows of ids that an earlier row has, in order, and pairwise before each the earlier row: ``[K, 2]``."""
        found = []
        for start in range(0, max(0, len(self._high) - 1), _PART):
            stop = min(start + _PART, len(self._high) - 1)
            same = (self._high[start:stop] == self._high[start + 1 : stop + 1]) & (
                self._low[start:stop] == self._low[start + 1 : stop + 1]
            )
            places = np.flatnonzero(same) + start
            if places.size:
                found.append(np.column_stack([self._rows[places], self._rows[places + 1]]))
        if not found:
            return np.zeros((0, 2), np.int64)
        pairs = np.concatenate(found)
        return pairs[np.argsort(pairs[:, 1])]


def map_file(path: Path, dtype: Any, *, write: int | None = None) -> Any:
    """An array that lies in a file; with ``write`` a new one of that many zeros."""
    if write is not None:
        size = write * np.dtype(dtype).itemsize
        with path.open("wb") as stream:
            stream.truncate(size)
            # A full disk is an error here and now, and not a signal when a page cannot be written.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r" if write is None else "r+")
