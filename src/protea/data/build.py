"""The stages that builds have in common, from records to a store; ``uniref.py`` and the others string them together."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from protea.data.assemble import REMOVED, TEST, TRAIN, VALID, Empty, Members, assemble, check_empty, count_members
from protea.data.draws import SPLIT, Permutation, key
from protea.data.manifest import LOG, alphabet_named, write_manifest
from protea.data.mapping import ENTRIES, Absent
from protea.data.mmseqs import REVERSE_FLAGS, SEARCH_FLAGS, MMseqs, read_pairs, split_flags, write_fasta
from protea.data.records import Policies, Reader, Unknown
from protea.data.table import IdIndex, Table, map_file
from protea.data.work import STORE, Numbers, Watcher, Work, check_space, fingerprints
from protea.errors import DataError, UsageError
from protea.fasta import Record

REPORT: Final = "report.tsv"
TABLE: Final = "table"

_SEARCH_PARTS: Final = 128
"""Batches of 4 MB searched at a time; what a kill can cost."""
_KINDS: Final = "kinds"
_DISK: Final = 3.5
"""Bytes of work and store for each byte of sequences, at the most, from measurements."""

_LISTED: Final = 1000

Watch = Callable[[list[Record]], None]


class Read(NamedTuple):
    """Sequences that were read.

    Attributes:
        folder: of the stage that read them.
        table: of those taken.
        ids: the index of their ids.
    """

    folder: Path
    table: Table
    ids: IdIndex


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all builds can be told.

    Attributes:
        output: the store's folder; must be new.
        alphabet: ``esm`` or ``esm-1nv``.
        valid: clusters for validation, a number or a percentage.
        test: clusters for testing, likewise.
        seed: of the sample.
        filtered: training clusters similar to a validation cluster are removed.
        search_from: ``train`` looks each training cluster up among the validation ones, as public pipelines do;
            ``valid`` the other way round, which is as many times faster as there are more of the former.
        filter_flags: of ``mmseqs search``; those of the direction by default.
        unknown: what becomes of residues outside the alphabet.
        min_length: residues a sequence must have.
        max_length: residues a sequence may have.
        leave_out: a regular expression of headers.
        absent: what becomes of members that are named and not there.
        empty: what becomes of training clusters without members.
        mmseqs: the program.
        threads: of the program.
    """

    output: Path
    alphabet: str = "esm"
    valid: str = "0.5%"
    test: str = "0"
    seed: int = 0
    filtered: bool = True
    search_from: str = "train"
    filter_flags: str | None = None
    unknown: Unknown = "x"
    min_length: int = 1
    max_length: int | None = None
    leave_out: str | None = None
    absent: Absent = "error"
    empty: Empty = "error"
    mmseqs: str = "mmseqs"
    threads: int | None = None

    def check(self) -> None:
        """See that every value can be meant.

        Raises:
            UsageError: one cannot.
        """
        alphabet_named(self.alphabet)
        split_flags(self.filter_flags or "")
        for name, value, known in (
            ("unknown", self.unknown, ("x", "error", "skip")),
            ("search-from", self.search_from, ("train", "valid")),
            ("absent", self.absent, ("error", "skip")),
            ("empty", self.empty, ("error", "representative", "drop")),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value}: use {', '.join(known)}")
        sample_size("valid", self.valid, 0)
        sample_size("test", self.test, 0)
        if self.min_length < 1 or (self.max_length is not None and self.max_length < self.min_length):
            raise UsageError(f"lengths from {self.min_length} to {self.max_length}: nothing would be taken")
        try:
            re.compile(self.leave_out or "")
        except re.error as error:
            raise UsageError(f"--leave-out {self.leave_out!r} is no regular expression: {error}") from error

    @property
    def flags(self) -> str:
        """Of ``mmseqs search``."""
        return self.filter_flags or (SEARCH_FLAGS if self.search_from == "train" else REVERSE_FLAGS)

    def plan(self, command: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the outcome depends on, and what the manifest says was run."""
        values = asdict(self)
        for name in ("output", "mmseqs", "threads"):
            del values[name]
        named = {name: _names(value) for name, value in inputs.items()}
        return {"command": command, **named, **values}


def sample_size(name: str, text: str, total: int) -> int:
    """How many of ``total`` clusters ``5000`` or ``0.5%`` are.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UsageError(f"--{name} {text}: give a number of clusters, or a percentage as in 0.5%")
    return int(match[1]) if match[1] else int(total * float(match[2]) / 100)


class Build:
    """One build under way.

    Args:
        settings: of it.
        command: its name, for the manifest.
        inputs: files by option, for the plan.
        watcher: told of progress.
        overwrite: replace what is there.
    """

    def __init__(
        self, settings: Settings, command: str, inputs: Mapping[str, Any], watcher: Watcher, *, overwrite: bool
    ) -> None:
        settings.check()
        self.settings, self.watcher = settings, watcher
        self.alphabet = alphabet_named(settings.alphabet)
        self._plan = settings.plan(command, inputs)
        prints = {name: fingerprints(_files(value)) for name, value in inputs.items()}
        self.work = Work(settings.output, {**self._plan, "inputs": prints}, watcher, overwrite=overwrite)
        self.problems = settings.output.with_name(f"{settings.output.name}.problems.tsv")
        self._steps: list[Numbers] = []
        self._reports: list[Path] = []
        self._mmseqs: MMseqs | None = None

    def __enter__(self) -> Build:
        self.work.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.work.__exit__()

    def step(self, name: str, make: Callable[[Path], Numbers]) -> Path:
        """A stage that the manifest reports; its folder."""
        self._steps.append({"step": name, **self.work.stage(name, make)})
        return self.work.folder / name

    def check_space(self, residues: int) -> None:
        """Refuse to begin what the disk cannot hold."""
        if not self.work.begun:
            check_space(self.settings.output, int(residues * _DISK))

    def mmseqs(self) -> MMseqs:
        """The program, looked for once, before anything is read."""
        if self._mmseqs is None:
            log = self.work.folder / LOG
            self._mmseqs = MMseqs(self.settings.mmseqs, self.settings.threads, log, self.watcher)
        return self._mmseqs

    def read(self, name: str, records: Iterable[Record], watch: Callable[[Path], Watch] | None = None) -> Read:
        """Read records into a table and index their ids; ``watch`` is given the folder, and then all that is taken.

        Raises:
            DataError: an id comes twice, or nothing was taken.
        """
        settings = self.settings
        policies = Policies(
            unknown=settings.unknown,
            min_length=settings.min_length,
            max_length=settings.max_length,
            leave_out=settings.leave_out,
        )

        def make(folder: Path) -> Numbers:
            self.watcher.begin(name)
            reader = Reader(self.alphabet, policies, folder / REPORT, self.watcher.advance)
            return asdict(reader.table(records, folder / TABLE, watch and watch(folder)))

        folder = self.step(name, make)
        self._reports.append(folder / REPORT)
        return self.index(name, folder)

    def index(self, name: str, folder: Path) -> Read:
        """Index the ids of a table.

        Raises:
            DataError: an id comes twice.
        """
        table = Table(folder / TABLE)

        def make(target: Path) -> Numbers:
            self.watcher.begin(f"index {name}")
            again = IdIndex.build(table.keys(), target).repeated()
            if len(again):
                names = table.names(again[:_LISTED, 1])
                self.problems.write_text("".join(f"{each}\tduplicate\n" for each in names), encoding="utf-8")
                raise DataError(
                    f"{len(again):,} ids come twice, the first {names[0]!r} (sequences {again[0, 0] + 1:,} and "
                    f"{again[0, 1] + 1:,} of those taken); up to {_LISTED:,} are listed in {self.problems}: give each "
                    "sequence an id of its own"
                )
            return {}

        self.work.stage(f"index {name}", make)
        return Read(folder, table, IdIndex(self.work.folder / f"index {name}"))

    def draw(self, representatives: Table) -> Any:
        """Draw the validation and test clusters: the first ones of a seeded order.

        Raises:
            DataError: there are not so many.
        """
        total = len(representatives)
        valid = sample_size("valid", self.settings.valid, total)
        test = sample_size("test", self.settings.test, total)

        def make(folder: Path) -> Numbers:
            self.watcher.begin("draw")
            if valid + test >= total:
                raise DataError(
                    f"{valid:,} validation and {test:,} test clusters of {total:,} leave none for training; "
                    "take fewer with --valid and --test"
                )
            kinds = map_file(folder / _KINDS, np.uint8, write=total)
            order = Permutation(total, key(self.settings.seed, 0, SPLIT))
            for start in range(0, valid + test, ENTRIES):
                places = np.arange(start, min(start + ENTRIES, valid + test))
                kinds[order[places]] = np.where(places < valid, VALID, TEST)
            _flush(kinds)
            return {"clusters": total, "valid": valid, "test": test, "train": total - valid - test}

        return map_file(self.step("draw", make) / _KINDS, np.uint8)

    def filter(self, representatives: Table, kinds: Any) -> Any:
        """Remove training clusters whose representative matches a validation one."""
        if not self.settings.filtered or not any((part == VALID).any() for part in _parts(kinds)):
            return kinds
        flags, reverse = self.settings.flags, self.settings.search_from == "valid"
        parts = range(0, representatives.parts, _SEARCH_PARTS)
        hits = []
        commands: list[str] = []
        version = ""
        for number, start in enumerate(parts, start=1):
            name = f"search-{number}"

            def search(folder: Path, start: int = start, number: int = number) -> Numbers:
                self.watcher.begin(f"search {number} of {len(parts)}")
                program = self.mmseqs()
                before = len(program.commands)
                stop = min(start + _SEARCH_PARTS, representatives.parts)
                self._fasta(folder / "train.fasta", representatives, kinds, TRAIN, start, stop)
                self._fasta(folder / "valid.fasta", representatives, kinds, VALID, 0, representatives.parts)
                sides = [folder / "train.fasta", folder / "valid.fasta"]
                queries, targets = sides[::-1] if reverse else sides
                result = program.search(queries, targets, folder / "work", flags)
                found = [np.unique(pairs[:, int(reverse)]) for pairs in read_pairs(result)]
                np.save(folder / "hits.npy", np.unique(np.concatenate([np.zeros(0, np.int64), *found])))
                for path in sides:
                    path.unlink()
                shutil.rmtree(folder / "work")
                return {"mmseqs": program.version, "commands": program.commands[before:]}

            numbers = self.work.stage(name, search)
            commands, version = numbers["commands"], numbers["mmseqs"]
            hits.append(self.work.folder / name / "hits.npy")

        def make(folder: Path) -> Numbers:
            after = map_file(folder / _KINDS, np.uint8, write=len(kinds))
            for start in range(0, len(kinds), ENTRIES):
                after[start : start + ENTRIES] = kinds[start : start + ENTRIES]
            removed = 0
            for path in hits:
                rows = np.load(path)
                after[rows] = REMOVED
                removed += len(rows)
            _flush(after)
            train = sum(int((part == TRAIN).sum()) for part in _parts(after))
            return {"searches": len(hits), "mmseqs": version, "commands": commands, "removed": removed, "kept": train}

        return map_file(self.step("filter", make) / _KINDS, np.uint8)

    def store(self, representatives: Table, kinds: Any, members: Members | None) -> Numbers:
        """Write the store and give it its name; its splits' numbers."""
        settings = self.settings

        def count(folder: Path) -> Numbers:
            assert members is not None
            counts = count_members(members, len(representatives), folder / "counts")
            empty = check_empty(counts, kinds, representatives, settings.empty, self.problems)
            _flush(counts)
            return {"empty": empty, "policy": settings.empty}

        counts = None
        if members is not None:
            counts = map_file(self.step("members of clusters", count) / "counts", np.uint32)

        def make(folder: Path) -> Numbers:
            self.watcher.begin("write")
            scratch = self.work.folder / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            splits = assemble(
                folder,
                scratch,
                self.alphabet,
                representatives,
                kinds,
                members,
                counts,
                settings.empty,
                self.watcher.advance,
            )
            shutil.rmtree(scratch)
            with (folder / REPORT).open("wb") as report:
                report.write(b"id\twhat\tdetail\n")
                for path in self._reports:
                    with path.open("rb") as stream:
                        shutil.copyfileobj(stream, report)
            write_manifest(folder, self.alphabet, self._plan, self._steps, splits)
            log = self.work.folder / LOG
            if log.exists():
                shutil.copyfile(log, folder / LOG)
            return splits

        numbers = self.work.stage(STORE, make)
        self.work.finish()
        self.problems.unlink(missing_ok=True)
        return {"steps": self._steps, "splits": numbers}

    def _fasta(self, path: Path, table: Table, kinds: Any, kind: int, start: int, stop: int) -> None:
        chosen = []

        def batches() -> Iterable[Any]:
            for batch in table.batches(start, stop):
                rows = np.flatnonzero(kinds[batch.first : batch.first + len(batch)] == kind)
                chosen.append(rows + batch.first)
                yield batch.take(rows)

        write_fasta(path, ((batch, chosen.pop()) for batch in batches()), self.alphabet)


def _names(value: Any) -> Any:
    """Files by their names alone, so that a store does not tell where it was made."""
    if isinstance(value, list | tuple):
        return [_names(each) for each in value]
    return Path(value).name if isinstance(value, str | Path) else value


def _files(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _parts(array: Any) -> Iterable[Any]:
    return (array[start : start + ENTRIES] for start in range(0, len(array), ENTRIES))


def _flush(array: Any) -> None:
    if isinstance(array, np.memmap):
        array.flush()
