"""Stores from UniRef: clusters at 50 % identity with members at 90 %, as the ESM models were trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from protea.data.build import Build
from protea.data.build_settings import BuildSettings
from protea.data.mapping import (
    Assigner,
    Entries,
    Members,
    assign_by_headers,
    clusters_of_headers,
    read_mapping,
)
from protea.data.token_table import Table
from protea.data.work import Numbers, fingerprints
from protea.errors import UsageError
from protea.fasta import read_blocks
from protea.progress import Progress


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
            members = assign_by_mapping(build, representatives, table, read_mapping(mapping), mapping)
        elif uniref90:
            members = _assign_by_headers(build, representatives, uniref90)
        return build.store(representatives, kinds, members)


def _assign_by_headers(build: Build, clusters: Table, uniref90: Sequence[Path]) -> Members:
    table = build.read("read members", read_blocks(uniref90), uniref90, clusters_of_headers)
    folder = build.step("attach members", lambda folder: asdict(assign_by_headers(folder, clusters, table)))
    return Members.load(table, folder)


def assign_by_mapping(build: Build, clusters: Table, table: Table, mapping: Iterable[Entries], source: Path) -> Members:
    """The stage that assigns members to clusters by the mapping in a file."""

    def make(folder: Path) -> Numbers:
        assigner = Assigner(folder, clusters, table, build.problems)
        return asdict(assigner.assign(mapping, build.settings.absent, build.progress))

    return Members.load(table, build.step("attach members", make, [fingerprints([source]), build.settings.absent]))
