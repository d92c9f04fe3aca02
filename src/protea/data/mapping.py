"""Assigns sequences to clusters, by a mapping or by headers. Files hold the answer: one number for each sequence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.data.encoding import NOTES
from protea.data.token_table import Digests, Table, digests_of, map_file, new_file
from protea.errors import DataError
from protea.fasta import DAMAGED, Record
from protea.progress import Progress

Absent = Literal["error", "skip"]
"""Policy for a member that the mapping names and the sequences lack: an error, or the member is skipped."""

ENTRIES: Final = 1 << 16
"""Numbers or lines processed at a time."""

_CLUSTER_OF: Final = "cluster_of"
_PLACE_OF: Final = "place_of"
_SELECTED_COLUMNS: Final = 22
_UNIREF90, _UNIREF50 = 8, 9
_UNIREF50_NAME: Final = re.compile(r"\bUniRef50_[^\s;,]+")
ABSENT: Final = "absent"
TWO_CLUSTERS: Final = "in two clusters"


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
        """New files in a folder, in which no sequence has a cluster yet."""
        cluster_of = new_file(folder / _CLUSTER_OF, np.int64, len(table))
        cluster_of[:] = -1
        return cls(table, cluster_of, new_file(folder / _PLACE_OF, np.int64, len(table)) if ordered else None)

    @classmethod
    def load(cls, table: Table, folder: Path) -> Self:
        """The files that ``create`` made."""
        place_of = map_file(folder / _PLACE_OF, np.int64) if (folder / _PLACE_OF).exists() else None
        return cls(table, map_file(folder / _CLUSTER_OF, np.int64), place_of)


class Entries(NamedTuple):
    """Some lines of a mapping: a cluster for each, the number of its members, and the members of all lines."""

    clusters: list[str]
    counts: list[int]
    members: list[str]


def read_mapping(path: Path) -> Iterator[Entries]:
    """The lines of a mapping, plain or compressed.

    Two columns are a cluster and its members, separated by commas (BioNeMo 1's ``mapping.tsv``). 22 columns are
    UniProt's ``idmapping_selected.tab``, in which column 9 is a member and column 10 its cluster.
    """
    entries = Entries([], [], [])
    try:
        with xopen(path, "rb", threads=0) as stream:
            for number, line in enumerate(stream, start=1):
                columns = line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
                if len(columns) == 1 and not columns[0].strip():
                    continue
                cluster, members = _parse(columns, f"{path}, line {number}")
                if members:
                    entries.clusters.append(cluster)
                    entries.counts.append(len(members))
                    entries.members.extend(members)
                if len(entries.members) >= ENTRIES:
                    yield entries
                    entries = Entries([], [], [])
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if entries.clusters:
        yield entries


def _parse(columns: list[str], place: str) -> tuple[str, list[str]]:
    if len(columns) >= _SELECTED_COLUMNS:
        member, cluster = columns[_UNIREF90], columns[_UNIREF50]
        return cluster, [member] if member and cluster else []
    if len(columns) != 2:
        raise DataError(
            f"{place}: the line has {len(columns)} columns; a mapping has 2 (cluster, members separated by commas), "
            "UniProt's idmapping_selected.tab 22"
        )
    cluster, members = columns[0].strip(), [name.strip() for name in columns[1].split(",") if name.strip()]
    if not members or not cluster:
        raise DataError(f"{place}: cluster {columns[0]!r} has no members; name them, or remove the line")
    return cluster, members


@dataclass
class Assignment:
    """Counts of a mapping's entries, each a cluster with one member."""

    entries: int = 0
    assigned: int = 0
    repeated: int = 0
    unknown_clusters: int = 0
    left_out: int = 0
    absent: int = 0
    without_cluster: int = 0
    header_line: int = 0


class Problems:
    """A file of problems beside the output. Messages have the number of a kind of problems and the first one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self.remove()

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def add(self, kind: str, rows: Sequence[Sequence[str]]) -> None:
        """Write problems of one kind, each with the id that it is about and what else belongs to it."""
        if rows:
            with self._path.open("a", encoding="utf-8", errors="surrogateescape") as stream:
                stream.writelines("\t".join((*row, kind)) + "\n" for row in rows)
            self._first.setdefault(kind, rows[0][0])
            self._counts[kind] += len(rows)

    def check(self, kind: str, what: str, fix: str) -> None:
        """Raise a ``DataError`` if there are problems of a kind."""
        if count := self._counts[kind]:
            raise DataError(f"{what}: {count:,}, the first is {self._first[kind]!r}; {self._path} lists all; {fix}")


class Assigner:
    """Assigns the sequences of ``table`` to clusters by the entries of a mapping; writes the files of ``Members``."""

    def __init__(self, folder: Path, clusters: Table, table: Table, problems: Problems) -> None:
        self._counts = Assignment()
        self._clusters, self._table, self._problems = clusters, table, problems
        self._members = Members.create(table, folder, ordered=True)

    def assign(self, mapping: Iterable[Entries], absent: Absent, progress: Progress) -> Assignment:
        """Assign the members of all entries; a ``DataError`` reports those in two clusters or absent."""
        counts, header = self._counts, 0
        for number, entries in enumerate(mapping):
            clusters = self._clusters.find(_digests(entries.clusters))
            rows = self._table.find(_digests(entries.members))
            if number == 0 and clusters[0] < 0 and (rows[: entries.counts[0]] < 0).all():
                header = entries.counts[0]  # the line names nothing that exists; some mappings begin with a header
            self._assign(entries, np.repeat(clusters, entries.counts), rows)
            progress.advance(len(entries.members))
        counts.header_line = int(header > 0)
        counts.entries -= header
        counts.unknown_clusters -= header
        counts.without_cluster = int(np.count_nonzero(self._members.cluster_of < 0))
        counts.assigned = len(self._table) - counts.without_cluster
        self._problems.check(TWO_CLUSTERS, "members in two clusters", "keep one cluster for each")
        if absent == "error":
            self._problems.check(ABSENT, "ids in the mapping without a sequence", "add them, or pass --absent skip")
        if not counts.assigned:
            raise DataError(
                "the mapping names no cluster with a member that the sequences have; take all files from one release"
            )
        return counts

    def _assign(self, entries: Entries, clusters: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        counts, members = self._counts, self._members
        places = counts.entries + np.arange(len(rows))
        counts.entries += len(rows)
        counts.unknown_clusters += int((clusters < 0).sum())
        missing = np.flatnonzero((rows < 0) & (clusters >= 0))
        if missing.size:
            left_out = self._table.was_left_out(_digests([entries.members[entry] for entry in missing]))
            counts.left_out += int(left_out.sum())
            counts.absent += int((~left_out).sum())
            absent = missing[~left_out]
            names = [entries.members[entry] for entry in absent]
            self._problems.add(ABSENT, list(zip(names, self._clusters.names(clusters[absent]), strict=True)))
        known = np.flatnonzero((rows >= 0) & (clusters >= 0))
        # A member belongs to the cluster of its first entry; later ones repeat or contradict it.
        unique, first = np.unique(rows[known], return_index=True)
        new = members.cluster_of[unique] < 0
        members.cluster_of[unique[new]] = clusters[known[first[new]]]
        members.place_of[unique[new]] = places[known[first[new]]]
        counts.repeated += len(known) - int(new.sum())
        twice = known[members.cluster_of[rows[known]] != clusters[known]]
        counts.repeated -= len(twice)
        names = [entries.members[entry] for entry in twice]
        earlier, later = self._clusters.names(members.cluster_of[rows[twice]]), self._clusters.names(clusters[twice])
        self._problems.add(TWO_CLUSTERS, list(zip(names, earlier, later, strict=True)))


def _digests(names: Iterable[str]) -> Digests:
    return digests_of(name.encode("utf-8", "surrogateescape") for name in names)


def clusters_of_headers(records: list[Record]) -> bytes:
    """The digest of each record's cluster, by its header or name; notes for ``Reader.table``.

    The header may name it anywhere (``UniRef50_Q8WZ42``); otherwise ``UniRef90_X`` belongs to ``UniRef50_X``.
    """
    return _digests(map(_cluster_name, records)).tobytes()


def _cluster_name(record: Record) -> str:
    match = _UNIREF50_NAME.search(record.description)
    return match[0] if match else record.id.replace("UniRef90_", "UniRef50_", 1)


def assign_by_headers(folder: Path, clusters: Table, members: Table) -> Assignment:
    """Assign members to the clusters that ``clusters_of_headers`` noted; writes the files of ``Members``."""
    named: Digests = map_file(members.folder / NOTES, "S16")
    cluster_of = Members.create(members, folder).cluster_of
    for start in range(0, len(members), ENTRIES):
        cluster_of[start : start + ENTRIES] = clusters.find(named[start : start + ENTRIES])
    without = int(np.count_nonzero(cluster_of < 0))
    if without == len(members):
        raise DataError(
            "no member's header or name contains its UniRef50 cluster (UniProt's headers never do); give the mapping "
            "with --members, for example UniProt's idmapping_selected.tab"
        )
    return Assignment(entries=len(members), assigned=len(members) - without, without_cluster=without)
