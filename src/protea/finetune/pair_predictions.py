"""``protea predict`` for pairs of sequences, from tables with the columns ``sequence`` and ``sequence_2``.

Each distinct sequence is computed once; a killed run continues from the vectors that it has. Pairs have no distance to
the training data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from protea.embed.outputs import publish, run_error
from protea.embed.settings import PROVENANCE, EmbedSettings
from protea.embed.survey import Totals
from protea.errors import FinishedError
from protea.finetune.examples import prepare
from protea.finetune.features import compute
from protea.finetune.labelled_data import DataFiles, read_pairs
from protea.finetune.prediction_columns import columns, predicted_columns
from protea.finetune.prediction_store import PredictionStore
from protea.finetune.predictor import Predictor
from protea.finetune.tasks import Labelled, LabelledExample
from protea.journal import WorkFolder, read_finished
from protea.letters import ReportRow
from protea.output import check_output, fingerprint, note_what_is_replaced
from protea.progress import Progress
from protea.rerun import INPUT, end_finished
from protea.shards import COMMAND

_BLOCK: Final = 8192


def predict_pairs(
    predictor: Predictor,
    settings: EmbedSettings,
    kind: str,
    files: Mapping[str, str],
    overwrite: bool,
    progress: Progress,
) -> tuple[Totals, bool]:
    """Write the table of all pairs; see ``predictions.predict``."""
    output, encoder = settings.outputs[0], predictor.encoder
    assert encoder is not None
    if settings.shard is not None:
        output = settings.shard.output(output)
    check_output(output, overwrite=True)
    options = {name: value for name, value in settings.shown().items() if name not in ("sequences", "token_budget")}
    wanted = {**options, "model_files": dict(files), "computed_in": encoder.precision}
    wanted[INPUT] = fingerprint(settings.inputs)
    if os.path.lexists(output) and not overwrite:
        recorded = read_finished(output)
        try:
            end_finished(output, {name: value for name, value in recorded.items() if name != PROVENANCE}, wanted)
        except FinishedError as finished:
            progress.note(str(finished))
            return Totals(**recorded[PROVENANCE]["counts"]), True
    note_what_is_replaced(output)
    try:
        with WorkFolder(output) as work:
            if overwrite:
                work.clear()
            totals, rows, store = _computed(predictor, settings, kind, work.path, wanted, progress)
            provenance = {**wanted, PROVENANCE: {"counts": asdict(totals), COMMAND: "predict"}}
            publish(store.finish(provenance), output, rows, provenance)
            work.remove()
    except OSError as error:
        raise run_error(error, output, kept=True) from error
    return totals, False


def _computed(
    predictor: Predictor, settings: EmbedSettings, kind: str, work: Path, identity: dict[str, Any], progress: Progress
) -> tuple[Totals, list[ReportRow], PredictionStore]:
    """The counts, the rows of the report, and the table in the work folder.

    A shard has some neighbouring pairs; what is told about reading is told by the first shard.
    """
    encoder, config = predictor.encoder, predictor.head.config
    assert encoder is not None
    columns_named = {"id_column": settings.id_column, "sequence_column": settings.sequence_column}
    raw = read_pairs(
        DataFiles(data=settings.inputs, unknown=settings.unknown, gaps=settings.gaps, **columns_named)  # type: ignore[arg-type]
    )
    for note in raw.notes:
        progress.note(note)
    pairs, read = raw.examples, raw.rows
    if settings.shard is not None:
        part = settings.shard.part(np.array([sum(map(len, pair.sequences)) for pair in pairs]))
        pairs, read = pairs[part.start : part.stop], read if settings.shard.number == 1 else []
    examples = [LabelledExample(pair.id, pair.sequences, "", pair.place) for pair in pairs]
    empty = np.empty((1, len(predictor.classes)))
    unlabelled = Labelled(predictor.task, predictor.classes, examples, [empty] * len(examples))
    rows = list(read)
    prepared = prepare(unlabelled, encoder, settings.long, rows)
    features = compute(
        work / "features",
        encoder,
        prepared.sequences,
        reads=config.reads,
        layers=(predictor.layer,),
        identity=identity,
        token_budget=settings.token_budget,
        progress=progress,
    )
    store = PredictionStore(work, kind, columns(predictor), None)
    cut = np.array([record.truncated_from or 0 for record in prepared.sequences])
    for start in range(0, len(examples), _BLOCK):
        which = prepared.which[start : start + _BLOCK]
        x, lengths = features.of(which.reshape(-1))
        with torch.inference_mode():
            found = predictor.head.outcome(predictor.head(x, lengths)).numpy()
        longest = cut[which].max(1)
        table = {"id": [example.id for example in examples[start : start + _BLOCK]]}
        table |= predicted_columns(predictor, found)
        store.write(None, table | {"truncated_from": [int(length) or None for length in longest]})
        store.commit()
    totals = Totals(
        records=len(examples) + sum(row.what == "skipped" for row in read),
        embedded=len(examples),
        residues=sum(len(prepared.sequences[number].ids) for number in prepared.which.reshape(-1)),
        **{what: sum(row.what == what for row in rows) for what in ("skipped", "truncated", "windowed", "altered")},
    )
    return totals, rows, store
