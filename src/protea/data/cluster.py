"""Stores from any sequences: clustered with MMseqs2 at 50 % identity, with members at 90 %, as UniRef is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.data.build import Build
from protea.data.build_settings import BuildSettings
from protea.data.mapping import Members
from protea.data.mmseqs import CLUSTER_FLAGS, MEMBER_FLAGS, read_pairs, split_flags, write_fasta
from protea.data.token_table import Table, TableWriter, map_file, new_file, take
from protea.data.work import Numbers
from protea.errors import DataError
from protea.fasta import read_blocks
from protea.progress import Progress

_DISK_FACTOR: Final = 4.0
"""Bytes of disk for each byte of input, those of MMseqs2 included."""
_REPRESENTATIVE: Final = "representative"


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(BuildSettings):
    """The settings of a build with its own clustering.

    Attributes:
        member_flags: of the first ``mmseqs linclust``, whose representatives are the members.
        cluster_flags: of the second one, which clusters the members.
    """

    member_flags: str = MEMBER_FLAGS
    cluster_flags: str = CLUSTER_FLAGS

    def check(self) -> None:
        """Check every value."""
        super().check()
        split_flags(self.member_flags)
        split_flags(self.cluster_flags)


def build_fasta(
    settings: ClusterSettings, inputs: Sequence[str | Path], progress: Progress, *, overwrite: bool = False
) -> Numbers:
    """Build a store from FASTA files; return the numbers of its steps and splits."""
    with Build(settings, "fasta", {"sequences": list(inputs)}, progress, overwrite=overwrite) as build:
        build.check_space(inputs, _DISK_FACTOR)
        build.mmseqs()
        table = build.read("read sequences", read_blocks(inputs), inputs)
        members = _cluster(build, "cluster members", table, None, settings.member_flags)
        clusters = _cluster(build, "cluster", table, members, settings.cluster_flags)
        folder = _representatives(build, table, clusters)
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
    """Cluster the representatives of the clustering before.

    Returns:
        ``[N]`` int64, the row of each sequence's representative, or -1 for sequences that were not clustered.
    """

    def make(folder: Path) -> Numbers:
        program = build.mmseqs()
        first = len(program.commands)
        total = write_fasta(folder / "sequences.fasta", _batches(table, before), build.alphabet)
        result = program.cluster(folder / "sequences.fasta", folder / "mmseqs", flags)
        representative = new_file(folder / _REPRESENTATIVE, np.int64, len(table))
        representative[:] = -1
        clustered = own = 0
        for pairs in read_pairs(result):
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


def _representatives(build: Build, table: Table, clusters: Any) -> Path:
    """The stage that numbers the clusters: a folder with the table of representatives and the files of ``Members``."""

    def make(folder: Path) -> Numbers:
        cluster_of = Members.create(table, folder).cluster_of
        with TableWriter(folder) as writer:
            for batch, rows in _batches(table, clusters):
                cluster_of[rows] = writer.rows + np.arange(len(rows))
                writer.write(batch)
        members = 0
        for first, batch in table.batches():
            rows = np.arange(first, first + len(batch))
            representative = np.asarray(clusters[rows])
            # Representatives have their number already, and it is the number of all that they represent.
            cluster_of[rows] = np.where(representative >= 0, cluster_of[np.maximum(representative, 0)], -1)
            members += int((representative >= 0).sum())
        return {"clusters": writer.rows, "members": members, "left_out_by_members": len(table) - members}

    return build.step("clusters", make)
