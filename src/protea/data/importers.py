"""Data that other pipelines made: BioNeMo 1's FASTA with mapping, its CSV shards, and BioNeMo 2's parquet with SQLite.

They come filtered and divided; here they are only checked, encoded and written as a store.
"""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xopen import xopen

from protea.data.assemble import TEST, TRAIN, VALID, Members
from protea.data.build import TABLE, Build, Read
from protea.data.build_settings import BuildSettings
from protea.data.mapping import ENTRIES, Entries, Problems, read_mapping
from protea.data.token_table import TableWriter, TokenRows, keys_of, map_file
from protea.data.uniref import assign
from protea.data.work import Numbers, Watcher, fingerprints
from protea.errors import DataError, UsageError
from protea.fasta import DAMAGED, Record, read_blocks, read_fasta

_SOURCES: Final = {"train": TRAIN, "valid": VALID, "val": VALID, "test": TEST}
_KINDS: Final = "kinds"
_LOOKED_UP: Final = 500


def import_fasta(
    settings: BuildSettings,
    mapping: Path,
    uniref50: Path,
    uniref90: Path,
    valid: Path | None,
    watcher: Watcher,
    *,
    overwrite: bool = False,
) -> Numbers:
    """BioNeMo 1's three files, and its validation FASTA if there is one.

    Args:
        settings: of the build.
        mapping: ``mapping.tsv``.
        uniref50: ``uniref50_train_filt.fasta``.
        uniref90: ``uniref90membersandreps_ur50trainfiltreps.fasta``, or ``ur90_ur50_sampler.fasta``.
        valid: ``uniref50_valid.fasta``.
        watcher: told of progress.
        overwrite: replace a store that is there.
    """
    inputs = {"mapping": mapping, "uniref50": uniref50, "uniref90": uniref90, "uniref50_valid": valid}
    with Build(settings, "import", inputs, watcher, overwrite=overwrite) as build:
        build.check_space([uniref50, uniref90, valid])
        sources: dict[str, Iterable[Record]] = {"train": read_fasta([uniref50])}
        if valid is not None:
            sources["valid"] = read_fasta([valid])
        clusters = build.read("read representatives", _marked(sources), [uniref50, valid], _note_kinds)
        kinds = map_file(clusters.folder / _KINDS, np.uint8)
        members = build.read("read members", read_blocks([uniref90]), [uniref90])
        return build.store(clusters.table, kinds, assign(build, clusters, members, read_mapping(mapping), mapping))


def import_csv(
    settings: BuildSettings,
    folder: Path,
    members: Path | None,
    starts: Path | None,
    counts: Path | None,
    watcher: Watcher,
    *,
    overwrite: bool = False,
) -> Numbers:
    """BioNeMo 1's shards: ``train``, ``val`` and ``test`` folders of CSV, one cluster a row.

    Args:
        settings: of the build.
        folder: with the folders; ``uf50`` as BioNeMo names it.
        members: a folder of CSV, ``uf90/uf90_csvs``; without it each cluster is its own member.
        starts: ``starts.mmap``: the first member of each training cluster, uint64.
        counts: ``counts.mmap``: how many there are.
        watcher: told of progress.
        overwrite: replace a store that is there.
    """
    shards = {name: _shards(folder / name) for name in _SOURCES if (folder / name).is_dir()}
    if "train" not in shards:
        raise DataError(f"{folder}: has no folder 'train' of CSV files")
    more = _shards(members) if members is not None else []
    inputs = {**shards, "members": more, "starts": starts, "counts": counts}
    with Build(settings, "import", inputs, watcher, overwrite=overwrite) as build:
        build.check_space([path for paths in (*shards.values(), more) for path in paths])
        sources = {name: _rows(paths) for name, paths in shards.items()}
        files = [path for paths in shards.values() for path in paths]
        clusters = build.read("read clusters", _marked(sources), files, _note_kinds)
        kinds = map_file(clusters.folder / _KINDS, np.uint8)
        if members is None:
            return build.store(clusters.table, kinds, None)
        if starts is None or counts is None:
            raise DataError(f"{members}: members need --starts and --counts, which say whose they are")
        read = build.read("read members", _rows(more), more)
        found = _by_position(build, read, int((np.asarray(kinds) == TRAIN).sum()), starts, counts)
        return build.store(clusters.table, kinds, found)


def import_parquet(
    settings: BuildSettings,
    train: Path,
    valid: Path | None,
    database: Path,
    watcher: Watcher,
    *,
    overwrite: bool = False,
) -> Numbers:
    """BioNeMo 2's lists of clusters with their database.

    Args:
        settings: of the build.
        train: parquet with ``ur90_id``, a list a cluster, and perhaps ``ur50_id``, its name.
        valid: parquet with ``ur50_id``, a sequence each.
        database: SQLite with a table ``protein(id, sequence)``.
        watcher: told of progress.
        overwrite: replace a store that is there.
    """
    if settings.empty == "representative":
        raise UsageError("--empty representative: these clusters have no representatives; use error or drop")
    inputs = {"train_clusters": train, "valid_clusters": valid, "database": database}
    with Build(settings, "import", inputs, watcher, overwrite=overwrite) as build:
        build.check_space([database])
        validation = None
        if valid is not None:
            validation = build.read("read validation", _looked_up(build, database, valid), [database, valid])

        def make(folder: Path) -> Numbers:
            # The training clusters have names and members, but no representative.
            build.watcher.begin("read clusters")
            with TableWriter(folder / TABLE) as writer, (folder / _KINDS).open("wb") as kinds:
                for entries in _lists(train):
                    names = [name.encode() for name in entries.clusters]
                    empty = np.zeros(len(names), np.int64)
                    writer.write(TokenRows.of(names, empty, b""), keys_of(names))
                    np.full(len(empty), TRAIN, np.uint8).tofile(kinds)
                total = writer.rows
                for batch in () if validation is None else validation.table.batches():
                    writer.write(batch, keys_of(name.encode() for name in batch.ids.to_pylist()))
                    np.full(len(batch), VALID, np.uint8).tofile(kinds)
            return {"train": total, "valid": 0 if validation is None else len(validation.table)}

        folder = build.step("read clusters", make, fingerprints([train]))
        clusters = build.index("read clusters", folder)
        members = build.read("read members", _proteins(database), [database])
        found = assign(build, clusters, members, _lists(train), train)
        return build.store(clusters.table, map_file(folder / _KINDS, np.uint8), found)


def _marked(sources: Mapping[str, Iterable[Record]]) -> Iterator[Record]:
    """Records with the split they are of for a description."""
    for name, records in sources.items():
        for record in records:
            yield record._replace(description=name)


def _note_kinds(folder: Path) -> Callable[[list[Record]], None]:
    path = folder / _KINDS
    path.write_bytes(b"")

    def note(records: list[Record]) -> None:
        with path.open("ab") as stream:
            stream.write(bytes(_SOURCES[record.description] for record in records))

    return note


def _shards(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*.csv*") if path.is_file())
    if not found:
        raise DataError(f"{folder}: no CSV files")
    return found


def _rows(paths: Sequence[Path]) -> Iterator[Record]:
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
                        raise DataError(f"{place}: a row without a name or a sequence; mend the file")
                    yield Record(row["record_name"].split()[0], "", row["sequence"], place)
        except (*DAMAGED, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error


def _by_position(build: Build, read: Read, clusters: int, starts_file: Path, counts_file: Path) -> Members:
    """Members whose cluster is known by where they stand."""

    def make(folder: Path) -> Numbers:
        build.watcher.begin("attach members")
        if len(read.table.keys(".left")):
            raise DataError("members were left out, and starts and counts would point to others; see the policies")
        try:
            starts, counts = map_file(starts_file, np.uint64), map_file(counts_file, np.uint64)
        except (OSError, ValueError) as error:
            raise DataError(f"{starts_file}, {counts_file}: not whole numbers of 64 bits: {error}") from error
        if not len(starts) == len(counts) == clusters:
            raise DataError(
                f"{len(starts):,} starts and {len(counts):,} counts for {clusters:,} training clusters; they must agree"
            )
        total = len(read.table)
        cluster_of = map_file(folder / "cluster_of", np.int64, write=total)
        place_of = map_file(folder / "place_of", np.int64, write=total)
        for first in range(0, total, ENTRIES):
            part = slice(first, min(first + ENTRIES, total))
            cluster_of[part] = -1
            place_of[part] = np.arange(part.start, part.stop)
        assigned = 0
        for first in range(0, clusters, ENTRIES):
            begin = starts[first : first + ENTRIES].astype(np.int64)
            size = counts[first : first + ENTRIES].astype(np.int64)
            if (begin + size > total).any() or (begin < 0).any():
                raise DataError(f"{starts_file}: points beyond the {total:,} members; take all files from one release")
            rows = np.repeat(begin - (np.cumsum(size) - size), size) + np.arange(size.sum())
            if (cluster_of[rows] >= 0).any() or len(np.unique(rows)) < len(rows):
                raise DataError(f"{starts_file}: members are in two clusters; take all files from one release")
            cluster_of[rows] = np.repeat(np.arange(first, first + len(size)), size)
            assigned += len(rows)
        return {"assigned": assigned, "without_cluster": total - assigned}

    return Members.found(read.table, build.step("attach members", make, fingerprints([starts_file, counts_file])))


def _lists(path: Path) -> Iterator[Entries]:
    row = 0
    for columns in _columns(path, "ur90_id"):
        lists = columns.column("ur90_id").to_pylist()
        names = columns.column("ur50_id").to_pylist() if "ur50_id" in columns.schema.names else [None] * len(lists)
        for number, members in enumerate(lists):
            if not members or not all(members):
                raise DataError(
                    f"{path}, row {row + number + 1}: an empty cluster; name its members, or remove the row"
                )
        clusters = [name or members[0] for name, members in zip(names, lists, strict=True)]
        counts = [len(members) for members in lists]
        yield Entries(clusters, counts, [name for members in lists for name in members], f"{path}, rows from {row + 1}")
        row += len(lists)


def _columns(path: Path, needed: str) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in ("ur50_id", "ur90_id") if name in file.schema_arrow.names]
            if needed not in names:
                raise DataError(f"{path}: no column {needed!r}, only {', '.join(file.schema_arrow.names)}")
            yield from file.iter_batches(batch_size=ENTRIES // 4, columns=names)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


@dataclass
class _Database:
    """An SQLite file that is only read."""

    path: Path

    def ask(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        try:
            connection = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)
            try:
                yield from connection.execute(query, values)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: no SQLite database with a table protein(id, sequence): {error}") from error


def _proteins(database: Path) -> Iterator[Record]:
    for number, (name, sequence) in enumerate(_Database(database).ask("SELECT id, sequence FROM protein"), start=1):
        yield Record(str(name), "", str(sequence or ""), f"{database}, row {number}, record {str(name)!r}")


def _looked_up(build: Build, database: Path, valid: Path) -> Iterator[Record]:
    """The sequences that a list of ids names, in its order."""
    problems = Problems(build.problems)
    for columns in _columns(valid, "ur50_id"):
        names = [str(name) for name in columns.column("ur50_id").to_pylist()]
        for start in range(0, len(names), _LOOKED_UP):
            part = names[start : start + _LOOKED_UP]
            marks = ",".join("?" * len(part))
            query = f"SELECT id, sequence FROM protein WHERE id IN ({marks})"
            found = {str(name): str(sequence or "") for name, sequence in _Database(database).ask(query, part)}
            for name in part:
                if name in found:
                    yield Record(name, "valid", found[name], f"{database}, record {name!r}")
                else:
                    problems.add("absent", name, str(valid))
    missing = problems.counts.get("absent", 0)
    if missing and build.settings.absent == "error":
        raise DataError(
            f"{valid}: names {missing:,} sequences that are absent from {database}, the first "
            f"{problems.first['absent']!r}; all are listed in {problems.path}: add them, or pass --absent skip"
        )
