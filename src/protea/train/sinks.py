"""Where metrics go: a line of JSON at a time, event files for TensorBoard, Weights & Biases if asked for."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import time
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from protea.disk import replacing
from protea.errors import MissingExtraError, OutputError, ProteaWarning
from protea.train.recipe import Log
from protea.train.resume import TrainingState

METRICS: Final = "metrics.jsonl"


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

    def __init__(self, path: Path, progress: TrainingState) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_past(line, progress)]
        if kept != lines:
            with replacing(path) as aside:
                aside.write_bytes(b"".join(kept))
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


def open_sinks(folder: Path, log: Log, recipe: Mapping[str, Any], progress: TrainingState) -> list[Sink]:
    """Where a run's metrics go, from where it is on.

    Args:
        folder: of the run.
        log: says where.
        recipe: of the run, as shown, for whoever looks at them.
        progress: from which the run goes on.

    Raises:
        OutputError: Weights & Biases cannot begin.
        OSError: a file cannot be written.
    """
    # First what may refuse: nothing is open yet.
    sinks: list[Sink] = []
    if log.wandb is not None:
        sinks.append(WeightsAndBiases(log.wandb, folder, recipe))
    sinks.append(JsonLines(folder / METRICS, progress))
    if log.tensorboard:
        try:
            sinks.append(TensorBoard(folder / "tensorboard", progress.step))
        except ImportError:
            message = "TensorBoard is not installed, its files are not written: pip install 'protea[train]'"
            warnings.warn(message, ProteaWarning, stacklevel=2)
    return sinks


def _is_past(line: bytes, progress: TrainingState) -> bool:
    """Whether a line tells what was before; one that a kill cut short does not."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
        step = int(values["step"])
    except (ValueError, KeyError, TypeError):
        return False
    repeated = step == progress.step and progress.validation_loss is None and "validation_loss" in values
    return step <= progress.step and not repeated
