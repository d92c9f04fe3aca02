"""Which sequence belongs to which cluster: read from a mapping, looked up, checked, and noted in two arrays on disk.

``cluster_of`` has the number of the cluster of every member, or -1, and ``place_of`` its place among the mapping's
entries, by which the members of a cluster are ordered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.data.token_table import IdIndex, Keys, Table, keys_of, map_file
from protea.errors import DataError
from protea.fasta import DAMAGED, Record

Absent = Literal["error", "skip"]
"""A member that the mapping names and the sequences do not have: an error, or it is left out."""

ENTRIES: Final = 1 << 16

_SELECTED_COLUMNS: Final = 22
_UNIREF90, _UNIREF50 = 8, 9
_NAMED: Final = re.compile(r"\bUniRef50_[^\s;,]+")


class Entries(NamedTuple):
    """Some lines of a mapping.

    Attributes:
        clusters: one id a line.
        counts: members of each.
        members: ids of all, end to end.
        place: of the first line, for messages.
    """

    clusters: list[str]
    counts: list[int]
    members: list[str]
    place: str


def read_mapping(path: Path) -> Iterator[Entries]:
    """The lines of a mapping, plain or compressed.

    Two columns are a cluster and its member or members, by comma (BioNeMo 1's ``mapping.tsv``); 22 are UniProt's
    ``idmapping_selected.tab``, whose ninth and tenth are a member and its cluster.

    Raises:
        DataError: the file cannot be read, or a line has another number of columns, or a cluster without members.
    """
    clusters: list[str] = []
    counts: list[int] = []
    members: list[str] = []
    first = 1
    try:
        with xopen(path, "rb", threads=0) as stream:
            for number, raw in enumerate(stream, start=1):
                columns = raw.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
                if len(columns) == 1 and not columns[0].strip():
                    continue
                cluster, names = _line(columns, f"{path}, line {number}")
                if names:
                    clusters.append(cluster)
                    counts.append(len(names))
                    members.extend(names)
                if len(members) >= ENTRIES:
                    yield Entries(clusters, counts, members, f"{path}, lines from {first}")
                    clusters, counts, members, first = [], [], [], number + 1
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if clusters:
        yield Entries(clusters, counts, members, f"{path}, lines from {first}")


def _line(columns: list[str], place: str) -> tuple[str, list[str]]:
    if len(columns) >= _SELECTED_COLUMNS:
        member, cluster = columns[_UNIREF90], columns[_UNIREF50]
        return cluster, [member] if member and cluster else []
    if len(columns) != 2:
        raise DataError(
            f"{place}: {len(columns)} columns; a mapping has two (cluster, members by comma), UniProt's "
            "idmapping_selected.tab 22"
        )
    names = [name.strip() for name in columns[1].split(",") if name.strip()]
    if not names or not columns[0].strip():
        raise DataError(f"{place}: cluster {columns[0]!r} is empty; name its members, or remove the line")
    return columns[0].strip(), names


@dataclass
class Assignment:
    """What a mapping came to."""

    entries: int = 0
    assigned: int = 0
    repeated: int = 0
    unknown_clusters: int = 0
    left_out: int = 0
    absent: int = 0
    without_cluster: int = 0
    header_line: int = 0


@dataclass
class Problems:
    """Lines for a file beside the output, of which messages show the first."""

    path: Path
    first: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)

    def add(self, kind: str, *fields: str) -> None:
        """Note one problem."""
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write("\t".join((*fields, kind)) + "\n")
        self.first.setdefault(kind, fields[0])
        self.counts[kind] = self.counts.get(kind, 0) + 1


class Assigner:
    """Notes in ``folder`` which cluster every member of a table belongs to.

    Args:
        folder: gets ``cluster_of`` and ``place_of``.
        clusters: index of the ids of clusters, and which table they are rows of.
        members: index of the ids of members.
        problems: gets a line for each that is absent or in two clusters.
    """

    def __init__(
        self, folder: Path, clusters: tuple[Table, IdIndex], members: tuple[Table, IdIndex], problems: Problems
    ) -> None:
        self.counts = Assignment()
        self._reps, self._clusters = clusters
        self._table, self._members = members
        self._problems = problems
        left = folder / "left"
        self._left = IdIndex.build(self._table.keys(".left"), left)
        self._cluster_of = map_file(folder / "cluster_of", np.int64, write=len(self._table))
        self._place_of = map_file(folder / "place_of", np.int64, write=len(self._table))
        for start in range(0, len(self._table), ENTRIES):
            self._cluster_of[start : start + ENTRIES] = -1

    def read(self, mapping: Iterable[Entries], advance: Callable[[int], None]) -> None:
        """Take in all of a mapping.

        Raises:
            DataError: a member is in two clusters.
        """
        for number, entries in enumerate(mapping):
            found = self._clusters.find(_keys(entries.clusters))
            rows = self._members.find(_keys(entries.members))
            if number == 0 and found[0] < 0 and (rows[: entries.counts[0]] < 0).all():
                # Neither the cluster nor a member is known: a header, which some mappings have.
                skip = entries.counts[0]
                self.counts.header_line = 1
                rest = Entries(entries.clusters[1:], entries.counts[1:], entries.members[skip:], entries.place)
                self._take(rest, np.repeat(found[1:], rest.counts), rows[skip:])
            else:
                self._take(entries, np.repeat(found, entries.counts), rows)
            advance(len(entries.members))
        self._finish()

    def _finish(self) -> None:
        """Count who has no cluster, and see that nobody has two."""
        for start in range(0, len(self._table), ENTRIES):
            self.counts.without_cluster += int((self._cluster_of[start : start + ENTRIES] < 0).sum())
        self.counts.assigned = len(self._table) - self.counts.without_cluster
        for array in (self._cluster_of, self._place_of):
            if isinstance(array, np.memmap):
                array.flush()
        if twice := self._problems.counts.get("in two clusters"):
            first = self._problems.first["in two clusters"]
            raise DataError(
                f"{twice:,} members are in two clusters, the first {first!r}; all are listed in {self._problems.path}: "
                "leave each in one"
            )

    def check_absent(self, policy: Absent) -> None:
        """See that every member that was named is there.

        Raises:
            DataError: one is not, and that is an error.
        """
        if self.counts.absent and policy == "error":
            raise DataError(
                f"the mapping names {self.counts.absent:,} members that are absent from the sequences, the first "
                f"{self._problems.first['absent']!r}; all are listed in {self._problems.path}: add them, or pass "
                "--absent skip"
            )

    def _take(self, entries: Entries, clusters: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        counts = self.counts
        places = counts.entries + np.arange(len(rows))
        counts.entries += len(rows)
        unknown = clusters < 0
        counts.unknown_clusters += int(unknown.sum())
        missing = np.flatnonzero((rows < 0) & ~unknown)
        if missing.size:
            left = self._left.find(_keys([entries.members[at] for at in missing])) >= 0
            counts.left_out += int(left.sum())
            names = np.repeat(np.arange(len(entries.clusters)), entries.counts)
            for at in missing[~left]:
                self._problems.add("absent", entries.members[at], entries.clusters[names[at]])
                counts.absent += 1
        known = np.flatnonzero((rows >= 0) & ~unknown)
        # The first naming counts; later ones, in these lines or before, repeat or contradict it.
        unique, first = np.unique(rows[known], return_index=True)
        old = self._cluster_of[unique]
        new = old < 0
        self._cluster_of[unique[new]] = clusters[known[first[new]]]
        self._place_of[unique[new]] = places[known[first[new]]]
        counts.repeated += len(known) - int(new.sum())
        now = self._cluster_of[rows[known]]
        for at in known[now != clusters[known]]:
            pair = self._reps.names(np.array([self._cluster_of[rows[at]], clusters[at]]))
            self._problems.add("in two clusters", entries.members[at], *pair)
            counts.repeated -= 1


def _keys(names: Iterable[str]) -> Keys:
    return keys_of(name.encode("utf-8", "surrogateescape") for name in names)


class HeaderClusters:
    """Reads the cluster of a UniRef90 record from its header, or failing that from its name; for ``Reader.table``.

    The header may name it anywhere (``UniRef50_Q8WZ42``); ``UniRef90_X`` otherwise belongs to ``UniRef50_X``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")

    def __call__(self, records: list[Record]) -> None:
        """Note the keys of the clusters of some records."""
        names = [
            found[0] if (found := _NAMED.search(record.description)) else record.id.replace("UniRef90_", "UniRef50_", 1)
            for record in records
        ]
        with self._path.open("ab") as stream:
            _keys(names).tofile(stream)


def assign_by_keys(folder: Path, clusters: IdIndex, members: Table, keys: Path) -> Assignment:
    """As ``Assigner``, where every member says itself which cluster it belongs to.

    Raises:
        DataError: not one names a cluster that there is.
    """
    named: Keys = map_file(keys, np.uint64).reshape(-1, 2)
    cluster_of: Any = map_file(folder / "cluster_of", np.int64, write=len(members))
    place_of: Any = map_file(folder / "place_of", np.int64, write=len(members))
    for start in range(0, len(members), ENTRIES):
        part = slice(start, start + ENTRIES)
        cluster_of[part] = clusters.find(np.asarray(named[part]))
        place_of[part] = np.arange(start, min(start + ENTRIES, len(members)))
    without = sum(int((cluster_of[start : start + ENTRIES] < 0).sum()) for start in range(0, len(members), ENTRIES))
    if without == len(members):
        raise DataError(
            "no member's header or name tells its UniRef50 cluster, as UniProt's do not; give the mapping with "
            "--members, for which UniProt's idmapping_selected.tab serves"
        )
    return Assignment(entries=len(members), assigned=len(members) - without, without_cluster=without)
