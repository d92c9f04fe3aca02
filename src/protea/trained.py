"""The Python interface to predictors that ``protea finetune`` trained: sequences in, arrays or a table out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from protea import sequences as door
from protea.alphabet import Alphabet
from protea.arguments import check, checked
from protea.embed import embeddings
from protea.embed.embeddings import Asked, Embedding
from protea.embed.prepare import EncodedRecord, Long
from protea.errors import UsageError
from protea.finetune.heads import RESIDUES
from protea.finetune.prediction_columns import columns, outcomes, rows
from protea.finetune.predictor import Predictor, read_predictor, with_encoder
from protea.infer.loading import ModelLoader
from protea.language_model import Device, Dtype, ModelName, under_policy
from protea.models.encoder import Encoder
from protea.score.expected import runner_for
from protea.sequences import Given

if TYPE_CHECKING:
    import pyarrow as pa

_Folder = Annotated[Path, "the folder that `protea finetune` wrote"]


@checked
def load_predictor(
    folder: str | Path, *, model: str | Path | None = None, device: Device = "auto", dtype: Dtype = "float32"
) -> TrainedPredictor:
    """Load a predictor with its base model.

    Args:
        folder: of the predictor: what ``protea finetune`` or ``ProteaClassifier.save`` wrote, or a fold of a run.
        model: the base model, if it is not where it was; its weights must be the same. Not for ``--method full``.
        device: as for ``protea.load``.
        dtype: as for ``protea.load``.
    """
    check("folder", folder, _Folder)
    if model is not None:
        check("model", model, ModelName)
    load = ModelLoader(str(device), dtype)
    read = read_predictor(Path(folder))
    return TrainedPredictor(with_encoder(read, Path(folder), load, None if model is None else str(model)))


class TrainedPredictor:
    """A predictor of sequences or residues: its ``task``, its ``classes`` (or labels), and the ``layer`` that it reads.

    ``sequences`` are one sequence, a list, or a mapping of names to sequences, and results come back in the same form
    (``docs/python.md``). ``long`` is the policy for a sequence over the model's limit, by default that of training.
    Both methods give the numbers of ``protea predict``.
    """

    def __init__(self, predictor: Predictor) -> None:
        if predictor.task.unit == "pair":
            raise UsageError("a predictor of pairs predicts no single sequences; its folder has those of its own data")
        self._predictor = predictor
        self.task, self.classes, self.layer = predictor.task.name, predictor.classes, predictor.layer

    def __repr__(self) -> str:
        base = self._predictor.base.name
        return f"<TrainedPredictor: {self.task}, {self._predictor.method}, layer {self.layer} of {base!r}>"

    @checked
    def predict(
        self, sequences: Any, *, calibrated: bool = True, long: Long | None = None, token_budget: int | None = None
    ) -> Any:
        """The value of each sequence, ``[N]``, or probabilities ``[N, C]``, in the order of ``classes``; float64.

        One sequence gives a value, or ``[C]``. For tasks of residues each sequence has an array ``[L]`` or ``[L, C]``,
        and a list of sequences gives a list. ``calibrated`` divides logits by the temperature of the calibration part.
        """
        given = door.read(sequences, self.alphabet)
        calibration, found = self._predictor.calibration, []
        for embedding in self._embeddings(given, long, token_budget):
            outcome = outcomes(self._predictor, embedding)
            if calibrated and outcome.ndim == 2 and calibration is not None:
                outcome = calibration.probabilities(outcome)
            found.append(outcome if self._of_residues else outcome[0])
        if self._of_residues or given.single or given.names is not None:
            return given.in_form(found)
        return np.array(found, np.float64).reshape(len(found), *([len(self.classes)] if self.classes else []))

    @checked
    def table(self, sequences: Any, *, long: Long | None = None, token_budget: int | None = None) -> pa.Table:
        """All columns of ``protea predict`` as a table of pyarrow; ids are the names of a mapping, else numbers from 0.

        ``table.to_pandas()`` and ``polars.from_arrow(table)`` convert it.
        """
        import pyarrow as pa

        given = door.read(sequences, self.alphabet)
        ids = list(map(str, given.names or range(len(given.sequences))))
        schema, batches = columns(self._predictor), []
        for name, embedding in zip(ids, self._embeddings(given, long, token_budget), strict=True):
            record = embedding.encoded.record._replace(id=name)
            named = replace(embedding, encoded=replace(embedding.encoded, record=record))
            batches.append(pa.Table.from_pydict(rows(self._predictor, named), schema))
        return pa.concat_tables(batches) if batches else schema.empty_table()

    @property
    def alphabet(self) -> Alphabet:
        """Residues and their ids."""
        return self._encoder.alphabet

    @property
    def _encoder(self) -> Encoder:
        assert self._predictor.encoder is not None
        return self._predictor.encoder

    @property
    def _of_residues(self) -> bool:
        return self._predictor.task.unit == "residue"

    def _embeddings(self, given: Given, long: Long | None, token_budget: int | None) -> Iterator[Embedding]:
        kinds = self._predictor.kinds
        asked = Asked(
            layers=(self.layer,),
            poolings=tuple(name for name in kinds if name != RESIDUES),
            residues=RESIDUES in kinds,
        )
        long = long or self._predictor.long
        return self._embed(under_policy(given, self._encoder, long), asked, long, token_budget)

    def _embed(
        self, records: list[EncodedRecord], asked: Asked, long: Long, token_budget: int | None
    ) -> Iterator[Embedding]:
        return embeddings.embed(runner_for(self._encoder, token_budget), records, asked)
