"""What a checkpoint holds, put together from a run's parts and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

import protea
from protea.checkpoints.hf_config import config_json
from protea.data.loader import Position, TrainingBatch
from protea.errors import CheckpointError, ResumeError
from protea.train.optim import PREFIX
from protea.train.recipe import Recipe
from protea.train.state import STATE, Checkpoints, Saved
from protea.train.trained import Trained
from protea.train.watcher import Watcher
from protea.transforms import native

MODEL: Final = "model."


@dataclass
class TrainingState:
    """How far a run is.

    Attributes:
        step: updates done.
        position: where the data go on.
        tokens: seen so far, BOS and EOS included.
        validation_loss: at this step, if it was measured.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    validation_loss: float | None = None

    def after(self, packs: Sequence[TrainingBatch]) -> TrainingState:
        """One step further."""
        seen = sum(pack.inputs.input_ids.numel() for pack in packs)
        return TrainingState(self.step + 1, packs[-1].position, self.tokens + seen)


def save(checkpoints: Checkpoints, trained: Trained, progress: TrainingState, *, recipe: Recipe, data: str) -> None:
    """Have everything written that the next step depends on.

    Args:
        checkpoints: of the run.
        trained: what is trained, and with what.
        progress: how far the run is.
        recipe: of the run.
        data: hash of the training data.
    """
    model = trained.model
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **model.stored_buffers}
    checkpoints.save(
        progress.step,
        {f"{MODEL}{name}": each for name, each in tensors.items()} | dict(trained.optimizers.state()),
        {
            "position": list(progress.position),
            "tokens": progress.tokens,
            "validation_loss": progress.validation_loss,
            "scaler": trained.precision.scaler.state_dict(),
            "config": config_json(model, torch.float32),
            "recipe": recipe.shown(),
            "data": data,
            "protea": protea.__version__,
            "surroundings": surroundings(trained),
        },
    )


def surroundings(trained: Trained) -> dict[str, str]:
    """What the last bits of a step depend on besides the recipe and the data."""
    device = trained.model.device
    on_gpu = device.type == "cuda"
    ours = native.compiled() is not None and not on_gpu and trained.precision.dtype == torch.bfloat16
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "attention kernel": "Protea's" if ours else "PyTorch's",
    }


def resume(checkpoints: Checkpoints, trained: Trained, watcher: Watcher, *, data: str) -> TrainingState:
    """Take over the newest intact checkpoint, if there is any; damaged ones are passed over, and said so.

    Args:
        checkpoints: of the run.
        trained: what takes it over.
        watcher: told of it.
        data: hash of the training data.

    Raises:
        ResumeError: there are only damaged ones, or it is of other data.
        CheckpointError: it is of another model or optimizer.
    """
    checkpoints.clear_unfinished()
    damaged: list[CheckpointError] = []
    for found in checkpoints.newest():
        if isinstance(found, Saved):
            break
        watcher.note(f"{found}; passed over")
        damaged.append(found)
    else:
        if damaged:
            raise ResumeError(f"{checkpoints.folder}: no checkpoint is intact; remove the folder to begin anew")
        return TrainingState()
    try:
        progress = _taken_over(found, trained, watcher, data)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.folder / STATE}: not of a run of Protea's: {error!r}") from error
    checkpoints.last = found.step
    watcher.note(f"goes on after step {found.step:,}")
    return progress


def _taken_over(found: Saved, trained: Trained, watcher: Watcher, data: str) -> TrainingState:
    values = found.values
    if values["data"] != data:
        raise ResumeError(f"{found.folder}: was trained on other data; give those again, or name a new folder")
    epoch, block, pack = map(int, values["position"])
    if min(epoch, block, pack) < 0:
        raise ValueError("a place before the first")
    for name, now in surroundings(trained).items():
        if (before := values["surroundings"][name]) != now:
            watcher.note(f"{name} {before} before, now {now}: not the same to the last bit")
    _load(found, trained)
    return TrainingState(found.step, Position(epoch, block, pack), int(values["tokens"]), found.loss)


def _load(saved: Saved, trained: Trained) -> None:
    tensors = saved.tensors()
    model = trained.model
    for name, value in (*model.named_parameters(), *model.stored_buffers.items()):
        key = f"{MODEL}{name}"
        if key not in tensors or tensors.shape(key) != tuple(value.shape):
            raise CheckpointError(f"{saved.folder}: {key} is missing or of another shape; it is of another model")
        with torch.no_grad():
            value.copy_(tensors[key])
    trained.optimizers.load({key: tensors[key] for key in tensors if key.startswith(PREFIX)})
    scaler: dict[str, Any] = saved.values["scaler"]
    if trained.precision.scaler.is_enabled() and scaler:
        trained.precision.scaler.load_state_dict(scaler)
