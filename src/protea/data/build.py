"""The stages that all builds have in common, from records to a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.data.assemble import REMOVED, TEST, TRAIN, VALID, Kinds, assemble, check_empty, count_members
from protea.data.build_settings import BuildSettings, sample_size
from protea.data.draws import SPLIT, Permutation, key
from protea.data.encoding import REPORT, Reader
from protea.data.manifest import LOG, alphabet_named, write_manifest
from protea.data.mapping import ENTRIES, Members, Problems
from protea.data.mmseqs import MMseqs, best_hits, write_fasta
from protea.data.token_table import Table, map_file, take
from protea.data.work import STORE, Numbers, Work, fingerprints, input_bytes
from protea.errors import DataError
from protea.fasta import Block, Record
from protea.output import REPORT_HEADER, check_space
from protea.progress import Progress

_REMOVED_LIST: Final = "removed.tsv"
_REMOVED_COLUMNS: Final = ("cluster", "like", "identity", "cluster_coverage", "like_coverage")
_KINDS: Final = "kinds"
_SEARCH_PARTS: Final = 128
"""Batches of 4 MB in one search. A kill costs at most one search."""


class Build:
    """One build. ``command`` and ``inputs``, the files by option, are noted in the manifest."""

    def __init__(
        self, settings: BuildSettings, command: str, inputs: Mapping[str, Any], progress: Progress, *, overwrite: bool
    ) -> None:
        settings.check()
        self.settings, self.progress = settings, progress
        self.alphabet = alphabet_named(settings.alphabet)
        self._plan = settings.plan(command, inputs)
        self._work = Work(settings.output, progress, overwrite=overwrite)
        self.problems = Problems(settings.output.with_name(f"{settings.output.name}.problems.tsv"))
        self._steps: list[Numbers] = []
        self._reports: list[Path] = []
        self._mmseqs: MMseqs | None = None

    def __enter__(self) -> Self:
        self._work.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._work.__exit__(*exception)

    def step(self, name: str, make: Callable[[Path], Numbers], given: Any = None) -> Path:
        """Do a stage whose numbers the manifest reports; return its folder."""

        def begin(folder: Path) -> Numbers:
            self.progress.begin(name)
            return make(folder)

        self._steps.append({"step": name, **self._work.stage(name, begin, given)})
        return self._work.folder / name

    def check_space(self, sources: Iterable[str | Path], times: float = 2) -> None:
        """Refuse a build that does not fit on the disk; a byte of input takes at most ``times`` bytes, as measured."""
        if not self._work.begun:
            needed = {self.settings.output: int(input_bytes(sources) * times)}
            check_space(needed, "free some space, or name a folder on another disk")

    def mmseqs(self) -> MMseqs:
        """The program; builds that need it look for it before they read anything."""
        if self._mmseqs is None:
            log = self._work.folder / LOG
            self._mmseqs = MMseqs(self.settings.mmseqs, self.settings.threads, log, self.progress)
        return self._mmseqs

    def read(
        self,
        name: str,
        groups: Iterable[list[Record] | Block],
        sources: Iterable[str | Path],
        note: Callable[[list[Record]], bytes] | None = None,
    ) -> Table:
        """Read the records of some files into a table; see ``Reader.table``."""
        rules = self.settings.rules

        def make(folder: Path) -> Numbers:
            reader = Reader(self.alphabet, rules, self.progress)
            counts = reader.table(groups, folder, note)
            self.check_ids(Table(folder))
            return asdict(counts)

        given = [self.alphabet.name, asdict(rules), fingerprints(sources), note is not None]
        folder = self.step(name, make, given)
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

        return _kinds_in(self.step("draw", make, [valid, test, self.settings.seed]))

    def filter(self, representatives: Table, kinds: Kinds) -> Kinds:
        """Remove training clusters whose representative is similar to that of a validation cluster."""
        if not self.settings.filtered or not (kinds == VALID).any():
            return kinds
        searches = [
            self._search(representatives, kinds, start) for start in range(0, representatives.parts, _SEARCH_PARTS)
        ]

        def make(folder: Path) -> Numbers:
            after = kinds.copy()
            with (folder / _REMOVED_LIST).open("w", encoding="utf-8") as stream:
                stream.write("\t".join(_REMOVED_COLUMNS) + "\n")
                for _, hits in searches:
                    removed, similar = hits[:, :2].astype(np.int64).T
                    after[removed] = REMOVED
                    names = zip(representatives.names(removed), representatives.names(similar), strict=True)
                    for pair, figures in zip(names, hits[:, 2:].tolist(), strict=True):
                        stream.write("\t".join([*pair, *(f"{figure:.3f}" for figure in figures)]) + "\n")
            after.tofile(folder / _KINDS)
            commands: list[str] = next((run["commands"] for run, _ in reversed(searches) if run["commands"]), [])
            return {
                "searches": len(searches),
                "mmseqs": searches[-1][0]["mmseqs"],
                "commands": commands,
                "removed": sum(len(hits) for _, hits in searches),
                "kept": int((after == TRAIN).sum()),
            }

        return _kinds_in(self.step("filter", make))

    def _search(self, representatives: Table, kinds: Kinds, start: int) -> tuple[Numbers, NDArray[np.float64]]:
        """Compare some training clusters with all validation clusters: the numbers of the stage and the best hits."""
        flags, reverse = self.settings.flags, self.settings.search_from == "valid"
        number, parts = start // _SEARCH_PARTS + 1, -(-representatives.parts // _SEARCH_PARTS)
        name = f"search {number}"

        def make(folder: Path) -> Numbers:
            self.progress.begin(f"search {number} of {parts}")
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

        numbers = self._work.stage(name, make, [flags, reverse])
        return numbers, np.load(self._work.folder / name / "hits.npy")

    def store(self, representatives: Table, kinds: Kinds, members: Members | None) -> Numbers:
        """Write the store and give it its name; return the numbers of its steps and splits."""
        policy = self.settings.empty
        counts = None
        if members is not None:
            counts = map_file(self._count(representatives, kinds, members) / "counts", np.uint32)

        def make(folder: Path) -> Numbers:
            self.progress.begin("write")
            splits = assemble(folder, self.alphabet, representatives, kinds, members, counts, policy, self.progress)
            with (folder / REPORT).open("wb") as report:
                report.write("\t".join(REPORT_HEADER).encode() + b"\n")
                for path in self._reports:
                    with path.open("rb") as stream:
                        shutil.copyfileobj(stream, report)
            if any(step["step"] == "filter" for step in self._steps):
                shutil.copyfile(self._work.folder / "filter" / _REMOVED_LIST, folder / _REMOVED_LIST)
            write_manifest(folder, self.alphabet, self._plan, self._steps, splits)
            if (log := self._work.folder / LOG).exists():
                shutil.copyfile(log, folder / LOG)
            return splits

        splits = self._work.stage(STORE, make, self._plan)
        self._work.finish()
        self.problems.remove()
        return {"steps": self._steps, "splits": splits}

    def _count(self, representatives: Table, kinds: Kinds, members: Members) -> Path:
        policy = self.settings.empty

        def make(folder: Path) -> Numbers:
            counts = count_members(members, len(representatives), folder / "counts")
            empty = check_empty(counts, kinds, representatives, policy, self.problems)
            return {"empty": empty, "policy": policy}

        return self.step("members of clusters", make, policy)


def _kinds_in(folder: Path) -> Kinds:
    return np.fromfile(folder / _KINDS, np.uint8)


def _of_kind(
    table: Table, kinds: Kinds, kind: int, start: int, stop: int
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """The sequences of one kind in some batches, with their rows."""
    for first, batch in table.batches(start, stop):
        rows = np.flatnonzero(kinds[first : first + len(batch)] == kind)
        yield take(batch, rows), rows + first
