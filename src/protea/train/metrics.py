"""What a run tells of itself: a line of JSON at a time, event files for TensorBoard, Weights & Biases if asked for.

Every number is defined in ``docs/pretraining.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from protea.data.loader import TrainingBatch
from protea.errors import MissingExtraError, OutputError, ProteaWarning
from protea.train.estimate import flops_per_token
from protea.train.recipe import Log, Recipe
from protea.train.resume import Progress, Trained
from protea.train.watcher import Watcher

METRICS: Final = "metrics.jsonl"

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


class Sink(Protocol):
    """Somewhere that metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step."""

    def close(self) -> None:
        """No more will come."""


class _Growing:
    """A file that pieces are added to; what a full disk does not take is kept, and goes first the next time."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, piece: bytes) -> None:
        self._waiting += piece
        while self._waiting:
            self._waiting = self._waiting[self._stream.write(self._waiting) :]

    def close(self) -> None:
        try:
            self.write(b"")
        finally:
            self._stream.close()


class JsonLines:
    """``metrics.jsonl``: an object a line, each with its ``step``; what is no number is ``null``.

    Args:
        path: the file.
        progress: lines of later steps, which a killed run left, are dropped; so is that of a validation of this step
            that no checkpoint knows of, since it is repeated.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_past(line, progress)]
        if kept != lines:
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
        self._file = _Growing(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line, and see that it is in the file."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files, a chart a name.

    Written here, without TensorBoard's own thread: that ends with a traceback of its own on a full disk.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = _Growing(folder / name)
        self._records: Any = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # Points after this step, which a killed run left, are not shown.
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each chart."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=points))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **what: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **what).SerializeToString())


class WeightsAndBiases:
    """A run of a project; resumed runs go on in it."""

    def __init__(self, project: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=dict(recipe),
            )
        except Exception as error:  # wandb's errors have no base that older versions share
            raise OutputError(
                f"log.wandb: Weights & Biases cannot begin a run: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or log.wandb=null"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each chart."""
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # training does not end with its charts
            raise OSError(f"Weights & Biases: {error}") from error

    def close(self) -> None:
        """Finish the run."""
        try:
            self._run.finish()
        except Exception as error:
            raise OSError(f"Weights & Biases: {error}") from error


def check_log(log: Log) -> None:
    """See that metrics can go where they are asked for.

    Raises:
        MissingExtraError: Weights & Biases is not installed.
    """
    if log.wandb is not None and find_spec("wandb") is None:
        raise MissingExtraError("log.wandb needs Weights & Biases: pip install wandb")


def _open_sinks(folder: Path, recipe: Recipe, progress: Progress) -> list[Sink]:
    log = recipe.log
    # First what may refuse: nothing is open yet.
    sinks: list[Sink] = []
    if log.wandb is not None:
        sinks.append(WeightsAndBiases(log.wandb, folder, recipe.shown()))
    sinks.append(JsonLines(folder / METRICS, progress))
    if log.tensorboard:
        try:
            sinks.append(TensorBoard(folder / "tensorboard", progress.step))
        except ImportError:
            message = "TensorBoard is not installed, its files are not written: pip install 'protea[train]'"
            warnings.warn(message, ProteaWarning, stacklevel=2)
    return sinks


class Logbook:
    """What a run tells of itself, and what it must count for that.

    Args:
        folder: of the run.
        trained: what is trained.
        progress: from which the run goes on.
        device: where.
        watcher: told the same as the files.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(
        self, folder: Path, trained: Trained, progress: Progress, device: torch.device, watcher: Watcher
    ) -> None:
        recipe = trained.recipe
        self._recipe, self._config, self._device, self._watcher = recipe, trained.model.config, device, watcher
        self._scaler = trained.precision.scaler
        self._peak = peak_flops(recipe.log, device, trained.precision.dtype)
        self._sinks = _open_sinks(folder, recipe, progress)
        self._failing = False
        self._padding = 0.0
        self._reset()

    def due(self, step: int) -> bool:
        """Whether a step's metrics are told."""
        return step % self._recipe.log.every == 0 or step == self._recipe.run.steps

    def count(self, packs: Sequence[TrainingBatch]) -> None:
        """A step was computed."""
        before = self._tokens
        for pack in packs:
            lengths = pack.inputs.cu_seqlens.host_offsets.diff().long()
            self._tokens += int(lengths.sum())
            self._squares += int(lengths.square().sum())
            self._masked += len(pack.rows)
        self._padding = 1 - (self._tokens - before) / (len(packs) * self._recipe.batch.pack)

    def step(self, progress: Progress, loss: Tensor, norm: Tensor, rate: float) -> None:
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
            flops = flops_per_token(self._config, self._squares / tokens, self._masked / tokens)
            values["utilisation"] = self._tokens * flops / seconds / self._peak
        self._reset()
        return values

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._tokens = self._squares = self._masked = 0


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


def _is_past(line: bytes, progress: Progress) -> bool:
    """Whether a line tells what was before; one that a kill cut short does not."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
        step = int(values["step"])
    except (ValueError, KeyError, TypeError):
        return False
    repeated = step == progress.step and progress.validation_loss is None and "validation_loss" in values
    return step <= progress.step and not repeated
