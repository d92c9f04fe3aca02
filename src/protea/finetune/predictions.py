"""``protea predict``: a predictor's predictions for sequences, streamed and resumable as embeddings are.

One row for each sequence, or for each residue that is kept. Columns:

    id, position and residue (residue tasks)
    predicted            the class, the value, or the labels of at least probability 0.5
    probability_CLASS    the model's own probability
    calibrated_CLASS     the same at the temperature of the calibration part
    set                  the classes that hold the truth as often as the predictor states, joined by ``;``
    low, high            the interval that does so for values
    distance, far        how far the protein is from the training data (``distances.py``)
    truncated_from       length before truncation, for a sequence that was cut

Shapes: R rows of a record, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from protea.embed.embeddings import Embedding
from protea.embed.outputs import EmbeddingOutput
from protea.embed.run import EmbedRun
from protea.embed.settings import EmbedSettings
from protea.embed.stores import ArrayLayout, Contents, EmbeddingStore, State
from protea.embed.survey import Totals
from protea.errors import UsageError
from protea.finetune.heads import RESIDUES
from protea.finetune.prediction_store import SUFFIXES, PredictionStore, check_names, provenance_of
from protea.finetune.predictor import FILE, Predictor, read_predictor, with_encoder
from protea.finetune.tasks import Floats
from protea.infer.loading import ModelLoader
from protea.output import WRITTEN, read_run, sha256
from protea.progress import SILENT, Progress


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
    for what in ("probability", "calibrated"):
        names += [(f"{what}_{name}", real) for name in predictor.classes]
    if task.kind == "class":
        names.append(("set", text))
    elif task.kind == "value":
        names += [("low", real), ("high", real)]
    names += [("distance", real), ("far", pa.bool_())] if predictor.reference is not None else []
    return pa.schema([*names, ("truncated_from", pa.int64())])


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
    calibration, classes = predictor.calibration, np.array(predictor.classes, object)
    if predictor.task.kind == "value":
        ends = calibration.intervals(found)
        return {"predicted": found, "low": ends[:, 0], "high": ends[:, 1]}
    calibrated = calibration.probabilities(found)
    table: dict[str, Any] = {}
    if predictor.task.kind == "class":
        table["predicted"] = classes[found.argmax(1)]
        table["set"] = [";".join(classes[inside]) for inside in calibration.sets(found)]
    else:
        table["predicted"] = [";".join(classes[row >= 0.5]) for row in found]
    for what, values in (("probability", found), ("calibrated", calibrated)):
        table |= {f"{what}_{name}": values[:, place] for place, name in enumerate(predictor.classes)}
    return table


def _letter(predictor: Predictor, number: int) -> str:
    assert predictor.encoder is not None
    return predictor.encoder.alphabet.tokens[number]


@dataclass(frozen=True)
class PredictionOutput(EmbeddingOutput):
    """The table of predictions; ``layout`` is that of the embedding that a prediction reads."""

    predictor: Predictor = field(kw_only=True)

    def open(self, folder: Path, state: State | None) -> EmbeddingStore:
        """The store of the table."""
        return PredictionStore(folder, self.kind, columns(self.predictor), state)

    def contents(self) -> Contents:
        """The provenance of the finished table."""
        inside = provenance_of(self.path, self.kind)
        if inside is None:  # a text, which its size alone vouches for
            inside = {name: value for name, value in read_run(self.path).items() if name != WRITTEN}
        return Contents(inside, self.layout, iter(()))

    def arrays(self, embedding: Embedding) -> dict[str, Any]:
        """The rows of a record."""
        return rows(self.predictor, embedding)

    def bytes_for(self, totals: Totals) -> int:
        """Bytes of disk, at least."""
        count = totals.residues if self.predictor.task.unit == "residue" else totals.embedded
        return count * len(columns(self.predictor)) * 4


def predict(
    folder: Path,
    values: Mapping[str, Any],
    *,
    load: ModelLoader,
    base: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> tuple[EmbedRun, Totals]:
    """Predict the sequences of FASTA files or tables.

    Args:
        folder: of the predictor.
        values: options as for ``EmbedSettings``: inputs, sequences (the output), and policies; ``long`` is by default
            the predictor's.
        load: loads the base model.
        base: its name, if it is not where it was.
        overwrite: replace an existing output.
        progress: counts residues.
    """
    predictor = read_predictor(folder)
    output = Path(values["sequences"])
    kind = SUFFIXES.get(output.suffix)
    if kind is None:
        raise UsageError(f"-o {output}: unknown suffix {output.suffix!r}; use {', '.join(SUFFIXES)}")
    if predictor.task.unit == "pair":
        raise UsageError(f"{folder}: predicts pairs; FASTA holds single sequences")
    check_names(output, kind, columns(predictor).names)
    options = {
        **values,
        "model": str(folder),
        "layers": [predictor.layer],
        "pool": [name for name in predictor.kinds if name != RESIDUES],
    }
    settings = EmbedSettings.model_validate({"long": predictor.long, **options})
    predictor = with_encoder(predictor, folder, load, base)
    encoder = predictor.encoder
    assert encoder is not None
    _check_alphabet(predictor, folder)
    files = {
        path.name: sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors",) or path.name == FILE
    }
    layout = ArrayLayout(predictor.kinds, (predictor.layer,), encoder.config.hidden_size, "float32")
    outputs = [PredictionOutput(output, kind, layout, predictor=predictor)]
    run = EmbedRun(
        settings, encoder, files | predictor.base.files, overwrite=overwrite, progress=progress, outputs=outputs
    )
    return run, run()


def _check_alphabet(predictor: Predictor, folder: Path) -> None:
    assert predictor.encoder is not None
    if predictor.encoder.alphabet.residues != predictor.base.letters:
        raise UsageError(
            f"{folder}: its head was trained with the letters {predictor.base.letters}, this model has "
            f"{predictor.encoder.alphabet.residues}; name the right base with -m"
        )
