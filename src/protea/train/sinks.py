"""Where metrics go: JSON lines, event files for TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from protea.errors import OutputError, ProteaWarning
from protea.output import write_durably
from protea.train.recipe import Recipe
from protea.train.resume import TrainingState

_BUFFER: Final = 16 << 20
"""Bytes of metrics that wait in memory while a disk is full. Python keeps what it could not write for the next time."""


class _JsonLines:
    """``metrics.jsonl``: one object a line, with its ``step``; infinities and NaN are ``null``.

    Lines of later steps than the state's, which a killed run left, are removed. So is the line of a validation that no
    checkpoint includes, since the run repeats it.
    """

    name: Final = "metrics.jsonl"

    def __init__(self, folder: Path, state: TrainingState) -> None:
        path = folder / self.name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_past(line, state)]
        if kept != lines:
            write_durably(path, b"".join(kept).decode())
        self._stream = path.open("ab", buffering=_BUFFER)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, **line}).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class _TensorBoard:
    """Event files for TensorBoard, with a chart for each metric.

    TensorBoard's own writer is not used: on a full disk its thread ends with a traceback and loses what follows.
    """

    name: Final = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._records: Any = RecordWriter(path.open("ab", buffering=_BUFFER))
        self._add(file_version="brain.Event:2")
        # Hides points of later steps, which a killed run left.
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=points))

    def close(self) -> None:
        self._records.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


class _WeightsAndBiases:
    """A run of a Weights & Biases project; a resumed run continues in it."""

    name: Final = "Weights & Biases"

    def __init__(self, project: str, folder: Path, recipe: Recipe) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        options: dict[str, Any] = {"id": identity, "resume": "allow", "dir": str(folder), "config": recipe.shown()}
        try:
            self._run: Any = wandb.init(project=project, name=folder.name, **options)
        except Exception as error:  # wandb's errors share no base class in older versions
            raise OutputError(
                f"log.wandb: Weights & Biases cannot begin a run: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or log.wandb=null"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


Sink = _JsonLines | _TensorBoard | _WeightsAndBiases
"""A place that metrics go to; ``write`` and ``close`` may fail with any error."""


def open_sinks(folder: Path, recipe: Recipe, state: TrainingState) -> list[Sink]:
    """Open the places that the metrics of a run go to, which continues from a state.

    Raises:
        OutputError: Weights & Biases cannot begin.
        OSError: a file cannot be written.
    """
    sinks: list[Sink] = []
    # Weights & Biases first: it may refuse, and no file is open yet.
    if recipe.log.wandb is not None:
        sinks.append(_WeightsAndBiases(recipe.log.wandb, folder, recipe))
    sinks.append(_JsonLines(folder, state))
    if recipe.log.tensorboard:
        try:
            sinks.append(_TensorBoard(folder / "tensorboard", state.step))
        except ImportError:
            message = "TensorBoard is not installed, its files are not written: pip install 'protea[train]'"
            warnings.warn(message, ProteaWarning, stacklevel=2)
    return sinks


def _is_past(line: bytes, state: TrainingState) -> bool:
    """Whether a line is complete and belongs to the steps before a state."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
        step = int(values["step"])
    except (ValueError, KeyError, TypeError):
        return False
    repeated = step == state.step and state.validation_loss is None and "validation_loss" in values
    return step <= state.step and not repeated
