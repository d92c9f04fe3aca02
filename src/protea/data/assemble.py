"""The last step of every build: sequences brought together by cluster, and written as a store.

Members come in any order and leave in that of their clusters. They are first dealt into buckets of neighbouring
clusters, which are then sorted in memory one by one: every byte is read and written twice, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.manifest import SPLITS, Manifest
from protea.data.mapping import ENTRIES
from protea.data.token_table import Table, TokenRows, integers, map_file, numbers_of
from protea.data.writer import SplitWriter
from protea.errors import DataError

TRAIN, VALID, TEST, REMOVED = range(4)
"""What a cluster is for; the first three are numbers of ``SPLITS``."""

Empty = Literal["error", "representative", "drop"]
"""A training cluster without members: an error, it gets its representative as its only member, or it is dropped."""

_BUCKET_BYTES: Final = 24 << 20
_MAX_BUCKETS: Final = 256
_BLOCK: Final = 12
"""Clusters are dealt in blocks of 4,096."""

_SCHEMA: Final = pa.schema(
    [("id", pa.string()), ("tokens", pa.binary()), ("cluster", pa.int64()), ("place", pa.int64())]
)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Members:
    """The sequences of clusters, in any order.

    Attributes:
        table: of the sequences.
        cluster_of: the cluster of each, or -1.
        place_of: by what the members of a cluster are ordered.
    """

    table: Table
    cluster_of: Any
    place_of: Any

    @classmethod
    def found(cls, table: Table, folder: Path) -> Members:
        """With the arrays that lie in a folder."""
        return cls(table, map_file(folder / "cluster_of", np.int64), map_file(folder / "place_of", np.int64))

    def batches(self, counts: Any, kinds: Any, empty: Empty, representatives: Table) -> Iterator[pa.RecordBatch]:
        """The training sequences with their cluster and place, representatives of empty clusters last."""
        for batch in self.table.batches():
            rows = slice(batch.first, batch.first + len(batch))
            clusters = np.asarray(self.cluster_of[rows])
            chosen = np.flatnonzero(clusters >= 0)
            chosen = chosen[kinds[clusters[chosen]] == TRAIN]
            yield _record_batch(batch.take(chosen), clusters[chosen], np.asarray(self.place_of[rows])[chosen])
        if empty == "representative":
            for batch in representatives.batches():
                rows = slice(batch.first, batch.first + len(batch))
                chosen = np.flatnonzero((kinds[rows] == TRAIN) & (counts[rows] == 0))
                if chosen.size:
                    yield _record_batch(batch.take(chosen), chosen + batch.first, np.zeros(len(chosen), np.int64))


def count_members(members: Members, clusters: int, path: Path) -> Any:
    """How many members each cluster has, in a file."""
    counts = map_file(path, np.uint32, write=clusters)
    for start in range(0, len(members.cluster_of), ENTRIES):
        part = np.asarray(members.cluster_of[start : start + ENTRIES])
        numbers, found = np.unique(part[part >= 0], return_counts=True)
        counts[numbers] += found.astype(np.uint32)
    return counts


def check_empty(counts: Any, kinds: Any, representatives: Table, policy: Empty, problems: Path) -> int:
    """How many training clusters have no members.

    Raises:
        DataError: there are some, and that is an error.
    """
    found = []
    total = 0
    for start in range(0, len(kinds), ENTRIES):
        rows = (
            np.flatnonzero((kinds[start : start + ENTRIES] == TRAIN) & (counts[start : start + ENTRIES] == 0)) + start
        )
        total += len(rows)
        if policy == "error":
            found.extend(representatives.names(rows))
    if found:
        problems.write_text("".join(f"{name}\tempty\n" for name in found), encoding="utf-8")
        raise DataError(
            f"{total:,} training clusters have no members, the first {found[0]!r}; all are listed in {problems}: add "
            "members, or pass --empty representative or --empty drop"
        )
    return total


def assemble(
    folder: Path,
    scratch: Path,
    alphabet: Alphabet,
    representatives: Table,
    kinds: Any,
    members: Members | None,
    counts: Any,
    empty: Empty,
    advance: Advance,
) -> dict[str, Manifest]:
    """Write the splits of a store; what each holds is returned, for the manifest.

    Args:
        folder: of the store.
        scratch: for the buckets; removed by the caller.
        alphabet: of the tokens.
        representatives: one a cluster, in the order of clusters; validation and test sets consist of them.
        kinds: what each cluster is for.
        members: of the training clusters; without, the representative is the only one.
        counts: members of each cluster, if there are any; those that get their representative are changed to 1.
        empty: what becomes of training clusters without members.
        advance: told of residues written.
    """
    with ExitStack() as stack:
        present = [kind for kind in (TRAIN, VALID, TEST) if _any(kinds, kind)]
        writers = {kind: stack.enter_context(SplitWriter(folder / SPLITS[kind], alphabet)) for kind in present}
        if members is not None and TRAIN in writers:
            for batch in _sorted(members, counts, kinds, empty, representatives, scratch):
                writers[TRAIN].sequences(batch)
                advance(int(batch.lengths().sum()))
        for batch in representatives.batches():
            rows = slice(batch.first, batch.first + len(batch))
            kind_of = np.asarray(kinds[rows])
            for kind, writer in writers.items():
                chosen = np.flatnonzero(kind_of == kind)
                number = np.ones(len(chosen), np.uint32)
                if kind == TRAIN and members is not None:
                    number = np.asarray(counts[rows])[chosen]
                    if empty == "representative":
                        number = np.maximum(number, 1)
                    chosen, number = chosen[number > 0], number[number > 0]
                    writer.clusters(batch.ids.take(integers(chosen)), number)
                else:
                    part = batch.take(chosen)
                    writer.sequences(part)
                    writer.clusters(part.ids, number)
                    advance(int(part.lengths().sum()))
    return {SPLITS[kind]: writer.numbers() for kind, writer in writers.items()}


def _sorted(
    members: Members, counts: Any, kinds: Any, empty: Empty, representatives: Table, scratch: Path
) -> Iterator[TokenRows]:
    """The training sequences, by cluster and place."""
    bucket_of = _buckets(members, len(representatives))
    number = int(bucket_of[-1]) + 1 if len(bucket_of) else 0
    with ExitStack() as stack:
        paths = [scratch / f"bucket-{n}" for n in range(number)]
        writers = []
        for path in paths:
            sink = stack.enter_context(pa.OSFile(str(path), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_stream(sink, _SCHEMA)))
        for batch in members.batches(counts, kinds, empty, representatives):
            clusters = numbers_of(batch.column(2))
            buckets = bucket_of[clusters >> _BLOCK]
            order = np.argsort(buckets, kind="stable")
            dealt = batch.take(integers(order))
            ends = np.cumsum(np.bincount(buckets, minlength=number))
            start = 0
            for n, end in enumerate(ends.tolist()):
                if end > start:
                    writers[n].write_batch(dealt.slice(start, end - start))
                start = end
    for path in paths:
        with pa.OSFile(str(path)) as source:
            batches = list(pa.ipc.open_stream(source))
        path.unlink()
        if batches:
            columns = [pa.concat_arrays(column) for column in zip(*(batch.columns for batch in batches), strict=True)]
            del batches
            order = np.lexsort((numbers_of(columns[3]), numbers_of(columns[2])))
            yield from _in_pieces(TokenRows(columns[0], columns[1]), order)


def _in_pieces(batch: TokenRows, order: NDArray[np.int64]) -> Iterator[TokenRows]:
    size = 1 << 13
    for start in range(0, len(order), size):
        yield batch.take(order[start : start + size])


def _buckets(members: Members, clusters: int) -> NDArray[np.int64]:
    """The bucket of every block of clusters, so that buckets are of about the same size."""
    sizes = np.zeros((clusters >> _BLOCK) + 1, np.int64)
    for first, lengths in members.table.lengths():
        found = np.asarray(members.cluster_of[first : first + len(lengths)])
        known = found >= 0
        sizes += np.bincount(found[known] >> _BLOCK, weights=lengths[known] + 64, minlength=len(sizes)).astype(np.int64)
    limit = max(_BUCKET_BYTES, int(sizes.sum()) // _MAX_BUCKETS + 1)
    starts = np.cumsum(sizes) - sizes
    numbers: NDArray[np.int64] = np.unique(starts // limit, return_inverse=True)[1].astype(np.int64)
    return numbers


def _record_batch(batch: TokenRows, clusters: NDArray[np.int64], places: NDArray[np.int64]) -> pa.RecordBatch:
    columns = [batch.ids, batch.tokens, integers(clusters), integers(places)]
    return pa.record_batch(columns, schema=_SCHEMA)


def _any(kinds: Any, kind: int) -> bool:
    return any((kinds[start : start + ENTRIES] == kind).any() for start in range(0, len(kinds), ENTRIES))
