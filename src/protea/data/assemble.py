"""The last stage of every build: bring the members of each cluster together and write the store.

Members come in any order. They are dealt into buckets of neighbouring clusters, and each bucket is sorted in memory:
every byte is read and written twice, in order, and only one bucket is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.manifest import SPLITS, Manifest
from protea.data.mapping import ENTRIES, Members, Problems
from protea.data.token_table import Table, integers, lengths_of, new_file, numbers_of, take
from protea.data.writer import SplitWriter
from protea.progress import Progress

TRAIN, VALID, TEST, REMOVED = range(4)
"""What a cluster is for. The first three are positions in ``SPLITS``."""

Kinds = NDArray[np.uint8]
"""What each cluster is for."""

Empty = Literal["error", "representative", "drop"]
"""Policy for a training cluster without members: an error, its representative becomes its member, or it is dropped."""

_BUCKET_BYTES: Final = 24 << 20
_MAX_BUCKETS: Final = 256
_BLOCK_BITS: Final = 12
"""Blocks of 4,096 clusters are not divided between buckets."""
_ROW_BYTES: Final = 64
"""Counted for a sequence besides its residues."""
_PIECE: Final = 1 << 13


def count_members(members: Members, clusters: int, path: Path) -> Any:
    """The number of members of each cluster, in a file."""
    counts = new_file(path, np.uint32, clusters)
    for start in range(0, len(members.cluster_of), ENTRIES):
        part = members.cluster_of[start : start + ENTRIES]
        np.add.at(counts, part[part >= 0], 1)
    return counts


def check_empty(counts: Any, kinds: Kinds, representatives: Table, policy: Empty, problems: Problems) -> int:
    """The number of training clusters without members, which may be an error."""
    empty = np.flatnonzero((kinds == TRAIN) & (counts == 0))
    if empty.size and policy == "error":
        problems.add("empty", [[name] for name in representatives.names(empty)])
        fix = "add members, or pass --empty representative or --empty drop"
        problems.check("empty", "training clusters without members", fix)
    return len(empty)


def assemble(
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
    """
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(SplitWriter(folder / SPLITS[kind], alphabet))
            for kind in (TRAIN, VALID, TEST)
            if (kinds == kind).any()
        }
        if members is not None and TRAIN in writers:
            for batch in _by_cluster(members, counts, kinds, empty, representatives, folder / "buckets"):
                writers[TRAIN].sequences(batch)
                progress.advance(int(lengths_of(batch).sum()))
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
                    part = take(batch, chosen)
                    writer.sequences(part)
                    progress.advance(int(lengths_of(part).sum()))
    return {SPLITS[kind]: writer.numbers() for kind, writer in writers.items()}


def _by_cluster(
    members: Members, counts: Any, kinds: Kinds, empty: Empty, representatives: Table, folder: Path
) -> Iterator[pa.RecordBatch]:
    """The training sequences, ordered by cluster and place."""
    folder.mkdir()
    bucket_of = _buckets(members, len(representatives))
    paths = [folder / str(number) for number in range(int(bucket_of.max()) + 1)]
    with ExitStack() as stack:
        writers: list[Any] = [None] * len(paths)
        for batch in _training_sequences(members, counts, kinds, empty, representatives):
            buckets = bucket_of[numbers_of(batch.column("cluster")) >> _BLOCK_BITS]
            dealt = take(batch, np.argsort(buckets, kind="stable"))
            ends = np.cumsum(np.bincount(buckets, minlength=len(paths)))
            for number in np.unique(buckets).tolist():
                if writers[number] is None:
                    sink = stack.enter_context(pa.OSFile(str(paths[number]), "wb"))
                    writers[number] = stack.enter_context(pa.ipc.new_stream(sink, batch.schema))
                start = int(ends[number - 1]) if number else 0
                writers[number].write_batch(dealt.slice(start, int(ends[number]) - start))
    for path in filter(Path.exists, paths):
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
        lengths = lengths_of(batch)
        owners = members.cluster_of[first : first + len(lengths)]
        known = owners >= 0
        weights = lengths[known] + _ROW_BYTES
        sizes += np.bincount(owners[known] >> _BLOCK_BITS, weights=weights, minlength=len(sizes)).astype(np.int64)
    limit = max(_BUCKET_BYTES, int(sizes.sum()) // _MAX_BUCKETS + 1)
    buckets: NDArray[np.int64] = np.unique((np.cumsum(sizes) - sizes) // limit, return_inverse=True)[1]
    return buckets.astype(np.int64)
