"""Stops a run at the first loss that is not a finite number, and lists the records of that step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protea.data.loader import TrainingBatch
from protea.data.sampler import Sampler
from protea.errors import TrainingError
from protea.train.model import Trainable
from protea.train.recipe import RunSettings

_IDS_SHOWN: Final = 3

_MAX_OVERFLOWS: Final = 50
"""Steps in a row whose float16 gradients may overflow; lowering the loss scale further would not help."""


class _Step(NamedTuple):
    step: int
    places: list[tuple[int, NDArray[np.int64]]]
    loss_and_norm: Tensor


class DivergenceGuard:
    """Checks losses, gradient norms and weights. ``folder`` is the run's; the sampler knows the records of a pack."""

    def __init__(self, run: RunSettings, folder: Path, sampler: Sampler) -> None:
        self._run, self._folder, self._sampler = run, folder, sampler
        self._waiting: deque[_Step] = deque()
        self._last: _Step | None = None
        self._overflows = 0

    def add(self, step: int, packs: Sequence[TrainingBatch], loss: Tensor, norm: Tensor) -> None:
        """Add a step to be checked; on a GPU its results may not be computed yet."""
        places = [(pack.epoch, pack.index) for pack in packs]
        self._waiting.append(_Step(step, places, torch.stack((loss, norm))))

    def check(self) -> None:
        """Check the steps added since the last call; waits for their results.

        Raises:
            TrainingError: a loss is not finite or too large, or a gradient is not finite; names step and records.
        """
        while self._waiting:
            step = self._last = self._waiting.popleft()
            loss, norm = step.loss_and_norm.tolist()
            if not math.isfinite(loss) or loss > self._run.max_loss:
                raise self._error(step, f"the loss is {loss:g}")
            # Scaled float16 gradients overflow from time to time; the scaler then skips the step.
            self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
            if self._overflows > (_MAX_OVERFLOWS if self._run.precision == "fp16-mixed" else 0):
                raise self._error(step, f"the norm of the gradient is {norm:g}")

    def settle(self, trainable: Trainable) -> None:
        """Check all steps, and the weights and moments, before they are validated or saved.

        Raises:
            TrainingError: a loss, gradient, weight or moment is not finite; names step and records.
        """
        self.check()
        if self._last is None:
            return
        tensors = [parameter.detach() for parameter in trainable.model.parameters()]
        tensors += [tensor for _, tensor in trainable.optimizers.state()]
        if not math.isfinite(nn.utils.get_total_norm(tensors).item()):
            raise self._error(self._last, "weights or moments are not finite after it")

    def _error(self, step: _Step, problem: str) -> TrainingError:
        path = self._folder / f"step-{step.step:09d}-records.tsv"
        ids: list[str] = []
        rows = ["id\tfirst\tresidues"]
        for epoch, index in step.places:
            draws = self._sampler.draw(epoch, index)
            names = self._sampler.split.ids(draws.sequence)
            ids += names
            used = zip(names, draws.offset, draws.residues, strict=True)
            rows += [f"{name}\t{offset + 1}\t{residues}" for name, offset, residues in used]
        try:
            path.write_text("\n".join([*rows, ""]), encoding="utf-8")
            listed = f"are listed in {path}"
        except OSError as error:
            listed = f"could not be listed in {path}: {error.strerror or error}"
        return TrainingError(
            f"step {step.step:,}: {problem}; its {len(ids):,} records ({', '.join(ids[:_IDS_SHOWN])}, ...) {listed}. "
            "Checkpoints of earlier steps are kept: continue from the newest with --accept-changes and a lower "
            f"optimizer.lr or optimizer.clip; run.max_loss is {self._run.max_loss:g}"
        )
