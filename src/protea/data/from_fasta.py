"""Stores from FASTA files, and the mappings that assign sequences to clusters.

UniRef has clusters at 50 % identity with members at 90 %; the ESM models were trained on it. Other sequences are
clustered in the same way with MMseqs2.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xopen import xopen

from protea.data.build import Build, Numbers, fingerprints
from protea.data.build_settings import BuildSettings, ClusterSettings
from protea.data.encoding import NOTES
from protea.data.mmseqs import read_rows, write_fasta
from protea.data.token_table import ENTRIES, Digests, Table, TableWriter, digests_of, map_file, new_file, take
from protea.data.writer import Members
from protea.errors import DataError, UsageError
from protea.fasta import DAMAGED, Record, place_in, read_blocks, size_of
from protea.progress import Progress
from protea.records import RECOGNISED, InputColumns, checked, is_table, read_groups
from protea.text import counted

_DISK_FACTOR: Final = 4.0
"""Bytes of disk for each byte of input if MMseqs2 clusters it."""
_REPRESENTATIVE: Final = "representative"
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
"""Counters of a mapping's entries; an entry is a cluster with one member."""


def build_uniref(
    settings: BuildSettings,
    uniref50: Sequence[Path],
    uniref90: Sequence[Path],
    mapping: Path | None,
    progress: Progress,
    *,
    overwrite: bool = False,
    command: str = "uniref",
) -> Numbers:
    """Build a store from UniRef's FASTA files; return the numbers of its steps and splits.

    Without ``uniref90``, a cluster's only member is its representative; without ``mapping``, a file for
    ``read_mapping``, the headers of ``uniref90`` name the clusters. ``command`` is for the manifest.
    """
    if mapping is not None and not uniref90:
        raise UsageError("--members needs --uniref90, which has the sequences of the members")
    inputs = {"uniref50": list(uniref50), "uniref90": list(uniref90), "members": mapping}
    with Build(settings, command, inputs, progress, overwrite=overwrite) as build:
        build.check_space([*uniref50, *uniref90])
        if settings.filtered and settings.valid.strip() not in {"0", "0%"}:
            build.mmseqs()
        representatives = build.read("read representatives", read_blocks(uniref50), uniref50, total=size_of(uniref50))
        kinds = build.filter(representatives, build.draw(representatives))
        members = None
        if mapping is not None:
            table = build.read("read members", read_blocks(uniref90), uniref90, total=size_of(uniref90))
            members = attach_by_mapping(
                build, representatives, table, read_mapping(mapping), mapping, size_of([mapping])
            )
        elif uniref90:
            members = attach_by_headers(build, representatives, uniref90)
        return build.store(representatives, kinds, members)


def build_fasta(
    settings: ClusterSettings,
    inputs: Sequence[str | Path],
    progress: Progress,
    *,
    columns: InputColumns = RECOGNISED,
    overwrite: bool = False,
    command: str = "fasta",
) -> Numbers:
    """Build a store from any FASTA files and tables; return the numbers of its steps and splits."""
    given = {"sequences": checked(inputs, columns)} | ({} if columns == RECOGNISED else {"columns": asdict(columns)})
    with Build(settings, command, given, progress, overwrite=overwrite) as build:
        build.check_space(inputs, _DISK_FACTOR)
        build.mmseqs()
        total = None if any(map(is_table, inputs)) else size_of(inputs)
        groups, names = read_groups(inputs, columns), [columns.id, columns.sequence]
        table = build.read("read sequences", groups, inputs, given=names, total=total)
        representative = _cluster(build, "cluster members", table, None, settings.member_flags)
        representative = _cluster(build, "cluster", table, representative, settings.cluster_flags)
        folder = _number_clusters(build, table, representative)
        representatives = Table(folder)
        kinds = build.filter(representatives, build.draw(representatives))
        return build.store(representatives, kinds, Members.load(table, folder))


def _batches(table: Table, representative: Any) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """The sequences that represent themselves, with their rows; all sequences if ``representative`` is ``None``."""
    for first, batch in table.batches():
        rows = np.arange(first, first + len(batch))
        if representative is not None:
            rows = rows[representative[rows] == rows]
        yield take(batch, rows - first), rows


def _cluster(build: Build, name: str, table: Table, before: Any, flags: str) -> Any:
    """Cluster the representatives of the clustering ``before``; give each sequence's representative, or -1 if none."""

    def make(folder: Path) -> Numbers:
        program = build.mmseqs()
        first = len(program.commands)
        total = write_fasta(folder / "sequences.fasta", _batches(table, before), build.alphabet)
        pairs_file = program.cluster(folder / "sequences.fasta", folder / "mmseqs", flags)
        representative = new_file(folder / _REPRESENTATIVE, np.int64, len(table))
        representative[:] = -1
        clustered = own = 0
        for pairs in read_rows(pairs_file, np.int64):
            representative[pairs[:, 1]] = pairs[:, 0]
            clustered += len(pairs)
            own += int((pairs[:, 0] == pairs[:, 1]).sum())
        if clustered != total:
            raise DataError(f"mmseqs linclust {flags}: the clusters have {clustered:,} of {total:,} sequences")
        (folder / "sequences.fasta").unlink()
        shutil.rmtree(folder / "mmseqs")
        commands = program.commands[first:]
        return {"mmseqs": program.version, "commands": commands, "sequences": total, "representatives": own}

    return map_file(build.step(name, make, flags) / _REPRESENTATIVE, np.int64)


def _number_clusters(build: Build, table: Table, representative: Any) -> Path:
    """The stage that numbers the clusters: a folder with the table of representatives and the files of ``Members``."""

    def make(folder: Path) -> Numbers:
        cluster_of = Members.create(table, folder).cluster_of
        with TableWriter(folder) as writer:
            for batch, rows in _batches(table, representative):
                cluster_of[rows] = writer.rows + np.arange(len(rows))
                writer.write(batch)
        members = 0
        for start, batch in table.batches():
            part = slice(start, start + len(batch))
            owners = representative[part]
            # Representatives have a number already, and all sequences that they represent get the same number.
            cluster_of[part] = np.where(owners >= 0, cluster_of[np.maximum(owners, 0)], -1)
            members += int((owners >= 0).sum())
        return {"clusters": writer.rows, "members": members, "left_out_by_members": len(table) - members}

    return build.step("clusters", make)


class Entries(NamedTuple):
    """Some lines of a mapping: the cluster and the number of members of each, and one list of all members."""

    clusters: list[str]
    counts: list[int]
    members: list[str]
    place: int = 0  # in the file, behind them; 0 if nobody can say


def read_mapping(path: Path) -> Iterator[Entries]:
    """The lines of a mapping, plain or compressed.

    Two columns are a cluster and its members, separated by commas (BioNeMo 1's ``mapping.tsv``). 22 columns are
    UniProt's ``idmapping_selected.tab``, in which column 9 is a member and column 10 its cluster.
    """
    entries, end = Entries([], [], []), 0
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
                    yield entries._replace(place=place_in(stream))
                    entries = Entries([], [], [])
            end = place_in(stream)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if entries.clusters:
        yield entries._replace(place=end)


def _parse(columns: list[str], place: str) -> tuple[str, list[str]]:
    if len(columns) >= _SELECTED_COLUMNS:
        member, cluster = columns[_UNIREF90], columns[_UNIREF50]
        return cluster, [member] if member and cluster else []
    if len(columns) != 2:
        raise DataError(
            f"{place}: the line has {counted(len(columns), 'column')}; a mapping has 2 (cluster, members separated by "
            "commas), UniProt's idmapping_selected.tab 22"
        )
    cluster, members = columns[0].strip(), [name.strip() for name in columns[1].split(",") if name.strip()]
    if not members or not cluster:
        raise DataError(f"{place}: cluster {columns[0]!r} has no members; name them, or remove the line")
    return cluster, members


def attach_by_mapping(
    build: Build, clusters: Table, table: Table, mapping: Iterable[Entries], source: Path, total: int | None = None
) -> Members:
    """The stage that assigns the sequences of ``table`` to clusters by the entries of a mapping, the file ``source``.

    ``total`` is the size of that file, if the entries say their place in it. A member belongs to the cluster of its
    first entry. A ``DataError`` reports members in two clusters and, unless the settings skip them, absent members.
    """

    def make(folder: Path) -> Numbers:
        members = Members.create(table, folder, ordered=True)
        counts = dict.fromkeys(_COUNTERS, 0)
        before = 0
        for number, entries in enumerate(mapping):
            owners, rows = clusters.find(_digests(entries.clusters)), table.find(_digests(entries.members))
            skip = 0
            if number == 0 and owners[0] < 0 and (rows[: entries.counts[0]] < 0).all():
                counts["header_line"] = 1  # no known id in the first line: it is a header
                skip = entries.counts[0]
            rows, owners = rows[skip:], np.repeat(owners, entries.counts)[skip:]
            names = np.array(entries.members[skip:], object)
            places = counts["entries"] + np.arange(len(rows))
            counts["entries"] += len(rows)
            counts["unknown_clusters"] += int((owners < 0).sum())

            absent = np.flatnonzero((rows < 0) & (owners >= 0))
            left_out = table.was_left_out(_digests(names[absent]))
            absent = absent[~left_out]
            counts["left_out"] += int(left_out.sum())
            counts["absent"] += len(absent)
            build.problems.add("absent", [*zip(names[absent], clusters.names(owners[absent]), strict=True)])

            known = np.flatnonzero((rows >= 0) & (owners >= 0))
            unique, first = np.unique(rows[known], return_index=True)
            new = members.cluster_of[unique] < 0
            members.cluster_of[unique[new]] = owners[known[first[new]]]
            members.place_of[unique[new]] = places[known[first[new]]]
            twice = known[members.cluster_of[rows[known]] != owners[known]]
            counts["repeated"] += len(known) - int(new.sum()) - len(twice)
            earlier, later = clusters.names(members.cluster_of[rows[twice]]), clusters.names(owners[twice])
            build.problems.add(_TWO_CLUSTERS, [*zip(names[twice], earlier, later, strict=True)])
            here = entries.place or before + len(entries.members)
            build.progress.advance(here - before)
            before = here
        counts["without_cluster"] = int(np.count_nonzero(members.cluster_of < 0))
        counts["assigned"] = len(table) - counts["without_cluster"]
        build.problems.check(_TWO_CLUSTERS, "members in two clusters", "keep one cluster for each")
        build.check_absent("ids in the mapping")
        if not counts["assigned"]:
            raise DataError(
                "no cluster of the mapping has a member among the sequences; take all files from one release"
            )
        return counts

    given = [fingerprints([source]), build.settings.absent]
    return Members.load(table, build.step(_ATTACH, make, given, total))


def _digests(names: Iterable[str]) -> Digests:
    return digests_of(name.encode("utf-8", "surrogateescape") for name in names)


def attach_by_headers(build: Build, clusters: Table, sources: Sequence[Path]) -> Members:
    """The stages that read members and assign each to the cluster that its header or name contains.

    The cluster may be anywhere in the header (``UniRef50_Q8WZ42``); otherwise ``UniRef90_X`` belongs to ``UniRef50_X``.
    """
    table = build.read("read members", read_blocks(sources), sources, _clusters_of_headers, total=size_of(sources))

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
