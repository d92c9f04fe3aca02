"""FASTA files in, files of embeddings out: surveyed first, pipelined, resumable.

One thread reads and prepares, a second computes, the caller's thread writes. Each works a few packs ahead of the next,
so memory use does not depend on the size of the input.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch

import protea
from protea.device import native_bfloat16
from protea.embed.embeddings import Asked, Embedding, assembled, check_poolings, jobs_of, resolve_layers
from protea.embed.finished import Former, check_complete, identity, input_fingerprint
from protea.embed.outputs import (
    EmbeddingOutput,
    RunJournal,
    RunState,
    check_place,
    outputs_of,
    publish,
    run_error,
    stored_record,
)
from protea.embed.prefetch import prefetch
from protea.embed.prepare import prepare
from protea.embed.settings import DIVISION, PROVENANCE, EmbedSettings
from protea.embed.stores import LOG_PROBABILITIES, RESIDUES, EmbeddingStore
from protea.embed.survey import UNKNOWN, Group, Survey, Totals, groups, survey
from protea.errors import DamagedFileError, FastaError, OutputError, ResumeError, UsageError
from protea.fasta import flows
from protea.infer.runner import Runner, default_budget
from protea.journal import REFUSED, complete, differences
from protea.letters import Doubts
from protea.models.encoder import Encoder
from protea.native import instruction_set
from protea.output import check_space, note_what_is_replaced
from protea.progress import SILENT, Progress
from protea.records import read_records
from protea.shards import COMMAND
from protea.text import counted

_COMMIT_SECONDS: Final = 10.0
"""Time between two commits; a killed run loses this work, and the packs that are not written yet."""

_AHEAD: Final = 2
"""Packs that reading and computing work ahead."""


@dataclass
class EmbedRun:
    """One run over the input, from checks to outputs in place.

    ``model_files`` are the SHA-256 of the weights by file name. ``overwrite`` replaces outputs and drops unfinished
    ones; ``update`` replaces finished outputs of the same settings and computes only the sequences that they lack.
    Progress counts residues. ``outputs`` are by default those of the settings; the run records the ``command`` that
    makes them. ``make_runner`` makes what computes, from the model and a token budget. ``was_complete`` says afterwards
    that there was nothing to do.
    """

    settings: EmbedSettings
    model: Encoder
    model_files: Mapping[str, str]
    overwrite: bool = False
    update: bool = False
    progress: Progress = SILENT
    outputs: Sequence[EmbeddingOutput] = ()
    command: str = "embed"
    make_runner: Callable[[Encoder, int], Runner] = Runner
    was_complete: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.layers = resolve_layers(self.settings.layers, self.model)
        check_poolings(self.settings.pool, self.model.alphabet.frame)
        self.outputs = self.outputs or outputs_of(self.settings, self.layers, self.model)
        self._former: Former | None = None
        self._recorded: dict[str, Any] = {}
        self._kept = False
        self._total: Totals | None = None
        self._done = Totals()

    def __call__(self) -> Totals:
        """Run; returns the counts of the whole run, those of an earlier run that it continues included.

        After an error, finished work is kept, and the same command continues from it. If all outputs are complete and
        of the same settings, weights and input, there is nothing to do.
        """
        try:
            for output in self.outputs:
                check_place(output.path, output.kind, overwrite=True)  # under the lock, existing outputs are compared
            with RunJournal([output.path for output in self.outputs], restart=self.overwrite) as journal:
                return self._run_locked(journal)
        except OSError as error:
            raise run_error(error, self.outputs[0].path, sum(self._missing().values()), kept=self._kept) from error

    def _run_locked(self, journal: RunJournal) -> Totals:
        state = journal.state
        self._kept = state is not None
        if state is None and not self.overwrite and (counts := self._compare()) is not None:
            journal.remove()
            self.was_complete = True
            return counts
        if state is not None and not state.finished and self.update and self._present():
            self._former = self._opened()
        old_plan = journal.plan or {}
        budget = (
            self.settings.token_budget
            or old_plan.get("token_budget")
            or default_budget(self.model, whatever_is_free=self.settings.shard is not None)
        )
        torch.set_num_threads(old_plan.get("threads", torch.get_num_threads()))
        surveyed = self._survey(budget)
        # What the packs depend on; it is the same for all shards of one input.
        read = {"token_budget": budget, "groups": surveyed.groups or None, "input": surveyed.fingerprint}
        read |= {"division": DIVISION} if self.settings.shard else {}
        read |= {} if self.command == "embed" else {COMMAND: self.command}
        self._recorded = {"token_budget": budget} | self._circumstances() | read | self._earlier(old_plan)
        plan = self.settings.shown() | self._recorded | {"update": self.update}
        if journal.plan is not None:
            self._check_plan(journal.plan, plan)
            if journal.plan.get("input") is None:
                journal.plan |= read
        if state is None or not state.finished:
            journal.begin(plan)
            state = self._work(journal, surveyed, budget)
        for output, folder, stored in zip(self.outputs, journal.folders, state.stores, strict=True):
            path = folder / stored["complete"]
            if path.exists():  # else an interrupted run has moved it already
                publish(path, output.path, journal.rows(), self._provenance(state))
        if surveyed is UNKNOWN:
            self._tell_doubts(journal)
        journal.remove()
        return state.totals

    # --- before the work -----------------------------------------------------------------------------------------

    def _present(self) -> list[EmbeddingOutput]:
        return [output for output in self.outputs if os.path.lexists(output.path)]

    def _compare(self) -> Totals | None:
        """The counts of outputs that are complete already, or ``None`` for new ones and for those to update."""
        present = self._present()
        if not present:
            for output in self.outputs:
                note_what_is_replaced(output.path)
            return None
        if new := " and ".join(str(output.path) for output in self.outputs if output not in present):
            raise OutputError(
                f"{present[0].path}: exists already, and {new} does not; a new output needs its own run: give the same "
                f"command with {new} alone, or pass --overwrite to compute all"
            )
        wanted = self._identity()
        provenance = check_complete(self.outputs, wanted)
        if self.update and any(map(flows, self.settings.inputs)):
            self._former = Former(self.outputs)
            return None
        current = input_fingerprint(self.settings.inputs, self.settings.columns)
        if self.update and provenance["input"] != current:
            self._former = Former(self.outputs)
            return None
        update = "" if self.settings.shard else "pass --update to compute only new and changed sequences, "
        check_complete(self.outputs, wanted | {"input": current}, f"{update}{REFUSED}")
        for output in self.outputs:
            self.progress.note(complete(output.path))
        return Totals(**provenance["counts"])

    def _opened(self) -> Former:
        """The outputs that an unfinished update replaces."""
        check_complete(self.outputs, self._identity())
        return Former(self.outputs)

    def _identity(self) -> dict[str, Any]:
        return identity(self.settings, self.model_files, self._circumstances()["computed_in"])

    def _earlier(self, old_plan: Mapping[str, Any]) -> dict[str, Any]:
        """Circumstances in which the arrays that an update keeps were computed, if they are not those of this run."""
        if self._former is None or "earlier" in old_plan:
            return {"earlier": old_plan["earlier"]} if "earlier" in old_plan else {}
        now = self._circumstances()
        earlier: list[Any] = []
        for recorded in self._former.provenances:
            then = {name: recorded[name] for name in now}
            earlier += [entry for entry in (*recorded.get("earlier", ()), then) if entry not in (now, *earlier)]
        return {"earlier": earlier} if earlier else {}

    def _survey(self, budget: int) -> Survey:
        if once := [path for path in self.settings.inputs if flows(path)]:
            if self.settings.shard is not None:
                raise UsageError(f"--shard needs files that can be read twice; {once[0]} cannot")
            return UNKNOWN
        self.progress.begin("checking")
        read = partial(read_records, self.settings.inputs, self.settings.columns)
        surveyed = survey(read, self.model, self.settings.policies, budget, self.progress)
        for line in surveyed.doubts:
            self.progress.note(line)
        if surveyed.damage is not None:
            if self.settings.shard is not None or not (surveyed.totals and surveyed.totals.records):
                raise surveyed.damage
            self.progress.note(f"{surveyed.damage}; the records before the damage are embedded first")
        return surveyed

    def _tell_doubts(self, journal: RunJournal) -> None:
        doubts = Doubts()
        doubts.add(journal.rows())
        for line in doubts.lines():
            self.progress.note(line)

    def _circumstances(self) -> dict[str, Any]:
        """What the numbers depend on, apart from the settings."""
        device = self.model.device
        bfloat16 = "native" if native_bfloat16(device) else "emulated"
        return {
            "version": protea.__version__,
            "torch": str(torch.__version__),
            "model_files": dict(self.model_files),
            "computed_in": self.model.precision,
            "computed_on": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "kernels": f"{torch.backends.cpu.get_cpu_capability()}, {bfloat16} bfloat16",
            "native_library": instruction_set() or "none",
            "threads": torch.get_num_threads(),
        }

    def _check_plan(self, old: Mapping[str, Any], new: dict[str, Any]) -> None:
        output = self.outputs[0].path
        # Input that can be read only once has no fingerprint yet; the records already read are compared later.
        if None not in (old.get("input"), new["input"]) and old["input"] != new["input"]:
            raise ResumeError(
                f"{output}: the input has changed since an unfinished run began ({old['groups']} packs then, "
                f"{new['groups']} now); restore it, or pass --overwrite to start again"
            )
        unimportant = {"devices", "input", "groups"}
        if self.settings.token_budget is None:
            unimportant.add("token_budget")
        ours = {name: value for name, value in new.items() if name not in unimportant}
        theirs = {name: value for name, value in old.items() if name not in unimportant}
        if changed := differences(theirs, ours):
            raise ResumeError(
                f"{output}: an unfinished run has other settings ({changed}); use those, or pass --overwrite to "
                "start again"
            )

    # --- the work ------------------------------------------------------------------------------------------------

    def _work(self, journal: RunJournal, surveyed: Survey, budget: int) -> RunState:
        share = None if self.settings.shard is None else self.settings.shard.part(surveyed.residues)
        state = journal.state or RunState(groups=0 if share is None else share.start)
        self._total = surveyed.totals if share is None else None
        self._done = state.totals
        check_space(self._missing(), "free some, write elsewhere, or pass --store float16")
        if state.totals.records:
            self.progress.note(f"continuing after {counted(state.totals.records, 'record')} of an unfinished run")
        total = None if self._total is None else self._total.residues
        self.progress.begin("embedding", total, done=state.totals.residues)
        with ExitStack() as stack:
            stores: list[EmbeddingStore] = []
            commits = state.stores or (None,) * len(self.outputs)
            for output, folder, commit in zip(self.outputs, journal.folders, commits, strict=True):
                stores.append(output.open(folder, commit))
                stack.callback(stores[-1].abandon)
            stop = Event()
            ready = prefetch(self._groups(surveyed, budget, state, share), _AHEAD, stop, may_block=True)
            results = stack.enter_context(closing(prefetch(self._compute(ready, budget), _AHEAD, stop)))
            committed = time.monotonic()
            damage: DamagedFileError | None = None
            try:
                for group, embeddings in results:
                    state = self._write(group, iter(embeddings), stores, journal, state)
                    if time.monotonic() - committed >= _COMMIT_SECONDS:
                        state = self._commit(journal, stores, state)
                        committed = time.monotonic()
            except DamagedFileError as error:
                damage = error
            if state.totals.embedded == 0 and share is None:
                rows = journal.rows()
                journal.remove()
                if damage is not None:
                    raise damage
                inputs = ", ".join(self.settings.inputs)
                raise FastaError(f"{inputs}: every record was skipped; the first, {rows[0][0]!r}: {rows[0][2]}")
            self._check_input(surveyed, share, state)
            state = self._commit(journal, stores, state)
            if damage is not None:
                raise DamagedFileError(
                    f"{damage}; {counted(state.totals.embedded, 'sequence')} before the damage embedded and kept: "
                    "correct the file and run the same command again"
                )
            if self._former is not None:
                # After the last commit, so that a run that continues from it adds them once.
                journal.add_rows(self._former.removed())
                self.progress.note(self._former.summary())
            names = [store.finish(self._provenance(state)).name for store in stores]
        state = replace(state, finished=True, stores=tuple({"complete": name} for name in names))
        journal.commit(state)
        return state

    def _check_input(self, surveyed: Survey, share: range | None, state: RunState) -> None:
        """Compare what was read with what was surveyed."""
        if share is None:
            same = surveyed.fingerprint in {None, state.fingerprint}
        else:
            same = not len(share) or state.groups == share.stop
        if not same:
            raise ResumeError(
                f"{self.outputs[0].path}: the input changed during the run; run again with --overwrite when nobody "
                "writes to it"
            )

    def _groups(self, surveyed: Survey, budget: int, state: RunState, share: range | None) -> Iterator[Group]:
        """The groups still to compute. Records before them are read again and must be the same."""
        records = read_records(self.settings.inputs, self.settings.columns)
        items = prepare(records, self.model, self.settings.policies, surveyed.new_ids())
        if self._former is not None:
            items = self._former.marked(items)
        if state.records:
            last_finished = next(islice(items, state.records - 1, None), None)
            if last_finished is None or last_finished.fingerprint.hex() != state.fingerprint:
                raise ResumeError(
                    f"{self.outputs[0].path}: the input has changed: it no longer begins with the "
                    f"{counted(state.records, 'record')} that an unfinished run embedded; restore them, or pass "
                    "--overwrite to start again"
                )
        # A new run of a shard begins at the shard's first group but numbers all groups of the input.
        number = state.groups if state.records else 0
        for group in groups(items, budget, number=number, records=state.records):
            if share is not None and group.number >= share.stop:
                return
            if share is None or group.number >= share.start:
                yield group

    def _compute(self, ready: Iterable[Group], budget: int) -> Generator[tuple[Group, list[Embedding]]]:
        kinds = {kind for output in self.outputs for kind in output.layout.kinds}
        poolings = tuple(kind for kind in self.settings.pool if kind in kinds)
        alphabet = self.model.alphabet
        asked = Asked(
            layers=self.layers if poolings or RESIDUES in kinds else (),
            poolings=poolings,
            residues=RESIDUES in kinds,
            predicted=tuple(map(alphabet.tokens.index, alphabet.residues)) if LOG_PROBABILITIES in kinds else (),
        )
        frame = self.model.alphabet.frame
        runner = self.make_runner(self.model, budget)
        groups_and_jobs = (
            (group, (job for item in group.items if item.encoded for job in jobs_of(item.encoded, asked, frame)))
            for group in ready
        )
        for group, results in runner.each(groups_and_jobs, apart=True):
            yield group, list(assembled(results, asked, frame))

    def _write(
        self,
        group: Group,
        computed: Iterator[Embedding],
        stores: list[EmbeddingStore],
        journal: RunJournal,
        state: RunState,
    ) -> RunState:
        former = self._former
        for item in group.items:
            journal.add_rows(item.rows)
            if item.encoded is None:
                continue
            kept = not item.encoded.windows
            # What is kept belongs to the former output, whose arrays are of the stored type already.
            if former is not None and kept:
                arrays = former.arrays(item.encoded.record.id)
            else:
                embedding = next(computed)
                arrays = [output.arrays(embedding) for output in self.outputs]
                journal.add_rows(() if former is None else former.change(item.encoded))
            for store, of_store in zip(stores, arrays, strict=True):
                store.write(stored_record(item.encoded), of_store)
        self._done = state.totals.plus(group.items)
        self.progress.advance(self._done.residues - state.totals.residues)
        return replace(
            state,
            groups=group.number + 1,
            records=group.records,
            fingerprint=group.fingerprint.hex(),
            totals=self._done,
        )

    def _commit(self, journal: RunJournal, stores: list[EmbeddingStore], state: RunState) -> RunState:
        state = replace(state, stores=tuple(store.commit() for store in stores))
        journal.commit(state)
        self._kept = True
        return state

    def _missing(self) -> dict[Path, int]:
        """Bytes still to be written to each output; empty if unknown."""
        if self._total is None:
            return {}
        return {output.path: output.bytes_for(self._total) - output.bytes_for(self._done) for output in self.outputs}

    def _provenance(self, state: RunState) -> dict[str, Any]:
        """Settings, circumstances and counts; no times, so that equal runs have equal outputs."""
        recorded = self._recorded
        if recorded["input"] is None:  # input that can be read only once is known at the end
            recorded = recorded | {"input": state.fingerprint, "groups": state.groups}
        return self.settings.shown() | {PROVENANCE: recorded | {"counts": asdict(state.totals)}}
