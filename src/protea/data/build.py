"""The stages of a build, from records to a store. A build that is killed continues after its last finished stage.

The work folder's journal holds the numbers of every finished stage and a key: a hash of its settings, the size and
time of its inputs, and the key of the stage before. A stage whose key changed is done again, and so are all after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.data.build_settings import BuildSettings, sample_size
from protea.data.draws import SPLIT, Permutation, key
from protea.data.encoding import REPORT, Reader
from protea.data.manifest import LOG, alphabet_named, is_store, read_manifest, write_manifest
from protea.data.mmseqs import MMseqs, best_hits, write_fasta
from protea.data.token_table import ENTRIES, Table, map_file, new_file, take
from protea.data.writer import REMOVED, TEST, TRAIN, VALID, Kinds, Members, sequences_to_write, write_splits
from protea.errors import DataError, ResumeError
from protea.fasta import Block, Record, flows
from protea.journal import WorkFolder
from protea.output import REPORT_HEADER, WRITTEN, check_output, check_space, fingerprint, sync_folder
from protea.progress import Progress
from protea.rerun import INPUT, end_finished

Numbers = dict[str, Any]
"""The results of a stage, as JSON can hold them."""

_FORMAT: Final = 2
_STORE: Final = "store"
"""The last stage. Its folder becomes the output."""
_REMOVED_LIST: Final = "removed.tsv"
_REMOVED_COLUMNS: Final = "cluster\tlike\tidentity\tcluster_coverage\tlike_coverage\n"
_KINDS: Final = "kinds"
_SEARCH_PARTS: Final = 128
"""Batches of 4 MB in one search. A kill costs at most one search."""
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")
_COMPRESSION: Final = 2.5
"""Upper bound of residues in a byte of a compressed file; measured: 1.8 for zstd, 2.0 for gzip."""


class Problems:
    """A file of problems beside the output. Messages have the number of a kind of problems and the first one.

    The file of an earlier build stays until this one has problems too, or is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, rows: Sequence[Sequence[str]]) -> None:
        """Write problems of one kind, each with its id and further details."""
        if rows:
            mode = "a" if self._counts else "w"
            with self.path.open(mode, encoding="utf-8", errors="surrogateescape") as stream:
                stream.writelines("\t".join((*row, kind)) + "\n" for row in rows)
            self._first.setdefault(kind, rows[0][0])
            self._counts[kind] += len(rows)

    def check(self, kind: str, what: str, fix: str) -> None:
        """Raise a ``DataError`` if there are problems of a kind."""
        if count := self._counts[kind]:
            raise DataError(f"{what}: {count:,}, the first is {self._first[kind]!r}; {self.path} lists all; {fix}")


class Build:
    """One build, in a locked work folder. The manifest names ``command`` and ``inputs``, the files by option."""

    def __init__(
        self, settings: BuildSettings, command: str, inputs: Mapping[str, Any], progress: Progress, *, overwrite: bool
    ) -> None:
        settings.check()
        self.settings, self.progress = settings, progress
        self.alphabet = alphabet_named(settings.alphabet)
        self._plan = settings.plan(command, inputs)
        given = [path for value in inputs.values() for path in (value if isinstance(value, list) else [value])]
        self._inputs = [path for path in given if isinstance(path, str | Path)]
        self._begun = fingerprints(self._inputs)
        exists = os.path.lexists(settings.output)
        check_output(settings.output, overwrite=overwrite or exists, ours=is_store)
        if exists and not overwrite:
            made = read_manifest(settings.output)
            recorded = made["command"] | {WRITTEN: made["files"]}
            end_finished(settings.output, recorded, self._plan | {INPUT: fingerprint(self._inputs)}, files=inputs)
        self._work = WorkFolder(settings.output)
        self._folder = self._work.path
        self.problems = Problems(settings.output.with_name(f"{settings.output.name}.problems.tsv"))
        self._steps: list[Numbers] = []
        self._reports: list[Path] = []
        self._mmseqs: MMseqs | None = None
        self._key = ""
        self._done: dict[str, Numbers] = {}
        with suppress(ResumeError):  # without a readable journal, all stages are done again
            stages = (self._work.read() or {}).get("done", {})
            self._done = {name: entry for name, entry in stages.items() if (self._folder / name).is_dir()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock; remove a folder without finished stages."""
        if not self._done:
            self._work.remove()
        self._work.__exit__(*exception)

    def stage(
        self,
        name: str,
        make: Callable[[Path], Numbers],
        given: Any = None,
        title: str | None = None,
        total: int | None = None,
    ) -> Numbers:
        """Do a stage in the folder with its name, unless it is finished; return its numbers.

        ``given`` is what it depends on besides the stages before it, as JSON can hold it; the progress bar shows
        ``title``, by default the name, and how much of ``total`` is done.
        """
        entry = json.dumps([_FORMAT, self._key, name, given], sort_keys=True)
        self._key = hashlib.sha256(entry.encode()).hexdigest()
        known = self._done.get(name)
        if known is not None and known["key"] == self._key:
            self.progress.note(f"{name}: done before")
            return dict(known["numbers"])
        folder = self._folder / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self.progress.begin(title or name, total)
        numbers = make(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(folder)
        self._done[name] = {"key": self._key, "numbers": numbers}
        self._work.commit({"done": self._done})
        return numbers

    def step(self, name: str, make: Callable[[Path], Numbers], given: Any = None, total: int | None = None) -> Path:
        """Do a stage whose numbers the manifest reports; return its folder."""
        self._steps.append({"step": name, **self.stage(name, make, given, total=total)})
        return self._folder / name

    def check_space(self, sources: Iterable[str | Path], times: float = 2) -> None:
        """Refuse a build that does not fit on the disk; a byte of input takes at most ``times`` bytes (measured)."""
        if not self._done:
            paths = [Path(source) for source in sources if os.path.isfile(source)]
            sizes = [path.stat().st_size * (_COMPRESSION if path.suffix in _COMPRESSED else 1) for path in paths]
            needed = {self.settings.output: int(sum(sizes) * times)}
            check_space(needed, "free some space, or name a folder on another disk")

    def mmseqs(self) -> MMseqs:
        """The MMseqs2 program. Builds that need it look for it before they read anything."""
        if self._mmseqs is None:
            self._mmseqs = MMseqs(self.settings.mmseqs, self.settings.threads, self._folder / LOG, self.progress)
        return self._mmseqs

    def read(
        self,
        name: str,
        groups: Iterable[list[Record] | Block],
        sources: Iterable[str | Path],
        note: Callable[[list[Record]], bytes] | None = None,
        given: Any = None,
        total: int | None = None,
    ) -> Table:
        """Read the records of some files into a table; see ``Reader.table``, and ``stage`` for what is ``given``.

        ``total`` is the size of the files, if blocks are read.
        """
        settings = self.settings

        def make(folder: Path) -> Numbers:
            counts = Reader(self.alphabet, settings, self.progress).table(groups, folder, note)
            self.check_ids(Table(folder))
            return asdict(counts)

        rules = [settings.unknown, settings.gaps, settings.min_length, settings.max_length, settings.leave_out]
        rest = [self.alphabet.name, rules, fingerprints(sources), note is not None, given]
        folder = self.step(name, make, rest, total)
        self._reports.append(folder / REPORT)
        return Table(folder)

    def check_ids(self, table: Table) -> None:
        """Refuse a table with repeated ids."""
        repeated = table.repeated()
        if len(repeated):
            self.problems.add("duplicate", [[name] for name in table.names(repeated[:, 1])])
            first, second = repeated[0].tolist()
            what = f"repeated ids (sequences {first + 1:,} and {second + 1:,} of those taken have the same)"
            self.problems.check("duplicate", what, "give each sequence its own id")

    def check_absent(self, ids: str) -> None:
        """Refuse ids without a sequence, unless the settings skip them."""
        if self.settings.absent == "error":
            self.problems.check("absent", f"{ids} without a sequence", "add them, or pass --absent skip")

    def draw(self, representatives: Table) -> Kinds:
        """Draw the validation and test clusters: the first ones of a seeded order."""
        total = len(representatives)
        valid = sample_size("valid", self.settings.valid, total)
        test = sample_size("test", self.settings.test, total)

        def make(folder: Path) -> Numbers:
            if valid + test >= total:
                raise DataError(
                    f"{valid:,} validation and {test:,} test clusters of {total:,} leave none for training; "
                    "take fewer with --valid and --test"
                )
            kinds = np.full(total, TRAIN, np.uint8)
            order = Permutation(total, key(self.settings.seed, 0, SPLIT))
            for start in range(0, valid + test, ENTRIES):
                places = np.arange(start, min(start + ENTRIES, valid + test))
                kinds[order[places]] = np.where(places < valid, VALID, TEST)
            kinds.tofile(folder / _KINDS)
            return {"clusters": total, "valid": valid, "test": test, "train": total - valid - test}

        return np.fromfile(self.step("draw", make, [valid, test, self.settings.seed]) / _KINDS, np.uint8)

    def filter(self, representatives: Table, kinds: Kinds) -> Kinds:
        """Remove training clusters whose representative is similar to that of a validation cluster."""
        if not self.settings.filtered or not (kinds == VALID).any():
            return kinds
        starts = range(0, representatives.parts, _SEARCH_PARTS)
        searches = [self._search(representatives, kinds, start) for start in starts]

        def make(folder: Path) -> Numbers:
            after = kinds.copy()
            hits = np.concatenate([hits for _, hits in searches])
            removed, similar = hits[:, :2].astype(np.int64).T
            after[removed] = REMOVED
            names = zip(representatives.names(removed), representatives.names(similar), strict=True)
            with (folder / _REMOVED_LIST).open("w", encoding="utf-8") as stream:
                stream.write(_REMOVED_COLUMNS)
                for pair, figures in zip(names, hits[:, 2:].tolist(), strict=True):
                    stream.write("\t".join([*pair, *(f"{figure:.3f}" for figure in figures)]) + "\n")
            after.tofile(folder / _KINDS)
            return {
                "searches": len(searches),
                "mmseqs": searches[-1][0]["mmseqs"],
                "commands": next((run["commands"] for run, _ in reversed(searches) if run["commands"]), []),
                "removed": len(hits),
                "kept": int((after == TRAIN).sum()),
            }

        return np.fromfile(self.step("filter", make) / _KINDS, np.uint8)

    def _search(self, representatives: Table, kinds: Kinds, start: int) -> tuple[Numbers, NDArray[np.float64]]:
        """Compare some training clusters with all validation clusters: the numbers of the stage and the best hits."""
        flags, reverse = self.settings.flags, self.settings.search_from == "valid"
        name = f"search {start // _SEARCH_PARTS + 1}"

        def make(folder: Path) -> Numbers:
            program = self.mmseqs()
            before = len(program.commands)
            train, valid = folder / "train.fasta", folder / "valid.fasta"
            hits = np.zeros((0, 5))
            stop = min(start + _SEARCH_PARTS, representatives.parts)
            if write_fasta(train, _of_kind(representatives, kinds, TRAIN, start, stop), self.alphabet):
                write_fasta(valid, _of_kind(representatives, kinds, VALID, 0, representatives.parts), self.alphabet)
                queries, targets = (valid, train) if reverse else (train, valid)
                hits = best_hits(program.search(queries, targets, folder / "mmseqs", flags), reverse=reverse)
                shutil.rmtree(folder / "mmseqs")
                valid.unlink()
            train.unlink()
            np.save(folder / "hits.npy", hits)
            return {"mmseqs": program.version, "commands": program.commands[before:]}

        title = f"{name} of {-(-representatives.parts // _SEARCH_PARTS)}"
        numbers = self.stage(name, make, [flags, reverse], title)
        return numbers, np.load(self._folder / name / "hits.npy")

    def store(self, representatives: Table, kinds: Kinds, members: Members | None) -> Numbers:
        """Write the store and give it its name; return the numbers of its steps and splits."""
        output, policy = self.settings.output, self.settings.empty
        counts = None if members is None else self._count(representatives, kinds, members)

        def make(folder: Path) -> Numbers:
            splits = write_splits(folder, self.alphabet, representatives, kinds, members, counts, policy, self.progress)
            with (folder / REPORT).open("wb") as report:
                report.write("\t".join(REPORT_HEADER).encode() + b"\n")
                for path in self._reports:
                    with path.open("rb") as stream:
                        shutil.copyfileobj(stream, report)
            if any(step["step"] == "filter" for step in self._steps):
                shutil.copyfile(self._folder / "filter" / _REMOVED_LIST, folder / _REMOVED_LIST)
            same = fingerprints(self._inputs) == self._begun  # else nobody knows which content was read
            command = self._plan | {INPUT: fingerprint(self._inputs) if same else None}
            write_manifest(folder, self.alphabet, command, self._steps, splits)
            if (log := self._folder / LOG).exists():
                shutil.copyfile(log, folder / LOG)
            return splits

        total = sequences_to_write(kinds, counts, policy)
        splits = self.stage(_STORE, make, self._plan, "write", total)
        if output.exists():
            replaced = self._folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        (self._folder / _STORE).rename(output)
        sync_folder(output.parent)
        self._done.clear()
        self.problems.path.unlink(missing_ok=True)
        return {"steps": self._steps, "splits": splits}

    def _count(self, representatives: Table, kinds: Kinds, members: Members) -> Any:
        """Count the members of each cluster. Refuse training clusters without members if the settings say so."""
        policy = self.settings.empty

        def make(folder: Path) -> Numbers:
            counts = new_file(folder / "counts", np.uint32, len(representatives))
            for start in range(0, len(members.cluster_of), ENTRIES):
                clusters = members.cluster_of[start : start + ENTRIES]
                np.add.at(counts, clusters[clusters >= 0], 1)
            empty = np.flatnonzero((kinds == TRAIN) & (counts == 0))
            if policy == "error":
                self.problems.add("empty", [[name] for name in representatives.names(empty)])
                fix = "add members, or pass --empty representative or --empty drop"
                self.problems.check("empty", "training clusters without members", fix)
            return {"empty": len(empty), "policy": policy}

        return map_file(self.step("members of clusters", make, policy) / "counts", np.uint32)


def fingerprints(sources: Iterable[str | Path]) -> list[Any]:
    """Name, size and time of each input, by which a continued build recognises it."""
    prints: list[Any] = []
    for source in sources:
        if flows(str(source)) or not os.path.isfile(source):
            prints.append(uuid4().hex)  # a pipe can be read once; a missing file fails when it is read
        else:
            path = Path(source)
            prints.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    return prints


def _of_kind(
    table: Table, kinds: Kinds, kind: int, start: int, stop: int
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """The sequences of one kind from some batches, with their row numbers."""
    for first, batch in table.batches(start, stop):
        rows = np.flatnonzero(kinds[first : first + len(batch)] == kind)
        yield take(batch, rows), rows + first
