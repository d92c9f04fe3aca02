"""Assigns sequences to clusters, by a mapping or by headers. Files hold the answer: one number for each sequence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xopen import xopen

from protea.data.build import Build, Numbers, fingerprints
from protea.data.encoding import NOTES
from protea.data.token_table import ENTRIES, Digests, Table, digests_of, map_file
from protea.data.writer import Members
from protea.errors import DataError
from protea.fasta import DAMAGED, Record, read_blocks

ABSENT: Final = "absent"
_TWO_CLUSTERS: Final = "in two clusters"
_ATTACH: Final = "attach members"
_SELECTED_COLUMNS: Final = 22
_UNIREF90, _UNIREF50 = 8, 9
_UNIREF50_NAME: Final = re.compile(r"\bUniRef50_[^\s;,]+")
_COUNTERS: Final = (
    "entries",
    "assigned",
    "repeated",
    "unknown_clusters",
    "left_out",
    "absent",
    "without_cluster",
    "header_line",
)
"""What is counted of a mapping's entries, each a cluster with one member."""


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


def attach_by_mapping(build: Build, clusters: Table, table: Table, mapping: Iterable[Entries], source: Path) -> Members:
    """The stage that assigns the sequences of ``table`` to clusters by the entries of a mapping, the file ``source``.

    A ``DataError`` reports members in two clusters and, unless the settings skip them, absent members.
    """

    def make(folder: Path) -> Numbers:
        members = Members.create(table, folder, ordered=True)
        counts = dict.fromkeys(_COUNTERS, 0)
        header = 0
        for number, entries in enumerate(mapping):
            owners = clusters.find(_digests(entries.clusters))
            rows = table.find(_digests(entries.members))
            if number == 0 and owners[0] < 0 and (rows[: entries.counts[0]] < 0).all():
                header = entries.counts[0]  # the line names nothing that exists; some mappings begin with a header
            owners = np.repeat(owners, entries.counts)
            _attach(build, clusters, members, entries.members, owners, rows, counts)
            build.progress.advance(len(entries.members))
        without_cluster = int(np.count_nonzero(members.cluster_of < 0))
        assigned = len(table) - without_cluster
        build.problems.check(_TWO_CLUSTERS, "members in two clusters", "keep one cluster for each")
        if build.settings.absent == "error":
            build.problems.check(ABSENT, "ids in the mapping without a sequence", "add them, or pass --absent skip")
        if not assigned:
            raise DataError(
                "the mapping names no cluster with a member that the sequences have; take all files from one release"
            )
        return counts | {
            "entries": counts["entries"] - header,
            "assigned": assigned,
            "unknown_clusters": counts["unknown_clusters"] - header,
            "without_cluster": without_cluster,
            "header_line": int(header > 0),
        }

    return Members.load(table, build.step(_ATTACH, make, [fingerprints([source]), build.settings.absent]))


def _attach(
    build: Build,
    clusters: Table,
    members: Members,
    names: list[str],
    owners: NDArray[np.int64],
    rows: NDArray[np.int64],
    counts: Numbers,
) -> None:
    """Assign the named members, at some rows of their table, to the clusters ``owners``; -1 is an unknown number.

    A member belongs to the cluster of its first entry; later entries repeat or contradict it.
    """
    places = counts["entries"] + np.arange(len(rows))
    counts["entries"] += len(rows)
    counts["unknown_clusters"] += int((owners < 0).sum())
    missing = np.flatnonzero((rows < 0) & (owners >= 0))
    if missing.size:
        left_out = members.table.was_left_out(_digests([names[entry] for entry in missing]))
        absent = missing[~left_out]
        counts["left_out"] += int(left_out.sum())
        counts["absent"] += len(absent)
        pairs = zip([names[entry] for entry in absent], clusters.names(owners[absent]), strict=True)
        build.problems.add(ABSENT, list(pairs))
    known = np.flatnonzero((rows >= 0) & (owners >= 0))
    unique, first = np.unique(rows[known], return_index=True)
    new = members.cluster_of[unique] < 0
    members.cluster_of[unique[new]] = owners[known[first[new]]]
    members.place_of[unique[new]] = places[known[first[new]]]
    twice = known[members.cluster_of[rows[known]] != owners[known]]
    counts["repeated"] += len(known) - int(new.sum()) - len(twice)
    earlier, later = clusters.names(members.cluster_of[rows[twice]]), clusters.names(owners[twice])
    build.problems.add(_TWO_CLUSTERS, list(zip([names[entry] for entry in twice], earlier, later, strict=True)))


def _digests(names: Iterable[str]) -> Digests:
    return digests_of(name.encode("utf-8", "surrogateescape") for name in names)


def attach_by_headers(build: Build, clusters: Table, sources: Sequence[Path]) -> Members:
    """The stages that read members and assign each to the cluster that its header or name contains.

    The header may name it anywhere (``UniRef50_Q8WZ42``); otherwise ``UniRef90_X`` belongs to ``UniRef50_X``.
    """
    table = build.read("read members", read_blocks(sources), sources, _clusters_of_headers)

    def make(folder: Path) -> Numbers:
        digests: Digests = map_file(table.folder / NOTES, "S16")
        cluster_of = Members.create(table, folder).cluster_of
        for start in range(0, len(table), ENTRIES):
            cluster_of[start : start + ENTRIES] = clusters.find(digests[start : start + ENTRIES])
        without_cluster = int(np.count_nonzero(cluster_of < 0))
        assigned = len(table) - without_cluster
        if not assigned:
            raise DataError(
                "no member's header or name contains its UniRef50 cluster (UniProt's headers never do); give the "
                "mapping with --members, for example UniProt's idmapping_selected.tab"
            )
        counts = {"entries": len(table), "assigned": assigned, "without_cluster": without_cluster}
        return dict.fromkeys(_COUNTERS, 0) | counts

    return Members.load(table, build.step(_ATTACH, make))


def _clusters_of_headers(records: list[Record]) -> bytes:
    """The digest of each record's cluster; notes for ``Reader.table``."""
    matches = [_UNIREF50_NAME.search(record.description) for record in records]
    by_name = [record.id.replace("UniRef90_", "UniRef50_", 1) for record in records]
    return _digests(match[0] if match else name for match, name in zip(matches, by_name, strict=True)).tobytes()
