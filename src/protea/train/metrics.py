"""The metrics of a run and where they go; ``docs/pretraining.md`` defines them."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from protea.data.loader import TrainingBatch
from protea.device import native_bfloat16
from protea.errors import OutputError, ProteaWarning
from protea.optional import install
from protea.output import write_durably
from protea.plan.hardware import gpu_of_device
from protea.progress import Progress
from protea.train.model import Trainable
from protea.train.recipe import LogSettings, Recipe
from protea.train.run_state import TrainingState

_SIDES: Final = (256, 1024)
"""Of matrices. Large ones reach the highest rate; small ones are done before another process interrupts."""

_MEASURED_SECONDS: Final = 0.5
_BUFFER: Final = 16 << 20
"""Bytes of metrics that wait in memory while a disk is full. Python keeps what it could not write for the next time."""


class TrainingProgress(Progress):
    """Receives the progress of a training run. This class ignores it and never stops the run; subclasses may."""

    def start(self, costs: Sequence[str], steps: int, done: int) -> None:
        """Training begins after ``done`` of its steps; ``costs`` are lines of text on what the run takes."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a step."""

    def stop(self) -> bool:
        """Whether to save a checkpoint and end the run; asked after every pack."""
        return False


class Sink(NamedTuple):
    """A place that metrics go to; its functions may fail with any error."""

    name: str
    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


class Logbook:
    """Computes the metrics of a run, and passes them to the progress and the sinks. Closing it closes the sinks."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        recipe: Recipe,
        trainable: Trainable,
        progress: TrainingProgress,
        peak: float | None,
    ) -> None:
        self._sinks, self._recipe, self._progress = sinks, recipe, progress
        self._config, self._device = trainable.model.config, trainable.model.device
        self._scaler, self._parallel = trainable.precision.scaler, trainable.parallel
        self._peak = peak
        self._failing = False
        self._filled = self._room = 0  # tokens of the last step, and those that its packs could hold
        self._reset()

    def due(self, step: int) -> bool:
        """Whether a step's metrics are logged."""
        return step % self._recipe.log.every == 0 or step == self._recipe.run.steps

    def count(self, packs: Sequence[TrainingBatch]) -> None:
        """Add the tokens of one step of this process to the counters."""
        lengths = torch.cat([pack.lengths for pack in packs])
        self._filled, self._room = int(lengths.sum()), len(packs) * self._recipe.batch.pack
        self._tokens += self._filled
        self._squares += int(lengths.square().sum())
        self._masked += sum(len(pack.rows) for pack in packs)

    def step(self, state: TrainingState, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Log a step's metrics, with averages since the last logged step; this reads from the device.

        All processes do this together; their tokens are added.
        """
        nats = loss.item()
        total, squares, masked, filled, room = self._parallel.total(
            self._tokens, self._squares, self._masked, self._filled, self._room
        )
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values = {
            "loss": nats,
            "perplexity": _exp(nats),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
            "epoch": state.position.epoch,
            "tokens": state.tokens,
            "padding": 1 - filled / room if room else 0.0,
            "tokens_per_second": total / seconds,
        }
        if self._peak is not None:
            tokens = max(total, 1)
            flops = self._config.training_flops(squares / tokens, masked / tokens)
            values["utilisation"] = total * flops / seconds / self._peak
        values["peak_memory"] = max(self._parallel.world.gather(peak_memory(self._device)))
        if self._scaler.is_enabled():
            values["loss_scale"] = self._scaler.get_scale()
        self._reset()
        self._log(state.step, values)

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Log the result of a validation, whose time does not count as training."""
        self._began += seconds
        self._log(step, {"validation_loss": loss, "validation_perplexity": _exp(loss)})

    def close(self) -> None:
        """Write what is waiting, and close the sinks."""
        for failure in self._failures(lambda sink: sink.close()):
            self._progress.note(f"the last metrics could not be written: {failure}")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        failures = self._failures(lambda sink: sink.write(step, values))
        if failures and not self._failing:
            self._progress.note(f"metrics cannot be written: {failures[0]}; they are kept until they can be written")
        self._failing = bool(failures)
        self._progress.log(step, values)

    def _failures(self, use: Callable[[Sink], None]) -> list[str]:
        failures = []
        for sink in self._sinks:
            try:
                use(sink)
            except Exception as error:  # each sink has errors of its own, and none may end a run
                failures.append(f"{sink.name}: {getattr(error, 'strerror', None) or error}")
        return failures

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._tokens = self._squares = self._masked = 0


def _exp(nats: float) -> float:
    """The exponential; infinite if a float cannot hold it."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def peak_flops(log: LogSettings, device: torch.device | None, dtype: torch.dtype) -> float | None:
    """Operations per second of a device's matrix products in the type that computes; ``None`` if unknown.

    A GPU's number is looked up by name, for narrow types. A CPU's is the best measured in half a second on square
    matrices, in float32 if the processor does not multiply ``dtype`` natively.
    """
    if log.peak_tflops is not None:
        return log.peak_tflops * 1e12
    if device is None or (device.type == "cuda" and dtype == torch.float32):
        return None
    if device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name(device))
        return None if gpu is None else gpu.flops
    native = dtype if dtype == torch.bfloat16 and native_bfloat16(device) else torch.float32
    rate = 0.0
    for side in _SIDES:
        a, b = (torch.ones(side, side, dtype=native, device=device) for _ in range(2))
        end = time.perf_counter() + _MEASURED_SECONDS / len(_SIDES)
        while (began := time.perf_counter()) < end:
            torch.mm(a, b)
            rate = max(rate, 2 * side**3 / max(time.perf_counter() - began, 1e-9))
    return rate


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes used so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def open_sinks(folder: Path, recipe: Recipe, state: TrainingState) -> list[Sink]:
    """Open the places that the metrics go to, for a run that continues from a state."""
    sinks: list[Sink] = []
    # Weights & Biases first: it may refuse, and no file is open yet.
    if recipe.log.wandb is not None:
        sinks.append(_weights_and_biases(recipe.log.wandb, folder, recipe))
    sinks.append(_json_lines(folder / "metrics.jsonl", state))
    if recipe.log.tensorboard:
        try:
            sinks.append(_tensorboard(folder / "tensorboard", state.step))
        except ImportError:
            message = "TensorBoard is not installed, its files are not written"
            warnings.warn(f"{message}: {install('protea[train]')}", ProteaWarning, stacklevel=2)
    return sinks


def _json_lines(path: Path, state: TrainingState) -> Sink:
    """One object per line, with its ``step``; infinities and NaN are ``null``. Each line is in the file at once.

    Lines of later steps than the state's, which a killed run left, are removed. So is the line of a validation that no
    checkpoint includes, since the run repeats it.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _is_past(line, state)]
    if kept != lines:
        write_durably(path, b"".join(kept).decode())
    stream = path.open("ab", buffering=_BUFFER)

    def write(step: int, values: Mapping[str, float]) -> None:
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        stream.write(json.dumps({"step": step, **plain}).encode() + b"\n")
        stream.flush()

    return Sink(path.name, write, stream.close)


def _is_past(line: bytes, state: TrainingState) -> bool:
    """Whether a line is complete and belongs to the steps before a state."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
        step = int(values["step"])
    except (ValueError, KeyError, TypeError):
        return False
    repeated = step == state.step and state.validation_loss is None and "validation_loss" in values
    return step <= state.step and not repeated


def _tensorboard(folder: Path, step: int) -> Sink:
    """Event files for TensorBoard, with a chart for each metric.

    TensorBoard's own writer is not used: on a full disk its thread ends with a traceback and loses what follows.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(exist_ok=True)
    path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    records: Any = RecordWriter(path.open("ab", buffering=_BUFFER))

    def add(**content: Any) -> None:
        records.write(Event(wall_time=time.time(), **content).SerializeToString())
        records.flush()

    def write(step: int, values: Mapping[str, float]) -> None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        add(step=step, summary=Summary(value=points))

    add(file_version="brain.Event:2")
    # Hides points of later steps, which a killed run left.
    add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    return Sink("TensorBoard", write, records.close)


def _weights_and_biases(project: str, folder: Path, recipe: Recipe) -> Sink:
    """A run of a Weights & Biases project; a resumed run continues in it."""
    import wandb  # type: ignore[import-not-found,unused-ignore]

    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    options: dict[str, Any] = {"id": identity, "resume": "allow", "dir": str(folder), "config": recipe.shown()}
    try:
        run: Any = wandb.init(project=project, name=folder.name, **options)
    except Exception as error:  # wandb's errors share no base class in older versions
        raise OutputError(
            f"log.wandb: Weights & Biases cannot begin a run: {error}; log in with `wandb login`, set "
            "WANDB_MODE=offline, or log.wandb=null"
        ) from error
    return Sink("Weights & Biases", lambda step, values: run.log(dict(values), step=step), run.finish)
