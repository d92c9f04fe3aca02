"""Stores from FASTA files.

UniRef has clusters at 50 % identity with members at 90 %; the ESM models were trained on it. Other sequences are
clustered in the same way with MMseqs2.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.data.build import Build, Numbers
from protea.data.build_settings import BuildSettings, ClusterSettings
from protea.data.mapping import attach_by_headers, attach_by_mapping, read_mapping
from protea.data.mmseqs import read_pairs, write_fasta
from protea.data.token_table import Table, TableWriter, map_file, new_file, take
from protea.data.writer import Members
from protea.errors import DataError, UsageError
from protea.fasta import read_blocks
from protea.progress import Progress
from protea.records import RECOGNISED, Columns, read_groups

_DISK_FACTOR: Final = 4.0
"""Bytes of disk for each byte of input if MMseqs2 clusters it."""
_REPRESENTATIVE: Final = "representative"


def build_uniref(
    settings: BuildSettings,
    uniref50: Sequence[Path],
    uniref90: Sequence[Path],
    mapping: Path | None,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Numbers:
    """Build a store from UniRef's FASTA files; return the numbers of its steps and splits.

    Args:
        settings: of the build.
        uniref50: the representatives of the clusters.
        uniref90: the members; if empty, the representative is a cluster's only member.
        mapping: see ``read_mapping``; if ``None``, the headers of ``uniref90`` name the clusters.
        progress: of the stages.
        overwrite: whether a store may be replaced.
    """
    if mapping is not None and not uniref90:
        raise UsageError("--members needs --uniref90, which has the sequences of the members")
    inputs = {"uniref50": list(uniref50), "uniref90": list(uniref90), "members": mapping}
    with Build(settings, "uniref", inputs, progress, overwrite=overwrite) as build:
        build.check_space([*uniref50, *uniref90])
        if settings.filtered and settings.valid.strip() not in {"0", "0%"}:
            build.mmseqs()
        representatives = build.read("read representatives", read_blocks(uniref50), uniref50)
        kinds = build.filter(representatives, build.draw(representatives))
        members = None
        if mapping is not None:
            table = build.read("read members", read_blocks(uniref90), uniref90)
            members = attach_by_mapping(build, representatives, table, read_mapping(mapping), mapping)
        elif uniref90:
            members = attach_by_headers(build, representatives, uniref90)
        return build.store(representatives, kinds, members)


def build_fasta(
    settings: ClusterSettings,
    inputs: Sequence[str | Path],
    progress: Progress,
    *,
    columns: Columns = RECOGNISED,
    overwrite: bool = False,
) -> Numbers:
    """Build a store from any FASTA files and tables; return the numbers of its steps and splits."""
    with Build(settings, "fasta", {"sequences": list(inputs)}, progress, overwrite=overwrite) as build:
        build.check_space(inputs, _DISK_FACTOR)
        build.mmseqs()
        table = build.read("read sequences", read_groups(inputs, columns), inputs, given=[columns.id, columns.sequence])
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
    """Cluster the representatives of the clustering ``before``.

    Returns:
        ``[N]`` int64, the row of each sequence's representative, or -1 for sequences that were not clustered.
    """

    def make(folder: Path) -> Numbers:
        program = build.mmseqs()
        first = len(program.commands)
        total = write_fasta(folder / "sequences.fasta", _batches(table, before), build.alphabet)
        pairs_file = program.cluster(folder / "sequences.fasta", folder / "mmseqs", flags)
        representative = new_file(folder / _REPRESENTATIVE, np.int64, len(table))
        representative[:] = -1
        clustered = own = 0
        for pairs in read_pairs(pairs_file):
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
            # Representatives have their number already, and it is the number of all that they represent.
            cluster_of[part] = np.where(owners >= 0, cluster_of[np.maximum(owners, 0)], -1)
            members += int((owners >= 0).sum())
        return {"clusters": writer.rows, "members": members, "left_out_by_members": len(table) - members}

    return build.step("clusters", make)
