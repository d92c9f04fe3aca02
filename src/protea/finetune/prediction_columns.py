"""The columns of a table of predictions: one row for each sequence or pair, or for each residue that is kept.

    id, position and residue (residue tasks)
    predicted            the class, the value, or the labels of at least probability 0.5
    probability_CLASS    the model's own probability
    calibrated_CLASS     the same at the temperature of the calibration part, if there is one
    set                  the classes that hold the truth as often as the predictor states, joined by ``;``
    low, high            the interval that does so for values
    distance, far        how far the protein is from the training data (``distances.py``)
    truncated_from       length before truncation, for a sequence that was cut

A predictor has the columns of what was calibrated, and no others; without a finite threshold there are no sets and no
intervals. A model of others (``foreign.py``) has no calibration and no training data, so it has none of their columns.

Shapes: R rows of a record, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protea.embed.embeddings import Embedding
from protea.finetune.heads import RESIDUES
from protea.finetune.predictor import Predictor
from protea.finetune.tasks import Floats


def outcomes(predictor: Predictor, embedding: Embedding) -> Floats:
    """Probabilities ``[R, C]`` or values ``[R]`` of one record."""
    reads = predictor.head.config.reads
    states = embedding.residues if reads == RESIDUES else embedding.pooled[reads]
    assert states is not None
    x = torch.from_numpy(states[0] if reads == RESIDUES else states)
    with torch.inference_mode():
        return predictor.head.outcome(predictor.head(x, torch.tensor([len(x)]))).numpy()


def columns(predictor: Predictor) -> pa.Schema:
    """The columns of the table."""
    task, real, text = predictor.task, pa.float64(), pa.string()
    names: list[tuple[str, pa.DataType]] = [("id", text)]
    if task.unit == "residue":
        names += [("position", pa.int64()), ("residue", text)]
    names.append(("predicted", real if task.kind == "value" else text))
    calibration = predictor.calibration
    tempered, bounded = (
        calibration is not None and calibration.tempered,
        calibration is not None and calibration.bounded,
    )
    for what in ("probability", "calibrated")[: 1 + tempered]:
        names += [(f"{what}_{name}", real) for name in predictor.classes]
    if task.kind == "class" and bounded:
        names.append(("set", text))
    elif task.kind == "value" and bounded:
        names += [("low", real), ("high", real)]
    names += [("distance", real), ("far", pa.bool_())] if predictor.reference is not None else []
    return pa.schema([*names, ("truncated_from", pa.int64())])


def uncalibrated(predictor: Predictor) -> str:
    """A note on the columns that a run of ``protea finetune`` could not calibrate; empty if it has all of them."""
    calibration, kind = predictor.calibration, predictor.task.kind
    if calibration is None:
        return ""
    missing = [] if calibration.tempered or kind == "value" else ["calibrated_CLASS"]
    if not calibration.bounded and kind != "labels":
        missing += ["set"] if kind == "class" else ["low", "high"]
    if not missing:
        return ""
    return f"without the columns {', '.join(missing)}: they are not calibrated; the notes of its training say why"


def rows(predictor: Predictor, embedding: Embedding) -> dict[str, Any]:
    """The rows of one record, by column."""
    found = outcomes(predictor, embedding)
    record, count = embedding.encoded.record, len(found)
    table: dict[str, Any] = {"id": [record.id] * count}
    if predictor.task.unit == "residue":
        letters = [_letter(predictor, number) for number in embedding.encoded.ids]
        table |= {"position": np.arange(1, count + 1), "residue": letters}
    table |= predicted_columns(predictor, found)
    if predictor.reference is not None:
        distance = float(predictor.reference.distances(embedding.pooled[predictor.summary])[0])
        table |= {"distance": [distance] * count, "far": [distance > predictor.reference.far] * count}
    return table | {"truncated_from": [embedding.encoded.truncated_from] * count}


def predicted_columns(predictor: Predictor, found: Floats) -> dict[str, Any]:
    """The columns that say what is predicted, and how surely."""
    calibration, classes, kind = predictor.calibration, np.array(predictor.classes, object), predictor.task.kind
    if kind == "value":
        if calibration is None or not calibration.bounded:
            return {"predicted": found}
        ends = calibration.intervals(found)
        return {"predicted": found, "low": ends[:, 0], "high": ends[:, 1]}
    labels = classes[found.argmax(1)] if kind == "class" else [";".join(classes[row >= 0.5]) for row in found]
    table: dict[str, Any] = {"predicted": labels}
    values = {"probability": found}
    if calibration is not None and calibration.tempered:
        values["calibrated"] = calibration.probabilities(found)
    if kind == "class" and calibration is not None and calibration.bounded:
        table["set"] = [";".join(classes[inside]) for inside in calibration.sets(found)]
    for what, numbers in values.items():
        table |= {f"{what}_{name}": numbers[:, place] for place, name in enumerate(predictor.classes)}
    return table


def _letter(predictor: Predictor, number: int) -> str:
    assert predictor.encoder is not None
    return predictor.encoder.alphabet.tokens[number]
