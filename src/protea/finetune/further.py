"""Further test sets of a finished run: the same predictor beside the same baselines, on data that it was not given.

The run's own test set was measured when it was trained (``measuring.py``). Here, nothing is trained: baselines with a
model are read from the folder of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from protea.errors import DataError
from protea.finetune import baselines, evaluation
from protea.finetune.evaluation import OURS
from protea.finetune.examples import Examples, prepare
from protea.finetune.flip_data import is_made_of
from protea.finetune.frozen import Source
from protea.finetune.measuring import FROZEN, RANDOM, families
from protea.finetune.predictor import baseline_folder, is_predictor, read_predictor, with_encoder
from protea.finetune.probe import predict
from protea.finetune.tasks import MISSING, Floats, Labelled
from protea.infer.loading import ModelLoader
from protea.letters import ReportRow
from protea.output import REPORT_HEADER
from protea.progress import SILENT, Progress
from protea.tables import Beside, read_table, write_table


@dataclass(frozen=True, kw_only=True)
class FurtherSets:
    """Measures a finished run, in ``folder``, on other test sets; ``model`` names its base if it has moved."""

    folder: Path
    load: ModelLoader
    model: str | None = None
    token_budget: int | None = None
    progress: Progress = SILENT

    def numbers(self, path: Path, data: Labelled, made_of: Mapping[str, Any]) -> pa.Table:
        """The numbers of all methods on the test part of ``data``, whose other parts are those of the run.

        The table is kept at ``path``, and made again if it was of other methods or not ``made_of`` the same.
        """
        made_of = {**made_of, "methods": [OURS, *baselines.BASELINES, *self._kept()]}
        if not is_made_of(path, made_of):
            if path.exists():
                self.progress.note(f"{path}: is of other files or methods, and is made again")
            rows: list[ReportRow] = []
            table = self._measured(data, rows)
            write_table(path, table, Beside("\t".join(REPORT_HEADER), rows, made_of))
        return read_table(path)

    def notes(self) -> Iterator[str]:
        """Notes for the user on the methods that were measured."""
        if RANDOM not in self._kept():
            yield f"{self.folder}: an earlier version trained it and kept no baselines with a model; --overwrite does"

    def _kept(self) -> dict[str, Path]:
        """The folders of the baselines with a model."""
        places = {name: baseline_folder(self.folder, name) for name in (RANDOM, FROZEN)}
        return {name: place for name, place in places.items() if is_predictor(place)}

    def _measured(self, data: Labelled, rows: list[ReportRow]) -> pa.Table:
        data, ours = self._predicted(self.folder, data, OURS, rows)
        methods = {OURS: ours}
        for name, baseline in baselines.BASELINES.items():
            self.progress.begin(f"baseline {name}")
            methods[name] = baseline(data, ["test"])["test"]
        for name, place in self._kept().items():
            _, methods[name] = self._predicted(place, data, name, [])
        test = data.part("test")
        notes: list[str] = []
        groups = families(test, "test", notes, self.progress)
        for note in notes:
            self.progress.note(note)
        resamples = evaluation.resample(test, methods, groups, 0, self.progress)
        return evaluation.metrics_table(test, "test", methods, resamples)

    def _predicted(self, folder: Path, data: Labelled, name: str, rows: list[ReportRow]) -> tuple[Labelled, Floats]:
        """The data without labels that are cut off, and the predictions of the test part by one predictor."""
        read = read_predictor(folder)
        predictor = with_encoder(read, folder, self.load, None if read.method == "full" else self.model)
        encoder = predictor.encoder
        assert encoder is not None
        data = prepare(data, encoder, predictor.long, []).labelled
        prepared = prepare(data.part("test"), encoder, predictor.long, rows)
        with TemporaryDirectory(prefix=".further-", dir=self.folder.parent) as place:
            source = Source(encoder, Path(place), "further", {}, self.token_budget, f"embedding, {name}")
            layers = (predictor.layer,)
            features = source.features(prepared, predictor.head.config.reads, layers, "features", self.progress)
            return data, predict(predictor.head, Examples.of(prepared, "test", features))


def with_test(data: Labelled, test: Labelled) -> Labelled:
    """Data with another test part; its classes must be among those of the data."""
    places = {name.replace(".", " "): place for place, name in enumerate(data.classes)}
    if strange := {name.replace(".", " ") for name in test.classes} - places.keys():
        raise DataError(f"{test.examples[0].place}: class {min(strange)}: no such class was trained")
    rest = [place for place, example in enumerate(data.examples) if example.part != "test"]
    kept = data.chosen(rest)
    targets = test.targets
    if data.task.kind == "class":
        numbers = np.array([*(places[name.replace(".", " ")] for name in test.classes), MISSING], np.int64)
        targets = [numbers[target.astype(np.int64)] for target in targets]
    return replace(kept, examples=[*kept.examples, *test.examples], targets=[*kept.targets, *targets])
