"""Writes the splits of a store: ``sequences.arrow``, ``clusters.arrow``, and the manifest's numbers.

Members come in any order. They are dealt into buckets of neighbouring clusters, and each bucket is sorted in memory:
every byte is read and written twice, in order, and only one bucket is in memory. Every record batch but the last has
the same number of rows, so that a division finds a row's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.build_settings import Empty
from protea.data.manifest import SPLITS, Manifest
from protea.data.token_table import Table, flat_of, integers, lengths_of, map_file, new_file, numbers_of, take
from protea.progress import Progress

SEQUENCES: Final = "sequences.arrow"
CLUSTERS: Final = "clusters.arrow"
ROWS: Final = "rows_per_batch"

TRAIN, VALID, TEST, REMOVED = range(4)
"""The kinds of clusters. The first three are positions in ``SPLITS``."""

Kinds = NDArray[np.uint8]
"""The kind of each cluster."""

_CLUSTER_OF: Final = "cluster_of"
_PLACE_OF: Final = "place_of"
_SEQUENCE_ROWS: Final = 1 << 13
_CLUSTER_ROWS: Final = 1 << 16
_BIN: Final = 32
_BINS: Final = 64
"""Lengths up to 2,048 are counted in bins of 32 residues, longer ones in one bin."""
_BUCKET_BYTES: Final = 24 << 20
_MAX_BUCKETS: Final = 256
_BLOCK_BITS: Final = 12
"""Blocks of 4,096 clusters are not divided between buckets."""
_ROW_BYTES: Final = 64
"""Bytes that a sequence counts in addition to its residues."""
_PIECE: Final = 1 << 13

_TOKENS: Final = pa.list_(pa.field("item", pa.uint8(), nullable=False))
_SEQUENCE_FIELDS: Final = [pa.field("id", pa.string(), False), pa.field("tokens", _TOKENS, False)]
_CLUSTER_FIELDS: Final = [
    pa.field("id", pa.string(), False),
    pa.field("start", pa.uint64(), False),
    pa.field("count", pa.uint32(), False),
]


@dataclass(frozen=True)
class Members:
    """Sequences and their clusters.

    Attributes:
        table: the sequences.
        cluster_of: ``[N]`` int64, the cluster of each sequence, or -1.
        place_of: ``[N]`` int64, the order of the members of a cluster; ``None`` if that of the table.
    """

    table: Table
    cluster_of: Any
    place_of: Any = None

    @classmethod
    def create(cls, table: Table, folder: Path, *, ordered: bool = False) -> Self:
        """Create the files in a folder; no sequence has a cluster yet."""
        cluster_of = new_file(folder / _CLUSTER_OF, np.int64, len(table))
        cluster_of[:] = -1
        return cls(table, cluster_of, new_file(folder / _PLACE_OF, np.int64, len(table)) if ordered else None)

    @classmethod
    def load(cls, table: Table, folder: Path) -> Self:
        """The files that ``create`` made."""
        place_of = map_file(folder / _PLACE_OF, np.int64) if (folder / _PLACE_OF).exists() else None
        return cls(table, map_file(folder / _CLUSTER_OF, np.int64), place_of)


class _File:
    """Writes an Arrow IPC file of batches with a fixed number of rows."""

    def __init__(self, path: Path, fields: list[pa.Field], rows: int, metadata: dict[str, str]) -> None:
        self._schema = pa.schema(fields, {**metadata, ROWS: str(rows)})
        self._rows = rows
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: list[pa.RecordBatch] = []
        self._count = 0

    def write(self, columns: list[pa.Array]) -> None:
        self._waiting.append(pa.record_batch(columns, schema=self._schema))
        self._count += len(self._waiting[-1])
        if self._count >= self._rows:
            self._write_rows(self._count // self._rows * self._rows)

    def close(self) -> None:
        if self._count:
            self._write_rows(self._count)
        self._writer.close()
        self._sink.close()

    def _write_rows(self, count: int) -> None:
        table = pa.Table.from_batches(self._waiting)
        for start in range(0, count, self._rows):
            self._writer.write_table(table.slice(start, self._rows).combine_chunks())
        self._waiting, self._count = table.slice(count).to_batches(), self._count - count


class _SplitWriter:
    """Appends sequences and clusters to a split; the sequences of a cluster are neighbours, clusters in order."""

    def __init__(self, folder: Path, alphabet: Alphabet) -> None:
        folder.mkdir(parents=True)
        metadata = {"alphabet": alphabet.name, "tokens": " ".join(alphabet.tokens)}
        self._sequences = _File(folder / SEQUENCES, _SEQUENCE_FIELDS, _SEQUENCE_ROWS, metadata)
        self._clusters = _File(folder / CLUSTERS, _CLUSTER_FIELDS, _CLUSTER_ROWS, {})
        self._alphabet = alphabet
        self._letters = np.zeros(len(alphabet), np.int64)
        self._lengths = np.zeros(_BINS + 1, np.int64)
        self._cluster_count = self._members = 0
        self._longest = self._largest = self._singles = 0

    def close(self) -> None:
        self._sequences.close()
        self._clusters.close()

    def sequences(self, batch: pa.RecordBatch) -> None:
        """Append the sequences of a table's batch."""
        if not len(batch):
            return
        ids, tokens = batch.columns
        lengths, letters = lengths_of(batch), flat_of(tokens)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(integers(offsets), integers(letters), type=_TOKENS)
        self._sequences.write([ids, lists])
        self._letters += np.bincount(letters, minlength=len(self._letters))
        self._lengths += np.bincount(np.minimum(lengths // _BIN, _BINS), minlength=_BINS + 1)
        self._longest = max(self._longest, int(lengths.max()))

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
        assert self._members == self._lengths.sum(), "clusters and sequences disagree"
        tokens = self._alphabet.tokens
        return {
            "clusters": self._cluster_count,
            "sequences": self._members,
            "residues": int(self._letters.sum()),
            "longest": self._longest,
            "largest_cluster": self._largest,
            "clusters_of_one": self._singles,
            "composition": {tokens[token]: int(count) for token, count in enumerate(self._letters) if count},
            "lengths": {"bin": _BIN, "counts": self._lengths.tolist()},
        }


def sequences_to_write(kinds: Kinds, counts: Any, empty: Empty) -> int:
    """How often ``write_splits`` writes a sequence: those of clusters with members twice, first into buckets."""
    train = kinds == TRAIN
    held_out = int(((kinds == VALID) | (kinds == TEST)).sum())
    if counts is None:
        return held_out + int(train.sum())
    return held_out + 2 * int(np.maximum(counts[train], np.uint32(empty == "representative")).sum())


def write_splits(
    folder: Path,
    alphabet: Alphabet,
    representatives: Table,
    kinds: Kinds,
    members: Members | None,
    counts: Any,
    empty: Empty,
    progress: Progress,
) -> dict[str, Manifest]:
    """Write the splits of a store and return their numbers for the manifest.

    Validation and test splits consist of representatives, and so does the training split without ``members``.
    ``counts`` has the number of members of each cluster.
    """
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(closing(_SplitWriter(folder / SPLITS[kind], alphabet)))
            for kind in (TRAIN, VALID, TEST)
            if (kinds == kind).any()
        }
        if members is not None and TRAIN in writers:
            for batch in _by_cluster(members, counts, kinds, empty, representatives, folder / "buckets", progress):
                writers[TRAIN].sequences(batch)
                progress.advance(len(batch))
        for first, batch in representatives.batches():
            rows = slice(first, first + len(batch))
            for kind, writer in writers.items():
                chosen = np.flatnonzero(kinds[rows] == kind)
                sizes = np.ones(len(chosen), np.uint32)
                if kind == TRAIN and members is not None:
                    sizes = np.maximum(counts[rows][chosen], np.uint32(empty == "representative"))
                    chosen, sizes = chosen[sizes > 0], sizes[sizes > 0]
                writer.clusters(batch.column("id").take(integers(chosen)), sizes)
                if kind != TRAIN or members is None:
                    sequences = take(batch, chosen)
                    writer.sequences(sequences)
                    progress.advance(len(sequences))
    return {SPLITS[kind]: writer.numbers() for kind, writer in writers.items()}


def _by_cluster(
    members: Members,
    counts: Any,
    kinds: Kinds,
    empty: Empty,
    representatives: Table,
    folder: Path,
    progress: Progress,
) -> Iterator[pa.RecordBatch]:
    """The training sequences, ordered by cluster and place."""
    folder.mkdir()
    bucket_of = _buckets(members, len(representatives))
    writers: dict[int, Any] = {}
    with ExitStack() as stack:
        for batch in _training_sequences(members, counts, kinds, empty, representatives):
            buckets = bucket_of[numbers_of(batch.column("cluster")) >> _BLOCK_BITS]
            dealt = take(batch, np.argsort(buckets, kind="stable"))
            start = 0
            for number, size in zip(*(array.tolist() for array in np.unique(buckets, return_counts=True)), strict=True):
                if number not in writers:
                    sink = stack.enter_context(pa.OSFile(str(folder / str(number)), "wb"))
                    writers[number] = stack.enter_context(pa.ipc.new_stream(sink, batch.schema))
                writers[number].write_batch(dealt.slice(start, size))
                start += size
            progress.advance(len(batch))
    for number in sorted(writers):
        path = folder / str(number)
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all().combine_chunks()
        path.unlink()
        (bucket,) = table.to_batches()
        del table
        order = np.lexsort((numbers_of(bucket.column("place")), numbers_of(bucket.column("cluster"))))
        sequences = bucket.select(["id", "tokens"])
        for start in range(0, len(order), _PIECE):
            yield take(sequences, order[start : start + _PIECE])
    folder.rmdir()


def _training_sequences(
    members: Members, counts: Any, kinds: Kinds, empty: Empty, representatives: Table
) -> Iterator[pa.RecordBatch]:
    """Batches with cluster and place; representatives of empty clusters come last."""
    for first, batch in members.table.batches():
        clusters = members.cluster_of[first : first + len(batch)]
        chosen = np.flatnonzero(clusters >= 0)
        chosen = chosen[kinds[clusters[chosen]] == TRAIN]
        places = chosen + first if members.place_of is None else members.place_of[first : first + len(batch)][chosen]
        yield _with_places(batch, chosen, clusters[chosen], places)
    for first, batch in representatives.batches() if empty == "representative" else ():
        rows = slice(first, first + len(batch))
        chosen = np.flatnonzero((kinds[rows] == TRAIN) & (counts[rows] == 0))
        yield _with_places(batch, chosen, chosen + first, np.zeros(len(chosen), np.int64))


def _with_places(
    batch: pa.RecordBatch, rows: NDArray[np.int64], clusters: NDArray[np.int64], places: NDArray[np.int64]
) -> pa.RecordBatch:
    names = [*batch.schema.names, "cluster", "place"]
    return pa.record_batch([*take(batch, rows).columns, integers(clusters), integers(places)], names=names)


def _buckets(members: Members, clusters: int) -> NDArray[np.int64]:
    """The bucket of every block of clusters, chosen so that buckets have about the same size."""
    sizes = np.zeros((clusters >> _BLOCK_BITS) + 1, np.int64)
    for first, batch in members.table.batches():
        owners = members.cluster_of[first : first + len(batch)]
        known = owners >= 0
        weights = lengths_of(batch)[known] + _ROW_BYTES
        sizes += np.bincount(owners[known] >> _BLOCK_BITS, weights=weights, minlength=len(sizes)).astype(np.int64)
    limit = max(_BUCKET_BYTES, int(sizes.sum()) // _MAX_BUCKETS + 1)
    return (np.cumsum(sizes) - sizes) // limit
