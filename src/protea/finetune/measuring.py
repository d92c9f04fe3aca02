"""The tables of one trained predictor: its numbers beside those of baselines, on validation and test.

The test part is predicted here, and nowhere else. Files, beside those of ``evaluation.py``:

``choices.tsv``      the candidates of a nested split, by their numbers on the inner folds (``choices.py``).
``calibration.tsv``  probabilities before and after temperature; how often intervals or sets hold the truth.
``baselines/``       a predictor for each baseline with a model: random weights, and for LoRA and full the frozen model.
``curve.tsv``        the learning curve, where a head was trained.
``layers.tsv``       the loss of every layer, where the layer was chosen.
``parts.tsv``        how many examples, and labelled rows, each part has.
``classes.tsv``      how many labelled rows of each class, or with each label, each part has.
``seeds.tsv``        the numbers of each seed, where there are several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from protea.finetune import baselines, evaluation
from protea.finetune.calibration import Calibration
from protea.finetune.class_counts import class_table
from protea.finetune.evaluation import OURS
from protea.finetune.fitting import predictor_of
from protea.finetune.likeness import clusters, leak, nearest
from protea.finetune.measures import SELECTED, measure, reliability
from protea.finetune.members import Member, Trainer
from protea.finetune.predictor import baseline_folder
from protea.finetune.tasks import PARTS, Floats, Ints, Labelled, Part
from protea.progress import Progress
from protea.tables import write_table

_LEAST: Final = 20
"""Clusters to resample, at least."""
_FAMILY: Final = 0.3
"""Identity above which test proteins are drawn together in a bootstrap, and called relatives of training proteins."""
RANDOM: Final = "random weights"
FROZEN: Final = "frozen"
"""The baselines with a model."""
_CURVE: Final = ("step", "training_loss", "validation_loss", "validation_number")


@dataclass
class Measurements:
    """The numbers of all methods; ``part`` is test, or validation where there is no test part.

    ``metrics`` and ``comparison`` are the tables of ``evaluation.py``, ``choices`` is that of ``choices.py``; ``notes``
    are for the user.
    """

    part: Part
    examples: int
    metrics: pa.Table
    comparison: pa.Table | None = None
    choices: pa.Table | None = None
    notes: list[str] = field(default_factory=list)


def measure_member(
    folder: Path, trainer: Trainer, members: Sequence[Member], best: Member, calibrated: Calibration
) -> Measurements:
    """Write all tables of one split of the data into a folder."""
    data = best.prepared.labelled
    part: Part = "test" if data.part("test").examples else "validation"
    parts: list[Part] = ["validation", "test"] if part == "test" else ["validation"]
    methods: dict[Part, dict[str, Floats]] = {part: {OURS: best.predictions(part)} for part in parts}
    for name, predictions in _baselines(folder, trainer, best, parts):
        for of_part in parts:
            methods[of_part][name] = predictions[of_part]
    shown = data.part(part)
    notes: list[str] = []
    if part == "validation":
        notes.append("there is no test part: the numbers are of the validation part, which chose the predictor")
    elif not shown.all_targets().known().any():
        notes.append("the test part has no labels, so it has predictions but no numbers")
    groups = families(shown, part, notes, trainer.progress)
    resamples = evaluation.resample(shown, methods[part], groups, trainer.settings.seed, trainer.progress)
    tables = [evaluation.metrics_table(data.part(other), other, methods[other], None) for other in parts[:-1]]
    tables.append(evaluation.metrics_table(shown, part, methods[part], resamples))
    found = Measurements(part, len(shown.examples), pa.concat_tables(tables, promote_options="permissive"), notes=notes)
    write_table(folder / "metrics.tsv", found.metrics)
    if len(methods[part]) > 1:
        found.comparison = evaluation.comparison_table(resamples)
        write_table(folder / "comparison.tsv", found.comparison)
    if part == "test":
        _by_identity(folder, data, methods[part], notes, trainer)
    predicted = [evaluation.predictions_table(data.part(other), other, methods[other][OURS]) for other in parts]
    write_table(folder / "predictions.parquet", pa.concat_tables(predicted))
    write_table(folder / "calibration.tsv", calibration_table(shown, methods[part][OURS], calibrated))
    if best.curve:
        write_table(folder / "curve.tsv", pa.table([list(column) for column in zip(*best.curve, strict=True)], _CURVE))
    if best.chosen.losses:
        losses = {"layer": list(best.chosen.losses), "validation_loss": list(best.chosen.losses.values())}
        write_table(folder / "layers.tsv", pa.table(losses))
    if best.choice is not None:
        found.choices = best.choice.table(SELECTED[data.task.name][0])
        write_table(folder / "choices.tsv", found.choices)
    write_table(folder / "parts.tsv", _parts_table(data))
    if data.classes:
        write_table(folder / "classes.tsv", class_table(data))
    if len(members) > 1:
        write_table(folder / "seeds.tsv", _seeds_table(members, shown, part))
    return found


def _baselines(
    folder: Path, trainer: Trainer, best: Member, parts: list[Part]
) -> Iterator[tuple[str, dict[Part, Floats]]]:
    """Each baseline's name and its predictions of the parts; those with a model are kept in the folder."""
    if not trainer.settings.baselines:
        return
    data = best.prepared.labelled
    for name, predict in baselines.BASELINES.items():
        trainer.progress.begin(f"baseline {name}")
        yield name, predict(data, parts)
    members = {RANDOM: trainer.random(best.prepared, best.chosen.layer)}
    if trainer.settings.method != "frozen":
        (members[FROZEN],) = trainer.frozen(best.prepared, best.chosen.layer, [trainer.settings.seed])
    for name, member in members.items():
        predictor = replace(predictor_of(trainer, member), random_seed=member.seed if name == RANDOM else None)
        (place := baseline_folder(folder, name)).mkdir(parents=True)
        predictor.save(place)
        yield name, {part: member.predictions(part) for part in parts}


def families(data: Labelled, part: Part, notes: list[str], progress: Progress) -> Ints | None:
    """Clusters ``[N]`` of a part's examples, to be drawn whole; ``None``, with a note, if they are too few."""
    found = clusters([example.sequences for example in data.examples], _FAMILY, progress)
    count = len(np.unique(found))
    if count < _LEAST:
        notes.append(
            f"the {part} examples are of {count} {'family' if count == 1 else 'families'}, too few to draw whole "
            "families, so intervals draw single examples and say nothing about other families"
        )
        return None
    return found


def _by_identity(folder: Path, data: Labelled, methods: dict[str, Floats], notes: list[str], trainer: Trainer) -> None:
    test, train = ([example.sequences for example in data.part(part).examples] for part in ("test", "train"))
    likeness = nearest(test, train, trainer.progress)
    notes.append(leak(likeness, _FAMILY))
    write_table(folder / "by_identity.tsv", evaluation.identity_table(data.part("test"), methods, likeness.identity))


def calibration_table(data: Labelled, predicted: Floats, calibrated: Calibration) -> pa.Table:
    """The effect of calibration on probabilities, and how often intervals or sets hold the truth, on a part.

    What was not calibrated has no numbers.
    """
    targets, task = data.all_targets(), data.task
    numbers: dict[str, float] = {"stated_coverage": 1 - calibrated.alpha} if calibrated.bounded else {}
    rated = targets.known()
    if task.kind != "value":
        values_at = {"before": predicted}
        if calibrated.tempered:
            numbers["temperature"] = calibrated.temperature
            values_at["after"] = calibrated.probabilities(predicted)
        for when, values in values_at.items():
            numbers[f"log_loss_{when}"] = measure(task, values, targets, data.classes)["log_loss"]
            numbers[f"calibration_error_{when}"] = reliability(values, targets).error
    if task.kind == "value" and calibrated.bounded:
        ends = calibrated.intervals(predicted)[rated]
        truth = targets.values[rated]
        numbers["coverage"] = float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))) if len(truth) else np.nan
        numbers["interval_width"] = 2 * calibrated.threshold
    elif task.kind == "class" and calibrated.bounded:
        inside = calibrated.sets(predicted)[rated]
        truth = targets.values[rated].astype(np.int64)
        numbers["coverage"] = float(inside[np.arange(len(truth)), truth].mean()) if len(truth) else np.nan
        numbers["set_size"] = float(inside.sum(1).mean()) if len(truth) else np.nan
    schema = pa.schema([("number", pa.string()), ("value", pa.float64())])
    return pa.table([list(numbers), list(map(float, numbers.values()))], schema=schema)


def _parts_table(data: Labelled) -> pa.Table:
    parts = [data.part(name) for name in PARTS]
    labelled = [int(part.all_targets().known().sum()) for part in parts]
    return pa.table({"part": PARTS, "examples": [len(part.examples) for part in parts], "labelled": labelled})


def _seeds_table(members: Sequence[Member], data: Labelled, part: Part) -> pa.Table:
    rows = []
    for member in members:
        found = measure(data.task, member.predictions(part), data.all_targets(), data.classes)
        rows += [(member.seed, part, name, value) for name, value in found.items()]
    columns = map(list, zip(*rows, strict=True))
    return pa.table(dict(zip(("seed", "part", "number", "value"), columns, strict=True)))
