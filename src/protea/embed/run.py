"""FASTA files in, files of embeddings out: surveyed first, pipelined, resumable.

Reading and preparing run in one thread, computing in another, writing in the caller's; each works ahead of the next by
a few packs, so memory stays the same whatever the input's size.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch

import protea
from protea.device import native_bfloat16
from protea.embed.embeddings import Asked, Embedding, assembled, jobs_of, resolve_layers
from protea.embed.journal import Journal, RunState, differences
from protea.embed.outputs import (
    check_place,
    check_space,
    move_into_place,
    outputs_of,
    refuse_existing,
    write_beside,
    write_error,
)
from protea.embed.pooling import check_poolings
from protea.embed.prefetch import prefetch
from protea.embed.prepare import EncodedRecord, Prepared, prepare
from protea.embed.settings import PROVENANCE, EmbedSettings
from protea.embed.stores import RESIDUES, EmbeddingStore, StoredRecord, open_store
from protea.embed.survey import UNKNOWN, Group, Survey, Totals, groups, survey
from protea.errors import DamagedFileError, FastaError, ResumeError, UsageError
from protea.fasta import Record, flows, read_fasta
from protea.infer.budget import default_budget
from protea.infer.runner import Runner
from protea.models.encoder import Encoder

_COMMIT_SECONDS: Final = 10.0
"""Work between two commits: what a killed run loses at most, with the packs then under way."""

_AHEAD: Final = 2
"""Packs that reading and computing are ahead."""


_HAPPENED: Final = (
    *("version", "torch", "model_files", "computed_in", "computed_on", "kernels", "threads"),
    *("token_budget", "groups", "input"),
)
"""What of the plan goes into the provenance beside the settings."""


class Watcher:
    """Is told what a run does; the command line draws progress bars from it."""

    def surveyed(self, residues: int) -> None:
        """So many residues more were checked."""

    def begun(self, total: Totals | None, done: Totals) -> None:
        """Computing begins: what there is, if that is known, and what an unfinished run had done."""

    def embedded(self, residues: int) -> None:
        """So many residues more were written."""

    def note(self, message: str) -> None:
        """Something the user should know."""


@dataclass
class EmbedRun:
    """One run over the input, from checks to outputs in place.

    Attributes:
        settings: what the user asked for.
        model: on the device to compute on.
        model_files: SHA-256 of the weights by file name.
        overwrite: replace outputs and forget unfinished ones.
        watcher: is told what happens.
    """

    settings: EmbedSettings
    model: Encoder
    model_files: Mapping[str, str]
    overwrite: bool = False
    watcher: Watcher = field(default_factory=Watcher)

    def __post_init__(self) -> None:
        self.layers = resolve_layers(self.settings.layers, self.model)
        check_poolings(self.settings.pool, self.model.alphabet.frame)
        self._plan: dict[str, Any] = {}
        self._kept = False
        self._total: Totals | None = None
        self._done = Totals()
        self.outputs = outputs_of(self.settings, self.layers, self.model.config.hidden_size)

    def __call__(self) -> Totals:
        """Do it.

        Returns:
            Counts of the whole run, an unfinished one's included.

        Raises:
            ProteaError: with what was wrong; finished work is kept for the same command to go on with.
        """
        try:
            for output in self.outputs:
                check_place(output.path, output.kind, overwrite=self.overwrite)
            with Journal([output.path for output in self.outputs], anew=self.overwrite) as journal:
                return self._locked(journal)
        except OSError as error:
            raise write_error(error, self.outputs[0].path, self._missing(), kept=self._kept) from error

    def _locked(self, journal: Journal) -> Totals:
        found = journal.progress
        self._kept = found is not None
        if found is None:
            for output in self.outputs:  # a folder that a killed run left without a journal is no reason to go on
                refuse_existing(output.path, overwrite=self.overwrite)
        followed = journal.plan or {}
        budget = (
            self.settings.token_budget
            or followed.get("token_budget")
            or default_budget(self.model, whatever_is_free=self.settings.shard is not None)
        )
        torch.set_num_threads(followed.get("threads", torch.get_num_threads()))
        surveyed = self._survey(budget)
        plan = self._plan = self.settings.shown() | self._circumstances() | _identity(budget, surveyed)
        if journal.plan is not None:
            self._check_plan(journal.plan, plan)
            if journal.plan.get("input") is None:
                journal.plan |= _identity(budget, surveyed)
        if found is None or not found.finished:
            journal.begin(plan)
            found = self._work(journal, surveyed, budget)
        self._place(journal, found)
        journal.remove()
        return found.totals

    # --- before the work -----------------------------------------------------------------------------------------

    def _read(self) -> Iterator[Record]:
        return read_fasta(self.settings.inputs)

    def _survey(self, budget: int) -> Survey:
        if once := [path for path in self.settings.inputs if flows(path)]:
            if self.settings.shard is not None:
                raise UsageError(f"--shard needs files that can be read twice, not {once[0]}")
            return UNKNOWN
        found = survey(self._read, self.model, self.settings.policies, budget, self.watcher.surveyed)
        if found.damage is not None:
            if self.settings.shard is not None:
                raise found.damage
            self.watcher.note(f"{found.damage}; the records before that are embedded first")
        return found

    def _circumstances(self) -> dict[str, Any]:
        """What numbers depend on beside the settings."""
        device = self.model.device
        bfloat16 = "native" if native_bfloat16(device) else "emulated"
        return {
            "version": protea.__version__,
            "torch": str(torch.__version__),
            "model_files": dict(self.model_files),
            "computed_in": str(self.model.compute_dtype).removeprefix("torch."),
            "computed_on": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "kernels": f"{torch.backends.cpu.get_cpu_capability()}, {bfloat16} bfloat16",
            "threads": torch.get_num_threads(),
        }

    def _check_plan(self, old: Mapping[str, Any], new: dict[str, Any]) -> None:
        output = self.outputs[0].path
        # Of input that cannot be known beforehand only the records already read can be compared, and will be.
        if None not in (old.get("input"), new["input"]) and old["input"] != new["input"]:
            raise ResumeError(
                f"{output}: the input has changed since an unfinished run began ({old['groups']} packs then, "
                f"{new['groups']} now); restore it, or pass --overwrite to start anew"
            )
        unimportant = {"devices", "input", "groups"}
        if self.settings.token_budget is None:
            unimportant.add("token_budget")
        ours = {name: value for name, value in new.items() if name not in unimportant}
        theirs = {name: value for name, value in old.items() if name not in unimportant}
        if changed := differences(theirs, ours):
            raise ResumeError(
                f"{output}: an unfinished run was started with other settings ({changed}); "
                "use those again, or pass --overwrite to start anew"
            )

    # --- the work ------------------------------------------------------------------------------------------------

    def _work(self, journal: Journal, surveyed: Survey, budget: int) -> RunState:
        share = None if self.settings.shard is None else self.settings.shard.groups(surveyed.groups)
        progress = journal.progress or RunState(groups=0 if share is None else share.start)
        total = surveyed.totals
        if total is not None and share is None:
            check_space(self.outputs, total, progress.totals)
            self._total = total
        self.watcher.begun(total if share is None else None, progress.totals)
        with ExitStack() as stack:
            stores = self._open(journal, progress)
            for store in stores:
                stack.callback(store.abandon)
            stop = Event()
            ready = prefetch(self._groups(surveyed, budget, progress, share), _AHEAD, stop, may_block=True)
            results = stack.enter_context(closing(prefetch(self._compute(ready, budget), _AHEAD, stop)))
            committed = time.monotonic()
            damage: DamagedFileError | None = None
            try:
                for group, embeddings in results:
                    progress = self._write(group, embeddings, stores, journal, progress)
                    if time.monotonic() - committed >= _COMMIT_SECONDS:
                        progress = self._commit(journal, stores, progress)
                        committed = time.monotonic()
            except DamagedFileError as error:
                damage = error
            if progress.totals.embedded == 0 and share is None:
                message = _nothing_left(self.settings.inputs, journal)
                journal.remove()
                raise damage or FastaError(message)
            self._check_input(surveyed, share, progress)
            progress = self._commit(journal, stores, progress)
            if damage is not None:
                raise DamagedFileError(
                    f"{damage}; the {progress.totals.embedded} sequences before are embedded and kept: mend the file "
                    "and run the same command again"
                )
            names = [store.finish(self._provenance(progress.totals)).name for store in stores]
        progress = replace(progress, finished=True, stores=tuple({"complete": name} for name in names))
        journal.commit(progress)
        return progress

    def _check_input(self, surveyed: Survey, share: range | None, progress: RunState) -> None:
        """See that what was read is what was surveyed."""
        if surveyed.fingerprint is None:
            return
        if share is None:
            same = progress.fingerprint == surveyed.fingerprint
        else:
            same = not len(share) or progress.groups == share.stop
        if not same:
            raise ResumeError(
                f"{self.outputs[0].path}: the input changed while it was read; run again with --overwrite, "
                "on files that nobody is writing"
            )

    def _open(self, journal: Journal, progress: RunState) -> list[EmbeddingStore]:
        states = progress.stores or (None,) * len(self.outputs)
        return [
            open_store(output.kind, folder, output.layout, state)
            for output, folder, state in zip(self.outputs, journal.folders, states, strict=True)
        ]

    def _groups(self, surveyed: Survey, budget: int, progress: RunState, share: range | None) -> Iterator[Group]:
        """The groups still to do; what comes before them is read again, and checked to be the same."""
        items = prepare(self._read(), self.model, self.settings.policies, surveyed.ids())
        if progress.records:
            _pass_over(items, progress, self.outputs[0].path)
            rest = groups(items, budget, number=progress.groups, records=progress.records)
        else:
            rest = groups(items, budget)
        for group in rest:
            if share is not None and group.number >= share.stop:
                return
            if share is None or group.number >= share.start:
                yield group

    def _compute(self, ready: Iterable[Group], budget: int) -> Generator[tuple[Group, list[Embedding]]]:
        kinds = {kind for output in self.outputs for kind in output.layout.kinds}
        poolings = tuple(kind for kind in self.settings.pool if kind in kinds)
        asked = Asked(layers=self.layers, poolings=poolings, residues=RESIDUES in kinds)
        frame = self.model.alphabet.frame
        runner: Runner = Runner(self.model, budget)
        groups_and_jobs = (
            (group, (job for one in _encoded(group) for job in jobs_of(one, asked, frame))) for group in ready
        )
        for group, results in runner.each(groups_and_jobs, apart=True):
            yield group, list(assembled(results, asked, frame))

    def _write(
        self,
        group: Group,
        embeddings: list[Embedding],
        stores: list[EmbeddingStore],
        journal: Journal,
        progress: RunState,
    ) -> RunState:
        for embedding in embeddings:
            encoded = embedding.encoded
            entry = StoredRecord(
                encoded.record.id, encoded.record.description, len(encoded.ids), encoded.truncated_from
            )
            arrays = dict(embedding.pooled)
            if embedding.residues is not None:
                arrays[RESIDUES] = embedding.residues
            for output, store in zip(self.outputs, stores, strict=True):
                store.write(entry, {kind: output.narrowed(arrays[kind], encoded) for kind in output.layout.kinds})
        for item in group.items:
            journal.note(item.notes)
        totals = progress.totals.plus(group.items)
        self.watcher.embedded(totals.residues - progress.totals.residues)
        self._done = totals
        return replace(
            progress,
            groups=group.number + 1,
            records=group.records,
            fingerprint=group.fingerprint.hex(),
            totals=totals,
        )

    def _commit(self, journal: Journal, stores: list[EmbeddingStore], progress: RunState) -> RunState:
        progress = replace(progress, stores=tuple(store.commit() for store in stores))
        journal.commit(progress)
        self._kept = True
        return progress

    def _missing(self) -> int | None:
        """Bytes still to be written, if the whole is known."""
        if self._total is None:
            return None
        return sum(output.needs(self._total) - output.needs(self._done) for output in self.outputs)

    # --- after the work ------------------------------------------------------------------------------------------

    def _provenance(self, totals: Totals) -> dict[str, Any]:
        """Settings and what happened; nothing of when and how often it was interrupted."""
        happened = {name: value for name, value in self._plan.items() if name in _HAPPENED}
        return self.settings.shown() | {PROVENANCE: happened | {"counts": asdict(totals)}}

    def _place(self, journal: Journal, progress: RunState) -> None:
        """Move finished outputs into place; done again from the start if interrupted."""
        for output, folder, state in zip(self.outputs, journal.folders, progress.stores, strict=True):
            complete = folder / state["complete"]
            if complete.exists():
                write_beside(output.path, journal.report(), self._provenance(progress.totals))
                move_into_place(complete, output.path)


def _encoded(group: Group) -> Iterator[EncodedRecord]:
    return (item.encoded for item in group.items if item.encoded is not None)


def _identity(budget: int, surveyed: Survey) -> dict[str, Any]:
    """What packs depend on; shards of one whole have it in common."""
    return {"token_budget": budget, "groups": surveyed.groups or None, "input": surveyed.fingerprint}


def _pass_over(items: Iterator[Prepared], progress: RunState, output: Path) -> None:
    """Read what was done before again, without computing.

    Raises:
        ResumeError: it is not what it was.
    """
    fingerprint = b""
    records = 0
    for item in items:
        records += 1
        fingerprint = item.fingerprint
        if records == progress.records:
            break
    if records < progress.records or fingerprint.hex() != progress.fingerprint:
        raise ResumeError(
            f"{output}: the input has changed: its first {progress.records} records are not those an unfinished run "
            "embedded; restore them, or pass --overwrite to start anew"
        )


def _nothing_left(inputs: Iterable[str], journal: Journal) -> str:
    first = journal.report().decode().splitlines()[0].split("\t")
    return f"{', '.join(inputs)}: every record was skipped; the first, {first[0]!r}: {first[2]}"
