"""``protea predict``: a predictor's predictions for sequences, streamed and resumable as embeddings are.

``prediction_columns.py`` lists the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protea.embed.embeddings import Embedding
from protea.embed.run import EmbedRun
from protea.embed.settings import EmbedSettings
from protea.embed.stores import ArrayLayout
from protea.embed.survey import Totals
from protea.errors import UsageError
from protea.finetune.foreign import is_foreign, read_foreign
from protea.finetune.heads import RESIDUES
from protea.finetune.pair_predictions import predict_pairs
from protea.finetune.prediction_columns import columns, rows, uncalibrated
from protea.finetune.prediction_store import SUFFIXES, PredictionTable, check_names
from protea.finetune.predictor import FILE, Predictor, predictor_files, read_predictor, with_encoder
from protea.infer.loading import ModelLoader
from protea.infer.runner import Runner
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.progress import SILENT, Progress
from protea.settings_errors import validate


@dataclass(frozen=True)
class PredictionOutput(PredictionTable):
    """The table that a predictor writes."""

    predictor: Predictor = field(kw_only=True)

    def arrays(self, embedding: Embedding) -> dict[str, Any]:
        """The rows of a record."""
        return rows(self.predictor, embedding)

    def bytes_for(self, totals: Totals) -> int:
        """Bytes of disk, at least."""
        count = totals.residues if self.predictor.task.unit == "residue" else totals.embedded
        return count * len(self.schema) * 4


def predict(
    folder: Path,
    values: Mapping[str, Any],
    *,
    load: ModelLoader,
    base: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
    make_runner: Callable[[Encoder, int], Runner] = Runner,
) -> tuple[Totals, bool]:
    """Predict the sequences of FASTA files or tables, or the pairs of tables.

    Returns the counts of the whole run, and whether there was nothing to do.

    Args:
        folder: of the predictor, or of a model of others (``foreign.py``).
        values: options as for ``EmbedSettings``: inputs, sequences (the output), and policies, which are by default
            the predictor's.
        load: loads the base model.
        base: its name, if it is not where it was.
        overwrite: replace an existing output.
        progress: counts residues.
        make_runner: makes what computes, from a model and a token budget.
    """
    predictor = read_foreign(folder, load, base) if is_foreign(folder) else read_predictor(folder)
    whole = Path(values["sequences"])
    kind = SUFFIXES.get(whole.suffix)
    if kind is None:
        raise UsageError(f"-o {whole}: unknown suffix {whole.suffix!r}; use {', '.join(SUFFIXES)}")
    check_names(whole, kind, columns(predictor).names)
    if note := uncalibrated(predictor):
        progress.note(f"{folder}: {note}")
    options = {
        **values,
        "model": str(folder),
        "layers": [predictor.layer],
        "pool": [name for name in predictor.kinds if name != RESIDUES],
    }
    trained = {"long": predictor.long, "unknown": predictor.unknown, "gaps": predictor.gaps}
    settings = validate(EmbedSettings, trained | options, "options", noun="option")
    if predictor.encoder is None:
        predictor = with_encoder(predictor, folder, load, base)
    encoder = predictor.encoder
    assert encoder is not None
    _check_alphabet(predictor, folder)
    files = {
        path.name: sha256(path)
        for path in predictor_files(folder)
        if path.suffix == ".safetensors" or path.name == FILE
    }
    if predictor.task.unit == "pair":
        return predict_pairs(predictor, settings, kind, files | predictor.base.files, overwrite, progress)
    output = whole if settings.shard is None else settings.shard.output(whole)
    layout = ArrayLayout(predictor.kinds, (predictor.layer,), encoder.config.hidden_size, "float32")
    outputs = [PredictionOutput(output, kind, layout, columns(predictor), predictor=predictor)]
    run = EmbedRun(
        settings,
        encoder,
        files | predictor.base.files,
        overwrite=overwrite,
        progress=progress,
        outputs=outputs,
        command="predict",
        make_runner=make_runner,
    )
    return run(), run.was_complete


def _check_alphabet(predictor: Predictor, folder: Path) -> None:
    assert predictor.encoder is not None
    if predictor.encoder.alphabet.residues != predictor.base.letters:
        raise UsageError(
            f"{folder}: its head was trained with the letters {predictor.base.letters}, this model has "
            f"{predictor.encoder.alphabet.residues}; name the right base with -m"
        )
