"""``protea finetune``: from labelled sequences to a predictor in its folder, measured beside baselines.

The order never changes: split, calibration part, training on train, choices on validation, calibration, baselines, and
at last, once, the test part. A killed run continues from ``.RUN.partial``; the folder RUN appears when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import yaml

from protea.device import return_freed_memory
from protea.embed.embeddings import resolve_layers
from protea.errors import DataError, FinishedError, OutputError, ResumeError, UsageError
from protea.finetune.adapters import has_class
from protea.finetune.class_counts import class_notes
from protea.finetune.examples import length_notes, prepare
from protea.finetune.finetune_settings import FinetuneSettings
from protea.finetune.fitting import fit_predictor
from protea.finetune.frozen import AUTO
from protea.finetune.heads import HF, RESIDUES
from protea.finetune.label_tables import hub_fingerprint, is_hub
from protea.finetune.labelled_data import DataFiles, read_labelled
from protea.finetune.measuring import Measurements, measure_member
from protea.finetune.members import Trainer, head_of
from protea.finetune.predictor import Predictor
from protea.finetune.report import write_pages
from protea.finetune.splits import calibration, check_training, inner_folds, split
from protea.finetune.splits import parse as parse_split
from protea.finetune.tasks import Labelled
from protea.infer.loading import LoadedModel, ModelLoader
from protea.journal import REFUSED, WorkFolder, complete, differences
from protea.output import WRITTEN, check_output, fingerprint, measured, put_in_place, write_report
from protea.progress import SILENT, Progress
from protea.rerun import check_intact, check_same
from protea.tables import write_table

RUN: Final = "run.yaml"
_INPUT: Final = "input"
_NAMES_ONLY: Final = ("data", "output", "labels", "mask", "model")
"""Settings that name files, whose contents are compared instead."""


@dataclass
class Finished:
    """A finished run: its folder, the predictor (of the first fold), and the numbers, with what to tell the user.

    ``folders`` hold a predictor each: the output itself, or the folders of all folds. ``told`` are the notes that the
    progress has told already, before training.
    """

    output: Path
    predictor: Predictor
    measured: Measurements
    folders: tuple[Path, ...] = ()
    told: tuple[str, ...] = ()


def finetune(settings: FinetuneSettings, *, overwrite: bool = False, progress: Progress = SILENT) -> Finished:
    """Train a predictor and write its folder.

    Raises ``FinishedError`` if the folder is complete and of the same settings, weights and data; ``OutputError`` if it
    is of others; ``ResumeError`` if an unfinished run is of others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("protea finetune runs in one process; start it without torchrun")
    output = settings.output
    check_output(output, overwrite=True, ours=_is_run)
    loader = ModelLoader(settings.device, settings.dtype)
    loaded = loader(settings.model)
    wanted = _identity(settings, loaded)
    if output.exists() and any(output.iterdir()) and not overwrite:
        recorded = _recorded(output)
        check_same(output, recorded["identity"], wanted, REFUSED)
        for name, known in recorded[WRITTEN].items():
            check_intact(output, known, part=name)
        raise FinishedError(complete(output))
    with WorkFolder(output) as work:
        old = None if overwrite else _unfinished(work, wanted)
        try:
            run = _Run(settings, loaded, work.path, wanted, progress)
        except BaseException:
            if work.is_new:
                work.remove()
            raise
        if old is None:
            work.clear()
            work.commit({"identity": wanted})
        else:
            progress.note(f"continuing an unfinished run of {output}")
        told = run.known()
        for note in told:
            progress.note(note)
        with _explained(output):
            finished = replace(run(), told=tuple(told))
        put_in_place(work.path / "complete", output)
        work.remove()
    return finished


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / RUN).is_file() or not any(path.iterdir()))


def _identity(settings: FinetuneSettings, loaded: LoadedModel) -> dict[str, Any]:
    """All that a run depends on, as plain values."""
    shown = {name: value for name, value in settings.shown().items() if name not in _NAMES_ONLY}
    files = [*settings.data, *(str(path) for path in (settings.labels, settings.mask) if path is not None)]
    inputs = [hub_fingerprint(name) if is_hub(name) else fingerprint(_files_of(name)) or name for name in files]
    return {**shown, "model_files": loaded.weights_sha256(), _INPUT: inputs}


def _files_of(name: str) -> list[Path]:
    """The files of an input; a data set that ``datasets`` saved is a folder of many."""
    folder = Path(name)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]


def _recorded(output: Path) -> dict[str, Any]:
    try:
        recorded = yaml.safe_load((output / RUN).read_text(encoding="utf-8"))
        return {name: recorded[name] for name in ("identity", WRITTEN)}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise OutputError(f"{output}: its {RUN} is missing or damaged; {REFUSED}") from error


def _unfinished(work: WorkFolder, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an unfinished run, which must be the same; ``None`` if there is none."""
    old = work.read()
    if old is not None and (changed := differences(old["identity"], wanted)):
        raise ResumeError(
            f"{work.output}: an unfinished run has other settings ({changed}); use those, or pass --overwrite to start "
            "again"
        )
    return old


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or output}: cannot be read or written: {error.strerror or error}; the same command "
            "continues the run"
        ) from error


def _joined_notes(folds: list[list[str]]) -> list[str]:
    """The notes of all folds, once where all have the same; the others name their fold."""
    common = set(folds[0]).intersection(*folds[1:])
    named = [
        note if note in common else f"fold {number}: {note}"
        for number, notes in enumerate(folds, start=1)
        for note in notes
    ]
    return list(dict.fromkeys(named))


class _Run:
    """A run whose data are read, divided and checked; calling it does the work."""

    def __init__(
        self, settings: FinetuneSettings, loaded: LoadedModel, work: Path, identity: dict[str, Any], progress: Progress
    ) -> None:
        self.settings, self.loaded, self.work, self.identity, self.progress = settings, loaded, work, identity, progress
        labelled = read_labelled(
            DataFiles(
                data=settings.data,
                labels=settings.labels,
                mask=settings.mask,
                task=settings.task,
                id_column=settings.id_column,
                sequence_column=settings.sequence_column,
                target_column=settings.target_column,
                set_column=settings.set_column,
                unknown=settings.unknown,
                gaps=settings.gaps,
            )
        )
        width = loaded.module.config.hidden_size
        if settings.method == "lora" and settings.rank > width:
            raise UsageError(f"--rank {settings.rank:,}: more than the model's width, {width:,}; 4 to 16 are usual")
        settings.check(labelled.task)
        self.rows = list(labelled.rows)
        self.how = parse_split(settings.split)
        folds = split(labelled, self.how, settings.seed, progress)
        self.folds = [calibration(fold, settings.calibration, settings.seed, settings.coverage) for fold in folds]
        self.whole = prepare(labelled, loaded.module, settings.long, self.rows)
        config = head_of(settings, loaded.module, labelled)
        self.notes = []
        if config.kind == HF:
            if not has_class(loaded.module):
                raise UsageError(f"--head {HF}: transformers has no class for {loaded.module.config.family}")
            if config.reads not in (RESIDUES, settings.pool):
                self.notes.append(f"--head {HF} reads the vector bos, as transformers does, not {settings.pool}")
        if settings.method == "lora" and not has_class(loaded.module):
            self.notes.append(
                f"transformers has no class for {loaded.module.config.family}: only Protea can load the adapter"
            )
        if settings.layer != AUTO:
            resolve_layers([settings.layer], loaded.module)
        if self.how.inner > 1 and settings.layer != AUTO and len(set(settings.lr or ())) < 2:
            self.notes.append(
                f"split {self.how}: the same as k-fold, because one layer or learning rate leaves nothing to choose"
            )
            self.how = replace(self.how, inner=1)
        cut = length_notes(labelled, self.whole)
        for number, fold in enumerate(self.folds, start=1):
            fold.notes.extend([*class_notes(fold), *cut])
            self._check(fold, "after long sequences are cut: " if cut else "")
            for place, division in enumerate(self._inner(fold), start=1):
                self._check(division, f"fold {number}, inner fold {place}: ")

    def known(self) -> list[str]:
        """The notes of a run that is not trained yet."""
        return _joined_notes([[*self.notes, *fold.notes] for fold in self.folds])

    def _inner(self, fold: Labelled) -> list[Labelled]:
        """The divisions of a fold on which layer or learning rate is chosen; none if the split is not nested."""
        return inner_folds(fold, self.how.inner, self.settings.seed) if self.how.inner > 1 else []

    def _check(self, divided: Labelled, where: str) -> None:
        """Refuse parts that teach nothing, or that nothing can be chosen on."""
        kept = self.whole.split(divided).labelled
        check_training(kept, where)
        for part in ("train", "validation"):
            if not kept.part(part).all_targets().known().any():
                place = ", ".join(self.settings.data)
                raise DataError(f"{place}: {where}no labelled example in the {part} part; choose another --split")

    def __call__(self) -> Finished:
        target = self.work / "complete"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        count = len(self.folds)
        finished = [self._fold(fold, number, count) for number, fold in enumerate(self.folds)]
        result = finished[0] if count == 1 else self._joined(finished)
        write_report(target / "data", self.rows)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        run: dict[str, Any] = {"settings": self.settings.shown(), "identity": self.identity}
        run |= {"model": self.loaded.circumstances(), "notes": result.measured.notes}
        run[WRITTEN] = {str(path.relative_to(target)): measured(path) for path in files}
        text = yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
        (target / RUN).write_text(text, encoding="utf-8")
        write_pages(target)
        return result

    def _fold(self, fold: Labelled, number: int, folds: int) -> Finished:
        """Train, calibrate and measure one split of the data."""
        name = "run" if folds == 1 else f"fold-{number + 1}"
        whole = self.work / "complete"
        folder = whole / ("" if folds == 1 else name)
        folder.mkdir(exist_ok=True)
        inner = [self.whole.split(division) for division in self._inner(fold)]
        trainer = Trainer(self.settings, self.loaded, self.work, name, self.identity, self.progress, inner)
        fitted = fit_predictor(trainer, self.whole.split(fold))
        fitted.save(folder)
        best, calibrated = fitted.best, fitted.calibration
        measured = measure_member(folder, trainer, fitted.members, best, calibrated)
        measured.notes = [*self.notes, *fold.notes, *best.notes, *calibrated.notes, *measured.notes]
        return_freed_memory()
        output = self.settings.output
        return Finished(output, fitted.predictor, measured, (output / folder.relative_to(whole),))

    def _joined(self, folds: list[Finished]) -> Finished:
        """The means over all folds, each of which is in a folder of its own."""
        together = _with_folds([fold.measured.metrics for fold in folds])
        write_table(self.work / "complete" / "metrics.tsv", together)
        keys = ["part", "method", "number"]
        values = together.group_by(keys, use_threads=False).aggregate(
            [("value", how) for how in ("mean", "min", "max")]
        )
        notes = _joined_notes([fold.measured.notes for fold in folds])
        notes.append(
            f"numbers are means over {len(folds)} folds, with the lowest and the highest; fold-N is a predictor"
        )
        if choices := [fold.measured.choices for fold in folds if fold.measured.choices is not None]:
            table = _with_folds(choices)
            write_table(self.work / "complete" / "choices.tsv", table)
            notes.append(_chosen(table, self.how.inner))
        examples = sum(fold.measured.examples for fold in folds)
        metrics = values.rename_columns([*keys, "value", "low", "high"])
        part = folds[0].measured.part
        folders = tuple(folder for fold in folds for folder in fold.folders)
        measured = Measurements(part, examples, metrics, notes=notes)
        return Finished(self.settings.output, folds[0].predictor, measured, folders)


def _with_folds(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables of all folds as one, with a column ``fold``."""
    numbered = [table.append_column("fold", pa.array([n] * len(table))) for n, table in enumerate(tables, start=1)]
    return pa.concat_tables(numbered, promote_options="permissive")


def _chosen(choices: pa.Table, inner: int) -> str:
    rows = [row for row in choices.to_pylist() if row["chosen"]]
    found = ", ".join(f"{row['choice']} {row['candidate']:g} in fold {row['fold']}" for row in rows)
    return f"chosen by the mean {rows[0]['number']} over {inner} inner folds: {found}; choices.tsv has all candidates"
