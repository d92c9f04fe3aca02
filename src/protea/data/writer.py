"""Writes one split of a store: ``sequences.arrow``, ``clusters.arrow``, and the statistics of both.

Every record batch but the last has the same number of rows, so that a row's batch is a division away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.manifest import Manifest
from protea.data.token_table import TokenRows, flat_of, integers, offsets_of

SEQUENCES: Final = "sequences.arrow"
CLUSTERS: Final = "clusters.arrow"
ROWS: Final = "rows_per_batch"

_SEQUENCE_ROWS: Final = 1 << 13
_CLUSTER_ROWS: Final = 1 << 16
_BIN: Final = 32
_BINS: Final = 64
"""Lengths are counted in bins of 32 residues up to 2,048, and all beyond in one."""

_TOKENS: Final = pa.list_(pa.field("item", pa.uint8(), nullable=False))


class _File:
    """An Arrow IPC file of batches with a fixed number of rows."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int) -> None:
        self._schema = schema.with_metadata({**(schema.metadata or {}), ROWS.encode(): str(rows).encode()})
        self._rows = rows
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: list[list[pa.Array]] = []
        self._count = 0

    def write(self, columns: list[pa.Array]) -> None:
        start, total = 0, len(columns[0])
        while self._count + total - start >= self._rows:
            stop = start + self._rows - self._count
            self._waiting.append([column.slice(start, stop - start) for column in columns])
            self._flush()
            start = stop
        if start < total:
            self._waiting.append([column.slice(start) for column in columns])
            self._count += total - start

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        columns = [pa.concat_arrays(pieces) for pieces in zip(*self._waiting, strict=True)]
        columns = [_lists(c) if pa.types.is_binary(c.type) else c for c in columns]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._waiting, self._count = [], 0


class SplitWriter:
    """Appends sequences and clusters to a split; the sequences of a cluster are neighbours, clusters in order.

    Args:
        folder: to be made.
        alphabet: noted in the file of sequences.
    """

    def __init__(self, folder: Path, alphabet: Alphabet) -> None:
        folder.mkdir(parents=True)
        noted = {b"alphabet": alphabet.name.encode(), b"tokens": " ".join(alphabet.tokens).encode()}
        sequences = pa.schema([pa.field("id", pa.string(), False), pa.field("tokens", _TOKENS, False)], noted)
        clusters = pa.schema(
            [
                pa.field("id", pa.string(), False),
                pa.field("start", pa.uint64(), False),
                pa.field("count", pa.uint32(), False),
            ]
        )
        self._sequences = _File(folder / SEQUENCES, sequences, _SEQUENCE_ROWS)
        self._clusters = _File(folder / CLUSTERS, clusters, _CLUSTER_ROWS)
        self._alphabet = alphabet
        self._letters = np.zeros(len(alphabet), np.int64)
        self._lengths = np.zeros(_BINS + 1, np.int64)
        self._members = self._written = self._count = self._longest = 0
        self._most = self._single = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sequences.close()
        self._clusters.close()

    def sequences(self, batch: TokenRows) -> None:
        """Append sequences."""
        if not len(batch):
            return
        self._sequences.write([batch.ids, batch.tokens])
        self._letters += np.bincount(batch.flat(), minlength=len(self._letters))
        lengths = batch.lengths()
        self._lengths += np.bincount(np.minimum(lengths // _BIN, _BINS), minlength=_BINS + 1)
        self._longest = max(self._longest, int(lengths.max()))
        self._written += len(batch)

    def clusters(self, ids: pa.StringArray, counts: NDArray[np.integer]) -> None:
        """Append clusters with so many sequences each."""
        if not len(ids):
            return
        ends = self._members + np.cumsum(counts, dtype=np.uint64)
        self._clusters.write(
            [ids, integers((ends - counts.astype(np.uint64)).astype(np.uint64)), integers(counts.astype(np.uint32))]
        )
        self._members = int(ends[-1])
        self._count += len(ids)
        self._most = max(self._most, int(counts.max()))
        self._single += int((counts == 1).sum())

    def numbers(self) -> Manifest:
        """What the manifest says of this split."""
        assert self._members == self._written, "clusters and sequences disagree"
        composition: dict[str, Any] = {
            self._alphabet.tokens[number]: int(count) for number, count in enumerate(self._letters) if count
        }
        return {
            "clusters": self._count,
            "sequences": self._written,
            "residues": int(self._letters.sum()),
            "longest": self._longest,
            "largest_cluster": self._most,
            "clusters_of_one": self._single,
            "composition": composition,
            "lengths": {"bin": _BIN, "counts": self._lengths.tolist()},
        }


def _lists(array: pa.BinaryArray) -> pa.ListArray:
    """The same bytes as lists of numbers, without copying them."""
    offsets = offsets_of(array)
    values = integers(flat_of(array))
    return pa.Array.from_buffers(
        _TOKENS, len(array), [None, pa.py_buffer((offsets - offsets[0]).astype(np.int32))], children=[values]
    )
