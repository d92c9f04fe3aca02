"""Losses looked at without waiting for them: a run stops at the first that is no number, and says of which records."""

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
from protea.train.recipe import RunSettings
from protea.train.trained import Trained

_NAMED: Final = 3

_OVERFLOWS: Final = 50
"""Steps in a row whose float16 gradients overflow: a scale halved so often is not what is wrong."""


class _Step(NamedTuple):
    step: int
    places: list[tuple[int, NDArray[np.int64]]]
    values: Tensor
    arrived: torch.cuda.Event | None


class Suspects:
    """Losses and gradient norms on their way from the device.

    Args:
        run: says which loss is too large, and in what products are computed.
        folder: of the run.
        sampler: tells which records a pack was of.
    """

    def __init__(self, run: RunSettings, folder: Path, sampler: Sampler) -> None:
        self._run, self._folder, self._sampler = run, folder, sampler
        self._waiting: deque[_Step] = deque()
        self._last: _Step | None = None
        self._overflows = 0

    def add(self, step: int, packs: Sequence[TrainingBatch], loss: Tensor, norm: Tensor) -> None:
        """A step was computed, or will have been."""
        values = torch.stack((loss, norm))
        arrived = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append(_Step(step, [(pack.epoch, pack.index) for pack in packs], values, arrived))

    def check(self, *, wait: bool) -> None:
        """Look at what has arrived, or wait for all.

        Raises:
            TrainingError: a loss is no number or too large, or a gradient infinite, naming step and records.
        """
        while self._waiting:
            first = self._waiting[0]
            if first.arrived is not None:
                if not wait and not first.arrived.query():  # type: ignore[no-untyped-call]
                    return
                first.arrived.synchronize()
            self._last = self._waiting.popleft()
            loss, norm = first.values.tolist()
            if not math.isfinite(loss) or loss > self._run.max_loss:
                raise self._error(first, f"the loss is {loss:g}")
            # Scaled float16 gradients overflow now and then; the scaler leaves such steps out.
            self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
            if self._overflows > (_OVERFLOWS if self._run.precision == "fp16-mixed" else 0):
                raise self._error(first, f"the gradient is {norm:g}")

    def settle(self, trained: Trained) -> None:
        """Wait for all, and see that what they led to, which is to be validated or saved, are numbers too.

        Raises:
            TrainingError: a loss, a gradient, a weight or a moment is none, naming step and records.
        """
        self.check(wait=True)
        if self._last is None:
            return
        kept = [each.detach() for each in trained.model.parameters()]
        kept += [each for _, each in trained.optimizers.state()]
        if not math.isfinite(nn.utils.get_total_norm(kept).item()):
            raise self._error(self._last, "it left weights that are no numbers")

    def _error(self, step: _Step, what: str) -> TrainingError:
        path = self._folder / f"step-{step.step:09d}-records.tsv"
        split = self._sampler.split
        lines = ["id\tfirst\tresidues\n"]
        names: list[str] = []
        for epoch, index in step.places:
            draws = self._sampler.draw(epoch, index)
            ids = split.ids(draws.sequence)
            names += ids
            lines += [
                f"{name}\t{first + 1}\t{residues}\n"
                for name, first, residues in zip(ids, draws.offset, draws.residues, strict=True)
            ]
        try:
            path.write_text("".join(lines), encoding="utf-8")
            where = f"are in {path}"
        except OSError as error:
            where = f"could not be listed in {path}: {error.strerror or error}"
        return TrainingError(
            f"step {step.step:,}: {what}; its {len(names):,} records ({', '.join(names[:_NAMED])}, ...) {where}. "
            "The checkpoints before it stay: go on from the newest with --accept-changes and a lower optimizer.lr, "
            f"or optimizer.clip; run.max_loss is {self._run.max_loss:g}"
        )
