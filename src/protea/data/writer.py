"""Writes one split of a store: ``sequences.arrow``, ``clusters.arrow``, and the numbers that the manifest has of them.

Every record batch but the last has the same number of rows, so that a division finds a row's batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.manifest import Manifest
from protea.data.token_table import flat_of, integers, lengths_of, offsets_of

SEQUENCES: Final = "sequences.arrow"
CLUSTERS: Final = "clusters.arrow"
ROWS: Final = "rows_per_batch"

_SEQUENCE_ROWS: Final = 1 << 13
_CLUSTER_ROWS: Final = 1 << 16
_BIN: Final = 32
_BINS: Final = 64
"""Lengths up to 2,048 are counted in bins of 32 residues, longer ones in one bin."""

_TOKENS: Final = pa.list_(pa.field("item", pa.uint8(), nullable=False))
_SEQUENCE_FIELDS: Final = [pa.field("id", pa.string(), False), pa.field("tokens", _TOKENS, False)]
_CLUSTER_FIELDS: Final = [
    pa.field("id", pa.string(), False),
    pa.field("start", pa.uint64(), False),
    pa.field("count", pa.uint32(), False),
]


class _File:
    """Writes an Arrow IPC file of batches with a fixed number of rows."""

    def __init__(self, path: Path, fields: list[pa.Field], rows: int, metadata: dict[bytes, bytes]) -> None:
        self._schema = pa.schema(fields, {**metadata, ROWS.encode(): str(rows).encode()})
        self._rows = rows
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: list[pa.RecordBatch] = []
        self._count = 0

    def write(self, columns: list[pa.Array]) -> None:
        batch = pa.record_batch(columns, schema=self._schema)
        while self._count + len(batch) >= self._rows:
            room = self._rows - self._count
            self._waiting.append(batch.slice(0, room))
            self._flush()
            batch = batch.slice(room)
        if len(batch):
            self._waiting.append(batch)
            self._count += len(batch)

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
        self._waiting, self._count = [], 0


class SplitWriter:
    """Appends sequences and clusters to a split; the sequences of a cluster are neighbours, clusters in order.

    Args:
        folder: to be made.
        alphabet: is noted in the file of sequences.
    """

    def __init__(self, folder: Path, alphabet: Alphabet) -> None:
        folder.mkdir(parents=True)
        noted = {b"alphabet": alphabet.name.encode(), b"tokens": " ".join(alphabet.tokens).encode()}
        self._sequences = _File(folder / SEQUENCES, _SEQUENCE_FIELDS, _SEQUENCE_ROWS, noted)
        self._clusters = _File(folder / CLUSTERS, _CLUSTER_FIELDS, _CLUSTER_ROWS, {})
        self._alphabet = alphabet
        self._letters = np.zeros(len(alphabet), np.int64)
        self._lengths = np.zeros(_BINS + 1, np.int64)
        self._sequence_count = self._cluster_count = self._members = 0
        self._longest = self._largest = self._singles = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sequences.close()
        self._clusters.close()

    def sequences(self, batch: pa.RecordBatch) -> None:
        """Append the sequences of a table's batch."""
        if not len(batch):
            return
        ids, tokens = batch.columns
        self._sequences.write([ids, _as_lists(tokens)])
        lengths = lengths_of(batch)
        self._letters += np.bincount(flat_of(tokens), minlength=len(self._letters))
        self._lengths += np.bincount(np.minimum(lengths // _BIN, _BINS), minlength=_BINS + 1)
        self._longest = max(self._longest, int(lengths.max()))
        self._sequence_count += len(batch)

    def clusters(self, ids: pa.StringArray, counts: NDArray[np.uint32]) -> None:
        """Append clusters, each with its number of sequences."""
        if not len(ids):
            return
        ends = self._members + np.cumsum(counts, dtype=np.uint64)
        self._clusters.write([ids, integers(ends - counts), integers(counts)])
        self._members = int(ends[-1])
        self._cluster_count += len(ids)
        self._largest = max(self._largest, int(counts.max()))
        self._singles += int((counts == 1).sum())

    def numbers(self) -> Manifest:
        """The manifest's entry for this split."""
        assert self._members == self._sequence_count, "clusters and sequences disagree"
        tokens = self._alphabet.tokens
        return {
            "clusters": self._cluster_count,
            "sequences": self._sequence_count,
            "residues": int(self._letters.sum()),
            "longest": self._longest,
            "largest_cluster": self._largest,
            "clusters_of_one": self._singles,
            "composition": {tokens[token]: int(count) for token, count in enumerate(self._letters) if count},
            "lengths": {"bin": _BIN, "counts": self._lengths.tolist()},
        }


def _as_lists(array: pa.BinaryArray) -> pa.ListArray:
    """The bytes of each value as a list of numbers, without a copy of them."""
    offsets = offsets_of(array)
    buffers = [None, pa.py_buffer(offsets - offsets[0])]
    return pa.Array.from_buffers(_TOKENS, len(array), buffers, children=[integers(flat_of(array))])
