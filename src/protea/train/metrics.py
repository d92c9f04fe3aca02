"""What a run tells of itself: losses, speed, utilisation, memory.

Every number is defined in ``docs/pretraining.md``.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from protea.data.loader import TrainingBatch
from protea.train.estimate import flops_per_token
from protea.train.recipe import Log
from protea.train.resume import TrainingState
from protea.train.sinks import Sink
from protea.train.trained import Trained
from protea.train.watcher import Watcher

_PEAK_TFLOPS: Final = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "L4": 121,
    "L40S": 362,
    "A10G": 70,
    "B200": 2250,
}
"""Dense bfloat16 products by NVIDIA's data sheets; a device's name is looked through for these."""

_SIDE: Final = 1024
_MEASURED_SECONDS: Final = 0.5


class Logbook:
    """What a run tells of itself, and what it must count for that.

    Args:
        sinks: where it goes; closed with the logbook.
        log: says how often.
        trained: what is trained.
        steps: of the run.
        pack: tokens that a pack has room for.
        watcher: told the same as the files.
    """

    def __init__(
        self, sinks: Sequence[Sink], log: Log, trained: Trained, *, steps: int, pack: int, watcher: Watcher
    ) -> None:
        self._sinks, self._every, self._steps, self._pack, self._watcher = sinks, log.every, steps, pack, watcher
        self._config, self._device = trained.model.config, trained.model.device
        self._scaler = trained.precision.scaler
        self._peak = peak_flops(log, self._device, trained.precision.dtype)
        self._failing = False
        self._padding = 0.0
        self._reset()

    def due(self, step: int) -> bool:
        """Whether a step's metrics are told."""
        return step % self._every == 0 or step == self._steps

    def count(self, packs: Sequence[TrainingBatch], predicted: int) -> None:
        """A step was computed, in which so many tokens were predicted."""
        before = self._tokens
        for pack in packs:
            lengths = pack.inputs.cu_seqlens.host_offsets.diff().long()
            self._tokens += int(lengths.sum())
            self._squares += int(lengths.square().sum())
        self._predicted += predicted
        self._padding = 1 - (self._tokens - before) / (len(packs) * self._pack)

    def step(self, progress: TrainingState, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Tell a step's metrics; reads them from the device."""
        nats = loss.item()
        values = {
            "loss": nats,
            "perplexity": _exp(nats),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
            "epoch": progress.position.epoch,
            "tokens": progress.tokens,
            "padding": self._padding,
            **self._rates(),
            "peak_memory": peak_memory(self._device),
        }
        if self._scaler.is_enabled():
            values["loss_scale"] = self._scaler.get_scale()
        self._tell(progress.step, values)

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Tell the result of a validation, whose time is none of training."""
        self._began += seconds
        self._tell(step, {"validation_loss": loss, "validation_perplexity": _exp(loss)})

    def close(self) -> None:
        """Write what is waiting."""
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                self._watcher.note(f"the last metrics could not be written: {error.strerror or error}")

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        failures = []
        for sink in self._sinks:
            try:
                sink.write(step, values)
            except OSError as error:
                failures.append(error.strerror or str(error))
        if failures and not self._failing:
            self._watcher.note(f"metrics cannot be written: {failures[0]}; they are kept until they can")
        self._failing = bool(failures)
        self._watcher.log(step, values)

    def _rates(self) -> dict[str, float]:
        """Since they were last told."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        tokens = max(self._tokens, 1)
        values = {"tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            flops = flops_per_token(self._config, self._squares / tokens, self._predicted / tokens)
            values["utilisation"] = self._tokens * flops / seconds / self._peak
        self._reset()
        return values

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._tokens = self._squares = self._predicted = 0


def peak_flops(log: Log, device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that the device multiplies matrices with.

    A CPU's is measured, for half a second, on square matrices of a million numbers; a GPU's is looked up by name, for
    bfloat16; unknown ones have none.
    """
    if log.peak_tflops is not None:
        return log.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [tflops for part, tflops in _PEAK_TFLOPS.items() if part in name.replace("-", " ").split()]
        return known[0] * 1e12 if known else None
    a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    end = time.perf_counter() + _MEASURED_SECONDS
    while (began := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * _SIDE**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes used so far: by tensors on a GPU, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _exp(nats: float) -> float:
    """Infinite where a float cannot hold it."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
