"""What a run tells of itself: a line of JSON at a time, event files for TensorBoard, Weights & Biases if asked for.

Every number is defined in ``docs/pretraining.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from protea.data.loader import TrainingBatch
from protea.errors import MissingExtraError, ProteaWarning
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


class JsonLines:
    """``metrics.jsonl``: an object a line, each with its ``step``.

    Args:
        path: the file.
        step: lines of later steps, which a killed run left, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if (found := _step(line)) is not None and found <= step]
        if kept != lines:
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line, and see that it is in the file."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class TensorBoard:
    """Event files, a chart a name."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each chart."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; resumed runs go on in it."""

    def __init__(self, project: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingExtraError("log.wandb needs Weights & Biases: pip install wandb") from error
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=project,
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(recipe),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each chart."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _open_sinks(folder: Path, recipe: Recipe, step: int) -> list[Sink]:
    log = recipe.log
    sinks: list[Sink] = [JsonLines(folder / METRICS, step)]
    if log.tensorboard:
        try:
            sinks.append(TensorBoard(folder / "tensorboard", step))
        except ImportError:
            message = "TensorBoard is not installed, its files are not written: pip install 'protea[train]'"
            warnings.warn(message, ProteaWarning, stacklevel=2)
    if log.wandb is not None:
        sinks.append(WeightsAndBiases(log.wandb, folder, recipe.shown()))
    return sinks


class Logbook:
    """What a run tells of itself, and what it must count for that.

    Args:
        folder: of the run.
        trained: what is trained.
        step: after which the run goes on.
        device: where.
        watcher: told the same as the files.

    Raises:
        MissingExtraError: Weights & Biases is asked for and not installed.
        OSError: a file cannot be written.
    """

    def __init__(self, folder: Path, trained: Trained, step: int, device: torch.device, watcher: Watcher) -> None:
        recipe = trained.recipe
        self._recipe, self._config, self._device, self._watcher = recipe, trained.model.config, device, watcher
        self._scaler = trained.precision.scaler
        self._peak = peak_flops(recipe.log, device, trained.precision.dtype)
        self._sinks = _open_sinks(folder, recipe, step)
        self._reset()

    def due(self, step: int) -> bool:
        """Whether a step's metrics are told."""
        return step % self._recipe.log.every == 0 or step == self._recipe.run.steps

    def count(self, packs: Sequence[TrainingBatch]) -> None:
        """A step was computed."""
        for pack in packs:
            lengths = pack.inputs.cu_seqlens.host_offsets.diff().long()
            self._packs += 1
            self._tokens += int(lengths.sum())
            self._squares += int(lengths.square().sum())
            self._masked += len(pack.rows)

    def step(self, progress: Progress, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Tell a step's metrics; reads them from the device."""
        nats = loss.item()
        values = {
            "loss": nats,
            "perplexity": math.exp(nats),
            "gradient_norm": norm.item(),
            "learning_rate": rate,
            "epoch": progress.position.epoch,
            "tokens": progress.tokens,
            **self._rates(),
            "peak_memory": peak_memory(self._device),
        }
        if self._scaler.is_enabled():
            values["loss_scale"] = self._scaler.get_scale()
        self._tell(progress.step, values)

    def validated(self, step: int, loss: float, seconds: float) -> None:
        """Tell the result of a validation, whose time is none of training."""
        self._began += seconds
        self._tell(step, {"validation_loss": loss, "validation_perplexity": math.exp(loss)})

    def close(self) -> None:
        """Write what is waiting."""
        for sink in self._sinks:
            sink.close()

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)
        self._watcher.log(step, values)

    def _rates(self) -> dict[str, float]:
        """Since they were last told."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        tokens = max(self._tokens, 1)
        values = {
            "tokens_per_second": self._tokens / seconds,
            "padding": 1 - self._tokens / max(self._packs * self._recipe.batch.pack, 1),
        }
        if self._peak is not None:
            flops = flops_per_token(self._config, self._squares / tokens, self._masked / tokens)
            values["utilisation"] = self._tokens * flops / seconds / self._peak
        self._reset()
        return values

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._packs = self._tokens = self._squares = self._masked = 0


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


def _step(line: bytes) -> int | None:
    """The step of a line; a line that a kill cut short has none."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
