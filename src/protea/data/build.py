"""The stages that builds have in common, from records to a store; ``uniref.py`` and the others string them together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from protea.data.assemble import REMOVED, TEST, TRAIN, VALID, Members, assemble, check_empty, count_members
from protea.data.build_settings import BuildSettings, sample_size
from protea.data.draws import SPLIT, Permutation, key
from protea.data.encoding import Reader
from protea.data.manifest import LOG, alphabet_named, write_manifest
from protea.data.mapping import ENTRIES
from protea.data.mmseqs import MMseqs, best_hits, write_fasta
from protea.data.token_table import IdIndex, Table, map_file
from protea.data.work import STORE, Numbers, Watcher, Work, check_space, fingerprints, residues_in
from protea.errors import DataError
from protea.fasta import Block, Record

REPORT: Final = "report.tsv"
REMOVED_LIST: Final = "removed.tsv"
TABLE: Final = "table"

_SEARCH_PARTS: Final = 128
"""Batches of 4 MB searched at a time; what a kill can cost."""
_KINDS: Final = "kinds"
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
        self, settings: BuildSettings, command: str, inputs: Mapping[str, Any], watcher: Watcher, *, overwrite: bool
    ) -> None:
        settings.check()
        self.settings, self.watcher = settings, watcher
        self.alphabet = alphabet_named(settings.alphabet)
        self._plan = settings.plan(command, inputs)
        self.work = Work(settings.output, watcher, overwrite=overwrite)
        self.problems = settings.output.with_name(f"{settings.output.name}.problems.tsv")
        self._steps: list[Numbers] = []
        self._reports: list[Path] = []
        self._mmseqs: MMseqs | None = None

    def __enter__(self) -> Build:
        self.work.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.work.__exit__()

    def step(self, name: str, make: Callable[[Path], Numbers], given: Any = None) -> Path:
        """A stage that the manifest reports; its folder."""
        self._steps.append({"step": name, **self.work.stage(name, make, given)})
        return self.work.folder / name

    def check_space(self, sources: Iterable[Any], times: float = 2) -> None:
        """Refuse to begin what the disk cannot hold.

        Args:
            sources: the files that are read.
            times: bytes of work and store for each byte of theirs, at the most, from measurements.
        """
        if not self.work.begun:
            check_space(self.settings.output, int(residues_in(sources) * times))

    def mmseqs(self) -> MMseqs:
        """The program, looked for once, before anything is read."""
        if self._mmseqs is None:
            log = self.work.folder / LOG
            self._mmseqs = MMseqs(self.settings.mmseqs, self.settings.threads, log, self.watcher)
        return self._mmseqs

    def read(
        self,
        name: str,
        records: Iterable[Record | Block],
        sources: Iterable[Any],
        watch: Callable[[Path], Watch] | None = None,
    ) -> Read:
        """Read records into a table and index their ids.

        Args:
            name: of the stage.
            records: in the order of the table.
            sources: the files they come from.
            watch: is given the folder, and then everything that is taken.

        Raises:
            DataError: an id comes twice, or nothing was taken.
        """
        policies = self.settings.policies

        def make(folder: Path) -> Numbers:
            self.watcher.begin(name)
            reader = Reader(self.alphabet, policies, folder / REPORT, self.watcher.advance)
            return asdict(reader.table(records, folder / TABLE, watch and watch(folder)))

        given = [self.alphabet.name, asdict(policies), fingerprints(sources), watch is not None]
        folder = self.step(name, make, given)
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

        return map_file(self.step("draw", make, [valid, test, self.settings.seed]) / _KINDS, np.uint8)

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
                if not self._fasta(folder / "train.fasta", representatives, kinds, TRAIN, start, stop):
                    np.save(folder / "hits.npy", np.zeros((0, 5)))
                    return {"mmseqs": program.version, "commands": []}
                self._fasta(folder / "valid.fasta", representatives, kinds, VALID, 0, representatives.parts)
                sides = [folder / "train.fasta", folder / "valid.fasta"]
                queries, targets = sides[::-1] if reverse else sides
                result = program.search(queries, targets, folder / "work", flags)
                np.save(folder / "hits.npy", best_hits(result, reverse=reverse))
                for path in sides:
                    path.unlink()
                shutil.rmtree(folder / "work")
                return {"mmseqs": program.version, "commands": program.commands[before:]}

            numbers = self.work.stage(name, search, [flags, reverse])
            commands, version = numbers["commands"] or commands, numbers["mmseqs"]
            hits.append(self.work.folder / name / "hits.npy")

        def make(folder: Path) -> Numbers:
            after = map_file(folder / _KINDS, np.uint8, write=len(kinds))
            for start in range(0, len(kinds), ENTRIES):
                after[start : start + ENTRIES] = kinds[start : start + ENTRIES]
            removed = 0
            with (folder / REMOVED_LIST).open("w", encoding="utf-8") as stream:
                stream.write("cluster\tlike\tidentity\tcluster_coverage\tlike_coverage\n")
                for path in hits:
                    found = np.load(path)
                    rows = found[:, 0].astype(np.int64)
                    after[rows] = REMOVED
                    removed += len(rows)
                    pairs = zip(representatives.names(rows), representatives.names(found[:, 1]), found, strict=True)
                    for name, like, (_, _, *figures) in pairs:
                        stream.write("\t".join([name, like, *(f"{figure:.3f}" for figure in figures)]) + "\n")
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
            counts = map_file(self.step("members of clusters", count, settings.empty) / "counts", np.uint32)

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
            removed = self.work.folder / "filter" / REMOVED_LIST
            if any(step["step"] == "filter" for step in self._steps):
                shutil.copyfile(removed, folder / REMOVED_LIST)
            write_manifest(folder, self.alphabet, self._plan, self._steps, splits)
            log = self.work.folder / LOG
            if log.exists():
                shutil.copyfile(log, folder / LOG)
            return splits

        numbers = self.work.stage(STORE, make, self._plan)
        self.work.finish()
        self.problems.unlink(missing_ok=True)
        return {"steps": self._steps, "splits": numbers}

    def _fasta(self, path: Path, table: Table, kinds: Any, kind: int, start: int, stop: int) -> int:
        chosen = []

        def batches() -> Iterable[Any]:
            for batch in table.batches(start, stop):
                rows = np.flatnonzero(kinds[batch.first : batch.first + len(batch)] == kind)
                chosen.append(rows + batch.first)
                yield batch.take(rows)

        return write_fasta(path, ((batch, chosen.pop()) for batch in batches()), self.alphabet)


def _parts(array: Any) -> Iterable[Any]:
    return (array[start : start + ENTRIES] for start in range(0, len(array), ENTRIES))


def _flush(array: Any) -> None:
    if isinstance(array, np.memmap):
        array.flush()
