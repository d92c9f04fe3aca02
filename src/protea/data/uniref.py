"""UniRef: clusters at 50 % identity, sampled by their members at 90 %, as the ESM models were trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from protea.data.assemble import Members
from protea.data.build import Build, Read
from protea.data.build_settings import BuildSettings
from protea.data.mapping import Assigner, Entries, HeaderClusters, Problems, assign_by_keys, read_mapping
from protea.data.work import Numbers, Watcher, fingerprints
from protea.errors import DataError, UsageError
from protea.fasta import read_blocks

_NAMED: Final = "named clusters"


def build_uniref(
    settings: BuildSettings,
    uniref50: Sequence[Path],
    uniref90: Sequence[Path],
    mapping: Path | None,
    watcher: Watcher,
    *,
    overwrite: bool = False,
) -> Numbers:
    """Build a store from UniRef's FASTA files; its steps and splits are returned.

    Args:
        settings: of the build.
        uniref50: the representatives of the clusters.
        uniref90: the sequences that training samples; without any, each cluster is its representative.
        mapping: clusters and their members, see ``read_mapping``; without it the headers of ``uniref90`` tell.
        watcher: told of progress.
        overwrite: replace a store that is there.

    Raises:
        ProteaError: see ``docs/data.md`` for all that can be wrong.
    """
    if mapping is not None and not uniref90:
        raise UsageError("--members needs --uniref90, which has the sequences of the members")
    inputs = {"uniref50": list(uniref50), "uniref90": list(uniref90), "members": mapping}
    with Build(settings, "uniref", inputs, watcher, overwrite=overwrite) as build:
        build.check_space([*uniref50, *uniref90])
        if settings.filtered and settings.valid.strip() not in {"0", "0%"}:
            build.mmseqs()
        representatives = build.read("read representatives", read_blocks(uniref50), uniref50)
        kinds = build.filter(representatives.table, build.draw(representatives.table))
        members = attach(build, representatives, uniref90, mapping) if uniref90 else None
        return build.store(representatives.table, kinds, members)


def attach(build: Build, clusters: Read, sequences: Sequence[Path], mapping: Path | None) -> Members:
    """Read the members and note which cluster each belongs to.

    Raises:
        DataError: the mapping contradicts itself or the sequences.
    """
    watch = None if mapping is not None else lambda folder: HeaderClusters(folder / _NAMED)
    members = build.read(
        "read members", read_blocks(sequences), [*sequences, "by header" if watch else "by mapping"], watch
    )
    if mapping is not None:
        return assign(build, clusters, members, read_mapping(mapping), mapping)

    def make(folder: Path) -> Numbers:
        build.watcher.begin("headers")
        return asdict(assign_by_keys(folder, clusters.ids, members.table, members.folder / _NAMED))

    return Members.found(members.table, build.step("attach members", make))


def assign(build: Build, clusters: Read, members: Read, mapping: Iterable[Entries], source: Path) -> Members:
    """Note which cluster each member belongs to, by a mapping that comes from a file.

    Raises:
        DataError: the mapping contradicts itself or the sequences.
    """

    def make(folder: Path) -> Numbers:
        build.watcher.begin("mapping")
        pairs = (clusters.table, clusters.ids), (members.table, members.ids)
        assigner = Assigner(folder, *pairs, Problems(build.problems))
        assigner.read(mapping, build.watcher.advance)
        assigner.check_absent(build.settings.absent)
        if not assigner.counts.assigned:
            raise DataError("the mapping names none of the clusters and members; take all files from one release")
        return asdict(assigner.counts)

    given = [fingerprints([source]), build.settings.absent]
    return Members.found(members.table, build.step("attach members", make, given))
