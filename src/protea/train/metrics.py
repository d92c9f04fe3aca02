"""The progress and the metrics of a run: losses, speed, utilisation, memory; ``docs/pretraining.md`` defines them."""

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
from protea.progress import Progress
from protea.train.estimate import flops_per_token
from protea.train.model import Trainable
from protea.train.recipe import LogSettings, Recipe
from protea.train.resume import TrainingState
from protea.train.sinks import Sink

_PEAKS: Final = {"A100": 312, "H100": 989, "H200": 989, "H20": 148, "L4": 121, "L40S": 362, "A10G": 70, "B200": 2250}
"""TFLOP/s of dense bfloat16 products by NVIDIA's data sheets, for words in a device's name."""

_SIDE: Final = 1024
_MEASURED_SECONDS: Final = 0.5


class TrainingProgress(Progress):
    """Receives the progress of a training run. This class ignores it and never stops the run; subclasses may."""

    def start(self, costs: Sequence[str], steps: int, done: int) -> None:
        """Training begins after ``done`` of its steps; ``costs`` says in lines of text what it takes."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a step."""

    def stop(self) -> bool:
        """Whether to save a checkpoint and end the run; asked after every pack."""
        return False


class Logbook:
    """Computes the metrics of a run, and passes them to the sinks, which are closed with it, and to the progress."""

    def __init__(self, sinks: Sequence[Sink], recipe: Recipe, trainable: Trainable, progress: TrainingProgress) -> None:
        self._sinks, self._recipe, self._progress = sinks, recipe, progress
        self._config, self._device = trainable.model.config, trainable.model.device
        self._scaler = trainable.precision.scaler
        self._peak = peak_flops(recipe.log, self._device, trainable.precision.dtype)
        self._failing = False
        self._padding = 0.0
        self._reset()

    def due(self, step: int) -> bool:
        """Whether a step's metrics are logged."""
        return step % self._recipe.log.every == 0 or step == self._recipe.run.steps

    def count(self, packs: Sequence[TrainingBatch], predicted: int) -> None:
        """Add one step's tokens to the counters; ``predicted`` of them were masked."""
        before = self._tokens
        for pack in packs:
            lengths = pack.inputs.cu_seqlens.host_offsets.diff().long()
            self._tokens += int(lengths.sum())
            self._squares += int(lengths.square().sum())
        self._predicted += predicted
        self._padding = 1 - (self._tokens - before) / (len(packs) * self._recipe.batch.pack)

    def step(self, state: TrainingState, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Log a step's metrics; this reads them from the device."""
        nats = loss.item()
        values = {
            "loss": nats,
            "perplexity": _exp(nats),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
            "epoch": state.position.epoch,
            "tokens": state.tokens,
            "padding": self._padding,
            **self._rates(),
            "peak_memory": peak_memory(self._device),
        }
        if self._scaler.is_enabled():
            values["loss_scale"] = self._scaler.get_scale()
        self._log(state.step, values)

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Log the result of a validation, whose time does not count as training."""
        self._began += seconds
        self._log(step, {"validation_loss": loss, "validation_perplexity": _exp(loss)})

    def close(self) -> None:
        """Write what is waiting, and close the sinks."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # each sink has errors of its own, and none may end a run
                self._progress.note(f"the last metrics could not be written: {_failure(sink, error)}")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        failures = []
        for sink in self._sinks:
            try:
                sink.write(step, values)
            except Exception as error:
                failures.append(_failure(sink, error))
        if failures and not self._failing:
            self._progress.note(f"metrics cannot be written: {failures[0]}; they are kept until they can be written")
        self._failing = bool(failures)
        self._progress.log(step, values)

    def _rates(self) -> dict[str, float]:
        """Averages since the last call."""
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


def peak_flops(log: LogSettings, device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of the device's matrix products; ``None`` for an unknown GPU.

    A GPU's number is looked up by name, for bfloat16. A CPU's is measured for half a second on large square matrices.
    """
    if log.peak_tflops is not None:
        return log.peak_tflops * 1e12
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        return next((tflops * 1e12 for name, tflops in _PEAKS.items() if name in words), None)
    a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    end = time.perf_counter() + _MEASURED_SECONDS
    while (began := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * _SIDE**3 / best


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes used so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _exp(nats: float) -> float:
    """The exponential; infinite if a float cannot hold it."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _failure(sink: Sink, error: Exception) -> str:
    return f"{sink.name}: {getattr(error, 'strerror', None) or error}"
