"""A choice between layers or learning rates by their numbers on the inner folds of a nested split.

``choices.tsv`` holds a row for each candidate: its mean number (``SELECTED``) and mean loss, the number of each inner
fold, and whether it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from protea.finetune.probe import rank
from protea.finetune.tasks import Floats

C = TypeVar("C", int, float)


@dataclass(frozen=True)
class Choice(Generic[C]):
    """``what`` is chosen (layer or lr), the candidates, and ``[candidates, inner folds, 2]``: number and loss."""

    what: str
    candidates: Sequence[C]
    scores: Floats

    @property
    def best(self) -> C:
        """The first candidate with the highest mean number; of equal ones, with the least mean loss."""
        means = self.scores.mean(1).tolist()
        return max(zip(self.candidates, means, strict=True), key=lambda one: rank(*one[1]))[0]

    def table(self, number: str) -> pa.Table:
        """``choices.tsv``; ``number`` is the name of the task's."""
        mean, loss = self.scores.mean(1).T.tolist()
        columns = {"choice": [self.what] * len(mean), "candidate": self.candidates, "number": [number] * len(mean)}
        columns |= {"mean": mean, "loss": loss}
        columns |= {f"inner_{fold + 1}": of_fold.tolist() for fold, of_fold in enumerate(self.scores[:, :, 0].T)}
        columns["chosen"] = [candidate == self.best for candidate in self.candidates]
        return pa.table({name: np.asarray(column) for name, column in columns.items()})
