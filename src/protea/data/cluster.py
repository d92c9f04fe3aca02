"""Any sequences: clustered here, members at 90 % identity within clusters at 50 %, as UniRef does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protea.data.assemble import Members
from protea.data.build import Build
from protea.data.build_settings import BuildSettings
from protea.data.mapping import ENTRIES
from protea.data.mmseqs import CLUSTER_FLAGS, MEMBER_FLAGS, read_pairs, split_flags, write_fasta
from protea.data.token_table import Table, TableWriter, TokenRows, map_file
from protea.data.work import Numbers, Watcher
from protea.errors import DataError
from protea.fasta import read_blocks

_DISK: Final = 4.0
"""Bytes of disk for each byte of input, MMseqs2's own included."""


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(BuildSettings):
    """The settings of a build that clusters by itself.

    Attributes:
        member_flags: of the first ``mmseqs linclust``, whose representatives are the members.
        cluster_flags: of the second, which clusters the members.
    """

    member_flags: str = MEMBER_FLAGS
    cluster_flags: str = CLUSTER_FLAGS

    def check(self) -> None:
        """See that every value can be meant."""
        super().check()
        split_flags(self.member_flags)
        split_flags(self.cluster_flags)


def build_fasta(
    settings: ClusterSettings, inputs: Sequence[str | Path], watcher: Watcher, *, overwrite: bool = False
) -> Numbers:
    """Build a store from any FASTA files; its steps and splits are returned.

    Raises:
        ProteaError: see ``docs/data.md`` for all that can be wrong.
    """
    with Build(settings, "fasta", {"sequences": list(inputs)}, watcher, overwrite=overwrite) as build:
        build.check_space(inputs, _DISK)
        build.mmseqs()
        table = build.read("read sequences", read_blocks(inputs), inputs).table
        members = _cluster(build, "cluster members", table, None, settings.member_flags)
        clusters = _cluster(build, "cluster", table, members, settings.cluster_flags)
        folder, representatives = _representatives(build, table, clusters)
        kinds = build.filter(representatives, build.draw(representatives))
        return build.store(representatives, kinds, Members.found(table, folder))


def _cluster(build: Build, name: str, table: Table, before: Any, flags: str) -> Any:
    """The representative's row for every row that represents itself in the clustering before, -1 for others."""

    def make(folder: Path) -> Numbers:
        build.watcher.begin(name)
        program = build.mmseqs()
        first = len(program.commands)

        def chosen() -> Iterator[tuple[TokenRows, NDArray[np.int64]]]:
            for batch in table.batches():
                rows = np.arange(batch.first, batch.first + len(batch))
                if before is not None:
                    rows = rows[before[rows] == rows]
                yield batch.take(rows - batch.first), rows

        total = write_fasta(folder / "sequences.fasta", chosen(), build.alphabet)
        result = program.cluster(folder / "sequences.fasta", folder / "work", flags)
        of = map_file(folder / "representative", np.int64, write=len(table))
        for start in range(0, len(table), ENTRIES):
            of[start : start + ENTRIES] = -1
        placed = 0
        for pairs in read_pairs(result):
            of[pairs[:, 1]] = pairs[:, 0]
            placed += len(pairs)
        if placed != total:
            raise DataError(f"mmseqs linclust {flags}: {placed:,} of {total:,} sequences came back in a cluster")
        found = sum(_own(of, start) for start in range(0, len(table), ENTRIES))
        if isinstance(of, np.memmap):
            of.flush()
        (folder / "sequences.fasta").unlink()
        shutil.rmtree(folder / "work")
        commands = program.commands[first:]
        return {"mmseqs": program.version, "commands": commands, "sequences": total, "representatives": found}

    return map_file(build.step(name, make, flags) / "representative", np.int64)


def _own(of: Any, start: int) -> int:
    part = np.asarray(of[start : start + ENTRIES])
    return int((part == np.arange(start, start + len(part))).sum())


def _representatives(build: Build, table: Table, clusters: Any) -> tuple[Path, Table]:
    """The table of representatives, and the cluster of every member, in a folder."""

    def make(folder: Path) -> Numbers:
        build.watcher.begin("representatives")
        numbers = map_file(folder / "numbers", np.int64, write=len(table))
        with TableWriter(folder / "table") as writer:
            for batch in table.batches():
                rows = np.arange(batch.first, batch.first + len(batch))
                own = rows[clusters[rows] == rows]
                numbers[own] = writer.rows + np.arange(len(own))
                writer.write(batch.take(own - batch.first))
            total = writer.rows
        cluster_of = map_file(folder / "cluster_of", np.int64, write=len(table))
        place_of = map_file(folder / "place_of", np.int64, write=len(table))
        members = 0
        for start in range(0, len(table), ENTRIES):
            of = np.asarray(clusters[start : start + ENTRIES])
            cluster_of[start : start + len(of)] = np.where(of >= 0, numbers[np.maximum(of, 0)], -1)
            place_of[start : start + len(of)] = np.arange(start, start + len(of))
            members += int((of >= 0).sum())
        for array in (cluster_of, place_of):
            array.flush()
        return {"clusters": total, "members": members, "left_out_by_members": len(table) - members}

    folder = build.step("clusters", make)
    return folder, Table(folder / "table")
