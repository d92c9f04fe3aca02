"""Stores from data that BioNeMo prepared: FASTA with a mapping or CSV of BioNeMo 1, parquet with SQLite of BioNeMo 2.

The data are divided and filtered already. Here they are checked and encoded.
"""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xopen import xopen

from protea.data.build import Build, Numbers, fingerprints
from protea.data.build_settings import BuildSettings
from protea.data.encoding import NOTES, grouped
from protea.data.from_fasta import Entries, attach_by_mapping, read_mapping
from protea.data.token_table import ENTRIES, Table, TableWriter, map_file, token_batch
from protea.data.writer import TEST, TRAIN, VALID, Kinds, Members
from protea.errors import DataError, UsageError
from protea.fasta import DAMAGED, Record, read_blocks, read_fasta, size_of
from protea.progress import Progress
from protea.text import counted

_KIND_OF: Final = {"train": TRAIN, "valid": VALID, "val": VALID, "test": TEST}
_LOOKED_UP: Final = 500
"""Ids in one query of the database."""


def import_fasta(
    settings: BuildSettings,
    mapping: Path,
    uniref50: Path,
    uniref90: Path,
    valid: Path | None,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Numbers:
    """Import BioNeMo 1's ``mapping.tsv`` and FASTA files; return the numbers of the store's steps and splits.

    The files are ``uniref50_train_filt.fasta``, ``uniref90membersandreps_ur50trainfiltreps.fasta`` (or
    ``ur90_ur50_sampler.fasta``) and, for validation, ``uniref50_valid.fasta``.
    """
    inputs = {"mapping": mapping, "uniref50": uniref50, "uniref90": uniref90, "uniref50_valid": valid}
    files = {"train": uniref50} | ({"valid": valid} if valid is not None else {})
    with Build(settings, "import", inputs, progress, overwrite=overwrite) as build:
        build.check_space([*files.values(), uniref90])
        sources = {name: read_fasta([path]) for name, path in files.items()}
        clusters, kinds = _read_clusters(build, "read representatives", sources, files.values())
        table = build.read("read members", read_blocks([uniref90]), [uniref90], total=size_of([uniref90]))
        members = attach_by_mapping(build, clusters, table, read_mapping(mapping), mapping, size_of([mapping]))
        return build.store(clusters, kinds, members)


def import_csv(
    settings: BuildSettings,
    folder: Path,
    members: Path | None,
    starts: Path | None,
    counts: Path | None,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Numbers:
    """Import BioNeMo 1's CSV files, one cluster per row; return the numbers of the store's steps and splits.

    ``folder`` is BioNeMo's ``uf50``, with folders ``train``, ``val`` and ``test``. ``members`` is ``uf90/uf90_csvs``;
    without it, each cluster is its own member. ``starts`` and ``counts``, files of uint64, hold the first member of
    each training cluster and the number of its members.
    """
    shards = {name: _csv_files(folder / name) for name in _KIND_OF if (folder / name).is_dir()}
    if "train" not in shards:
        raise DataError(f"{folder}: has no folder 'train' of CSV files")
    if members is not None and (starts is None or counts is None):
        raise UsageError("--members-csv needs --starts and --counts, which assign the members to clusters")
    cluster_files = [path for paths in shards.values() for path in paths]
    member_files = _csv_files(members) if members is not None else []
    inputs = {**shards, "members": member_files, "starts": starts, "counts": counts}
    with Build(settings, "import", inputs, progress, overwrite=overwrite) as build:
        build.check_space([*cluster_files, *member_files])
        sources = {name: _csv_records(paths) for name, paths in shards.items()}
        clusters, kinds = _read_clusters(build, "read clusters", sources, cluster_files)
        assigned = None
        if starts is not None and counts is not None and member_files:
            table = build.read("read members", grouped(_csv_records(member_files)), member_files)
            assigned = _assign_by_position(build, table, int((kinds == TRAIN).sum()), starts, counts)
        return build.store(clusters, kinds, assigned)


def import_parquet(
    settings: BuildSettings,
    train: Path,
    valid: Path | None,
    database: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Numbers:
    """Import BioNeMo 2's clusters and database; return the numbers of the store's steps and splits.

    ``train`` is parquet with ``ur90_id``, the members of each cluster, and perhaps ``ur50_id``, its name. ``valid`` is
    parquet with ``ur50_id``, one sequence per row. ``database`` is SQLite with a table ``protein(id, sequence)``.
    """
    if settings.empty == "representative":
        raise UsageError("--empty representative: these clusters have no representatives; use error or drop")
    inputs = {"train_clusters": train, "valid_clusters": valid, "database": database}
    with Build(settings, "import", inputs, progress, overwrite=overwrite) as build:
        build.check_space([database])
        validation = None
        if valid is not None:
            groups = grouped(_valid_records(build, database, valid))
            validation = build.read("read validation", groups, [database, valid])

        def make(folder: Path) -> Numbers:
            # Training clusters have names and members, but no representatives.
            with TableWriter(folder) as writer, (folder / NOTES).open("wb") as kinds:
                for entries in _parquet_entries(train):
                    lengths = np.zeros(len(entries.clusters), np.int64)
                    writer.write(token_batch([name.encode() for name in entries.clusters], lengths, b""))
                clusters = writer.rows
                for _, batch in validation.batches() if validation is not None else ():
                    writer.write(batch)
                kinds.write(bytes([TRAIN]) * clusters + bytes([VALID]) * (writer.rows - clusters))
            build.check_ids(Table(folder))
            return {"train": clusters, "valid": writer.rows - clusters}

        clusters = Table(build.step("read clusters", make, fingerprints([train])))
        table = build.read("read members", grouped(_database_records(database)), [database])
        members = attach_by_mapping(build, clusters, table, _parquet_entries(train), train)
        return build.store(clusters, np.fromfile(clusters.folder / NOTES, np.uint8), members)


def _read_clusters(
    build: Build, stage: str, sources: Mapping[str, Iterable[Record]], files: Iterable[Path]
) -> tuple[Table, Kinds]:
    """The clusters of all splits, each with its representative, and the kind of each cluster."""
    records = (record._replace(description=name) for name, split in sources.items() for record in split)
    clusters = build.read(stage, grouped(records), files, lambda kept: bytes(_KIND_OF[r.description] for r in kept))
    return clusters, np.fromfile(clusters.folder / NOTES, np.uint8)


def _csv_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.glob("*.csv*") if path.is_file())
    if not paths:
        raise DataError(f"{folder}: no CSV files")
    return paths


def _csv_records(paths: Sequence[Path]) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    for path in paths:
        try:
            with xopen(path, "rt", threads=0, newline="") as stream:
                rows = csv.DictReader(stream)
                missing = {"record_name", "sequence"} - set(rows.fieldnames or ())
                if missing:
                    raise DataError(f"{path}: no column {' and no '.join(sorted(missing))} in its first line")
                for row in rows:
                    place = f"{path}, line {rows.line_num}, record {row['record_name']!r}"
                    if not row["record_name"] or row["sequence"] is None:
                        raise DataError(f"{place}: the row has no name or no sequence; correct the file")
                    yield Record(row["record_name"].split()[0], "", row["sequence"], place)
        except (*DAMAGED, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error


def _assign_by_position(build: Build, table: Table, clusters: int, starts_file: Path, counts_file: Path) -> Members:
    """The stage that assigns to each cluster a range of members."""

    def make(folder: Path) -> Numbers:
        if len(table.left_out):
            raise DataError(
                f"{counted(len(table.left_out), 'member')} skipped, so that starts and counts would point to wrong "
                "members; relax --min-length, --max-length and --unknown"
            )
        try:
            starts, counts = map_file(starts_file, np.uint64), map_file(counts_file, np.uint64)
        except (OSError, ValueError) as error:
            raise DataError(f"{starts_file}, {counts_file}: do not hold 64-bit integers: {error}") from error
        if not len(starts) == len(counts) == clusters:
            raise DataError(
                f"{len(starts):,} starts and {len(counts):,} counts for {clusters:,} training clusters; they must agree"
            )
        total = len(table)
        cluster_of = Members.create(table, folder).cluster_of
        for first in range(0, clusters, ENTRIES):
            begins = starts[first : first + ENTRIES].astype(np.int64)
            sizes = counts[first : first + ENTRIES].astype(np.int64)
            if (begins + sizes > total).any() or (begins < 0).any():
                raise DataError(f"{starts_file}: points beyond the {total:,} members; take all files from one release")
            rows = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
            if (cluster_of[rows] >= 0).any() or len(np.unique(rows)) < len(rows):
                raise DataError(f"{starts_file}: members are in two clusters; take all files from one release")
            cluster_of[rows] = np.repeat(np.arange(first, first + len(sizes)), sizes)
        assigned = int(np.count_nonzero(cluster_of >= 0))
        return {"assigned": assigned, "without_cluster": total - assigned}

    return Members.load(table, build.step("attach members", make, fingerprints([starts_file, counts_file])))


def _parquet_entries(path: Path) -> Iterator[Entries]:
    first = 1
    for batch in _parquet_batches(path, "ur90_id"):
        members = batch.column("ur90_id").to_pylist()
        names = batch.column("ur50_id").to_pylist() if "ur50_id" in batch.schema.names else [None] * len(members)
        for row, ids in enumerate(members, first):
            if not ids or not all(ids):
                raise DataError(f"{path}, row {row}: an empty cluster or id; name its members, or remove the row")
        clusters = [name or ids[0] for name, ids in zip(names, members, strict=True)]
        yield Entries(clusters, [len(ids) for ids in members], [name for ids in members for name in ids])
        first += len(members)


def _parquet_batches(path: Path, needed: str) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in ("ur50_id", "ur90_id") if name in file.schema_arrow.names]
            if needed not in names:
                raise DataError(f"{path}: no column {needed!r}, only {', '.join(file.schema_arrow.names)}")
            yield from file.iter_batches(batch_size=ENTRIES // 4, columns=names)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


def _query(database: Path, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
    """The rows that a query of an SQLite file returns; the file is opened for reading only."""
    if not database.is_file():
        raise DataError(f"{database}: no such file")
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            yield from connection.execute(query, values)
    except sqlite3.Error as error:
        raise DataError(f"{database}: not an SQLite database with a table protein(id, sequence): {error}") from error


def _database_records(database: Path) -> Iterator[Record]:
    for number, (name, sequence) in enumerate(_query(database, "SELECT id, sequence FROM protein"), start=1):
        yield Record(str(name), "", str(sequence or ""), f"{database}, row {number}, record {str(name)!r}")


def _valid_records(build: Build, database: Path, valid: Path) -> Iterator[Record]:
    """The sequences of the ids in a parquet file, in its order."""
    for batch in _parquet_batches(valid, "ur50_id"):
        names = [str(name) for name in batch.column("ur50_id").to_pylist()]
        for start in range(0, len(names), _LOOKED_UP):
            part = names[start : start + _LOOKED_UP]
            query = f"SELECT id, sequence FROM protein WHERE id IN ({','.join('?' * len(part))})"
            sequences = {str(name): str(sequence or "") for name, sequence in _query(database, query, part)}
            for name in part:
                if name in sequences:
                    yield Record(name, "valid", sequences[name], f"{database}, record {name!r}")
                else:
                    build.problems.add("absent", [(name, str(valid))])
    build.check_absent(f"ids in {valid}")
