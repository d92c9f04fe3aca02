"""``protea finetune``: from labelled sequences to a predictor in its folder, measured beside baselines.

The order never changes: split, calibration part, training on train, choices on validation, calibration, baselines, and
at last, once, the test part. A killed run continues from ``.RUN.partial``; the folder RUN appears when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import yaml

from protea.device import return_freed_memory
from protea.errors import DataError, FinishedError, OutputError, ResumeError, UsageError
from protea.finetune import baselines, evaluation
from protea.finetune.calibration import Calibration, calibrate
from protea.finetune.distances import Reference
from protea.finetune.evaluation import OURS
from protea.finetune.examples import Prepared, prepare
from protea.finetune.heads import RESIDUES
from protea.finetune.likeness import clusters, nearest
from protea.finetune.measures import measure, reliability
from protea.finetune.members import Member, Trainer
from protea.finetune.predictor import ADAPTER, Base, Predictor, save_encoder
from protea.finetune.reading import DataFiles, read_labelled
from protea.finetune.settings import FinetuneSettings
from protea.finetune.splits import Split, calibration, split
from protea.finetune.tasks import Floats, Ints, Labelled, Part
from protea.infer.loading import LoadedModel, ModelLoader
from protea.journal import REFUSED, WorkFolder, check_same, complete, differences, leaves
from protea.output import check_output, fingerprint, put_in_place, write_report
from protea.progress import SILENT, Progress
from protea.tables import write_table

RUN: Final = "run.yaml"
_INPUT: Final = "input"
_NAMES_ONLY: Final = ("data", "output", "labels", "mask", "model")
"""Settings that name files, whose contents are compared instead."""
_LEAST: Final = 20
"""Examples of the validation part that are not used for calibration, at least; and clusters to resample, at least."""
_FAMILY: Final = 0.3
"""Identity above which test proteins are drawn together in a bootstrap."""


@dataclass
class Finished:
    """What a run found: the methods' numbers on the test part (or validation without one), and what to tell."""

    output: Path
    predictor: Predictor
    part: Part
    examples: int
    metrics: pa.Table
    comparison: pa.Table | None
    notes: list[str] = field(default_factory=list)


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
        check_same(output, leaves(_recorded(output)), leaves(wanted), REFUSED)
        raise FinishedError(complete(output))
    with WorkFolder(output) as work:
        _continue(work, wanted, overwrite=overwrite, progress=progress)
        with _explained(output):
            finished = _Run(settings, loaded, work.path, wanted, progress)()
        put_in_place(work.path / "complete", output)
        work.remove()
    return finished


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / RUN).is_file() or not any(path.iterdir()))


def _identity(settings: FinetuneSettings, loaded: LoadedModel) -> dict[str, Any]:
    """All that a run depends on, as plain values."""
    shown = {name: value for name, value in settings.shown().items() if name not in _NAMES_ONLY}
    files = [*settings.data, *(str(path) for path in (settings.labels, settings.mask) if path is not None)]
    weights = sorted(loaded.weights_sha256().values())
    return {**shown, "weights": weights, _INPUT: fingerprint(files) or list(settings.data)}


def _recorded(output: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load((output / RUN).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise OutputError(f"{output}: its {RUN} is missing or damaged; {REFUSED}") from error


def _continue(work: WorkFolder, wanted: dict[str, Any], *, overwrite: bool, progress: Progress) -> None:
    """Check that an unfinished run is the same, or begin a new one."""
    old = None if overwrite else work.read()
    if old is None:
        work.clear()
        work.commit({"identity": wanted})
        return
    if changed := differences(leaves(old["identity"]), leaves(wanted)):
        raise ResumeError(
            f"{work.output}: an unfinished run has other settings ({changed}); use those, or pass --overwrite to start "
            "again"
        )
    progress.note(f"continuing an unfinished run of {work.output}")


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or output}: cannot be read or written: {error.strerror or error}; the same command "
            "continues the run"
        ) from error


@dataclass
class _Run:
    settings: FinetuneSettings
    loaded: LoadedModel
    work: Path
    identity: dict[str, Any]
    progress: Progress

    def __call__(self) -> Finished:
        settings = self.settings
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
        rows = list(labelled.rows)
        self.notes = list(labelled.notes)
        folds = split(labelled, Split.parse(settings.split), settings.seed, self.progress)
        folds = [calibration(fold, settings.calibration, settings.seed, _LEAST) for fold in folds]
        whole = prepare(labelled, self.loaded.module, settings.long, rows)
        if labelled.task.unit == "residue" and any(row.what == "truncated" for row in rows):
            self.notes.append("labels beyond the residues that are kept are left out: see report.tsv")
        target = self.work / "complete"
        target.mkdir(exist_ok=True)
        finished = [self._fold(whole.split(fold), fold.notes, number, len(folds)) for number, fold in enumerate(folds)]
        result = finished[0] if len(folds) == 1 else self._joined(finished)
        write_report(target / "x", rows)
        (target / "x.report.tsv").replace(target / "report.tsv")
        run = {"settings": settings.shown(), "identity": self.identity, "model": self.loaded.circumstances()}
        (target / RUN).write_text(yaml.safe_dump(run | {"notes": result.notes}, sort_keys=False), encoding="utf-8")
        return result

    def _fold(self, prepared: Prepared, notes: list[str], number: int, folds: int) -> Finished:
        """Train, calibrate and measure one split of the data."""
        data = prepared.labelled
        for part in ("train", "validation"):
            if not data.part(part).all_targets().known().any():
                raise DataError(f"{', '.join(self.settings.data)}: no labelled example in the {part} part; see --split")
        name = "run" if folds == 1 else f"fold-{number + 1}"
        folder = self.work / "complete" / ("" if folds == 1 else name)
        folder.mkdir(exist_ok=True)
        trainer = Trainer(self.settings, self.loaded, self.work / name, self.identity, self.progress)
        members = trainer.members(prepared, name)
        best = max(members, key=lambda member: (member.selected, -member.loss))
        calibrated = self._calibrated(best)
        predictor = self._predictor(best, calibrated)
        predictor.save(folder)
        if best.adapter is not None:
            best.adapter.write(folder / ADAPTER, self.loaded.name)
        elif self.settings.method == "full":
            save_encoder(best.encoder, folder)
        part: Part = "test" if len(data.part("test").examples) else "validation"
        told = [*self.notes, *notes, *best.notes, *calibrated.notes]
        if part == "validation":
            told.append("there is no test part: the numbers are of the validation part, which chose the predictor")
        finished = Finished(self.settings.output, predictor, part, 0, pa.table({}), None, told)
        self._measure(folder, trainer, members, best, calibrated, finished)
        return_freed_memory()
        return finished

    def _calibrated(self, best: Member) -> Calibration:
        data = best.prepared.labelled.part("calibration")
        alpha = round(1 - self.settings.coverage, 10)
        if not data.examples:
            return Calibration(data.task, alpha=alpha, notes=("nothing to calibrate with: validation is too small",))
        return calibrate(data.task, best.predictions("calibration"), data.all_targets(), alpha=alpha)

    def _predictor(self, best: Member, calibrated: Calibration) -> Predictor:
        vectors = _mean_vectors(best)
        train, validation = (
            vectors[np.unique(best.prepared.which[best.prepared.places(part)])] for part in ("train", "validation")
        )
        return Predictor(
            head=best.head.eval(),
            classes=best.prepared.labelled.classes,
            layer=best.chosen.layer,
            long=self.settings.long,
            base=Base.of(self.loaded),
            method=self.settings.method,
            calibration=calibrated,
            reference=Reference.of(train, validation, self.settings.seed),
            encoder=best.encoder,
        )

    # --- numbers -------------------------------------------------------------------------------------------------

    def _measure(
        self,
        folder: Path,
        trainer: Trainer,
        members: list[Member],
        best: Member,
        calibrated: Calibration,
        out: Finished,
    ) -> None:
        """Write all tables of one split; the test part is predicted here, and nowhere else."""
        prepared, parts = best.prepared, list(dict.fromkeys(("validation", out.part)))
        data = prepared.labelled
        methods: dict[Part, dict[str, Floats]] = {part: {OURS: best.predictions(part)} for part in parts}
        for name, predictions in self._baselines(trainer, best, parts):
            for part in parts:
                methods[part][name] = predictions[part]
        shown = data.part(out.part)
        out.examples = len(shown.examples)
        groups = self._groups(shown, out)
        resamples = evaluation.resample(shown, methods[out.part], groups, self.settings.seed, self.progress)
        tables = [evaluation.metrics_table(data.part(part), part, methods[part], None) for part in parts[:-1]]
        tables.append(evaluation.metrics_table(shown, out.part, methods[out.part], resamples))
        out.metrics = pa.concat_tables(tables, promote_options="permissive")
        write_table(folder / "metrics.tsv", out.metrics)
        if len(methods[out.part]) > 1:
            out.comparison = evaluation.comparison_table(resamples)
            write_table(folder / "comparison.tsv", out.comparison)
        if out.part == "test":
            self._by_identity(folder, data, methods["test"], out)
        predicted = [evaluation.predictions_table(data.part(part), part, methods[part][OURS]) for part in parts]
        write_table(folder / "predictions.parquet", pa.concat_tables(predicted))
        write_table(folder / "calibration.tsv", _calibration_table(shown, methods[out.part][OURS], calibrated))
        if best.curve:
            columns = zip(*best.curve, strict=True)
            names = ("step", "training_loss", "validation_loss", "validation_number")
            write_table(folder / "curve.tsv", pa.table(dict(zip(names, map(list, columns), strict=True))))
        if best.chosen.losses:
            losses = {"layer": list(best.chosen.losses), "validation_loss": list(best.chosen.losses.values())}
            write_table(folder / "layers.tsv", pa.table(losses))
        if len(members) > 1:
            write_table(folder / "seeds.tsv", _seeds_table(members, shown, out.part))

    def _baselines(self, trainer: Trainer, best: Member, parts: list[Part]) -> Iterator[tuple[str, dict[Part, Floats]]]:
        if not self.settings.baselines:
            return
        data = best.prepared.labelled
        for name, predict in baselines.BASELINES.items():
            self.progress.begin(f"baseline {name}")
            yield name, predict(data, parts)
        others = {"random weights": lambda: trainer.random(best.prepared, best.chosen.layer)}
        if self.settings.method != "frozen":
            others["frozen"] = lambda: trainer.frozen(best.prepared, best.chosen.layer, self.settings.seed)
        for name, fit in others.items():
            member = fit()
            yield name, {part: member.predictions(part) for part in parts}

    def _groups(self, data: Labelled, out: Finished) -> Ints | None:
        """Clusters of a part's examples, where there are enough of them."""
        found = clusters([example.sequences for example in data.examples], _FAMILY, self.progress)
        count = len(np.unique(found))
        if count < _LEAST:
            out.notes.append(f"intervals come from resampled examples: they form only {count} clusters")
            return None
        return found

    def _by_identity(self, folder: Path, data: Labelled, methods: dict[str, Floats], out: Finished) -> None:
        test, train = ([example.sequences for example in data.part(part).examples] for part in ("test", "train"))
        likeness = nearest(test, train, self.progress)
        close = int((likeness.identity > _FAMILY).sum())
        if close:
            out.notes.append(
                f"{close:,} of {len(test):,} test examples are more than {_FAMILY:.0%} identical to a training example "
                f"({likeness.method}; median {np.median(likeness.identity):.0%}): the test part shows how well the "
                "predictor does on such relatives; --split cluster:0.3 tests it on unrelated proteins"
            )
        write_table(
            folder / "by_identity.tsv", evaluation.identity_table(data.part("test"), methods, likeness.identity)
        )

    def _joined(self, finished: list[Finished]) -> Finished:
        """The numbers of all folds: means over folds, each of which is in a folder of its own."""
        tables = [
            table.metrics.append_column("fold", pa.array([n + 1] * len(table.metrics)))
            for n, table in enumerate(finished)
        ]
        together = pa.concat_tables(tables, promote_options="permissive")
        keys = ["part", "method", "number"]
        means = together.group_by(keys, use_threads=False).aggregate(
            [("value", "mean"), ("value", "min"), ("value", "max")]
        )
        means = means.rename_columns([*keys, "value", "low", "high"])
        write_table(self.work / "complete" / "metrics.tsv", together)
        notes = list(dict.fromkeys(note for one in finished for note in one.notes))
        notes.append(
            f"numbers are means of {len(finished)} folds, from the lowest to the highest; each fold is a predictor"
        )
        return Finished(
            self.settings.output,
            finished[0].predictor,
            finished[0].part,
            sum(f.examples for f in finished),
            means,
            None,
            notes,
        )


def _mean_vectors(member: Member) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``[S, D]``: the mean vector of each sequence, or what stands for it, at the layer of the head."""
    features, place = member.chosen.features, member.chosen.place
    if member.head.config.reads != RESIDUES:
        return np.ascontiguousarray(features.values[:, place])
    means = [
        features.values[a:b, place].mean(0) for a, b in zip(features.offsets[:-1], features.offsets[1:], strict=True)
    ]
    return np.stack(means)


def _calibration_table(data: Labelled, predicted: Floats, calibrated: Calibration) -> pa.Table:
    """What calibration does to probabilities, and how often intervals or sets hold the truth, on a part."""
    targets, task = data.all_targets(), data.task
    numbers: dict[str, float] = {"stated_coverage": 1 - calibrated.alpha, "temperature": calibrated.temperature}
    rated = targets.known()
    if task.kind != "value":
        after = calibrated.probabilities(predicted)
        for when, values in (("before", predicted), ("after", after)):
            numbers[f"log_loss_{when}"] = measure(task, values, targets, data.classes)["log_loss"]
            numbers[f"calibration_error_{when}"] = reliability(values, targets).error
    if task.kind == "value":
        ends = calibrated.intervals(predicted)[rated]
        truth = targets.values[rated]
        numbers["coverage"] = float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))) if len(truth) else np.nan
        numbers["interval_width"] = 2 * calibrated.threshold
    elif task.kind == "class":
        inside = calibrated.sets(predicted)[rated]
        truth = targets.values[rated].astype(np.int64)
        numbers["coverage"] = float(inside[np.arange(len(truth)), truth].mean()) if len(truth) else np.nan
        numbers["set_size"] = float(inside.sum(1).mean()) if len(truth) else np.nan
    return pa.table({"number": list(numbers), "value": [float(value) for value in numbers.values()]})


def _seeds_table(members: list[Member], data: Labelled, part: Part) -> pa.Table:
    rows = []
    for member in members:
        found = measure(data.task, member.predictions(part), data.all_targets(), data.classes)
        rows += [(member.seed, part, name, value) for name, value in found.items()]
    columns = map(list, zip(*rows, strict=True))
    return pa.table(dict(zip(("seed", "part", "number", "value"), columns, strict=True)))
