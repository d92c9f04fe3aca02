"""How far a run is: what a checkpoint holds of it, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

import protea
from protea import native
from protea.checkpoints.hf_config import config_json
from protea.checkpoints.tensors import Tensors
from protea.data.loader import Position
from protea.errors import CheckpointError, ResumeError
from protea.progress import Progress
from protea.train.model import Trainable
from protea.train.optim import PREFIX
from protea.train.parallel import ALONE
from protea.train.recipe import Recipe
from protea.train.run_checkpoints import MODEL, STATE, RunCheckpoints, SavedCheckpoint
from protea.train.shares import Parts, fill
from protea.train.world import World

_LAYOUT: Final = "layout"


@dataclass
class TrainingState:
    """How far a run is."""

    step: int = 0  # updates done
    position: Position = field(default_factory=Position)  # where in the data the next step begins
    tokens: int = 0  # seen so far, BOS and EOS included
    validation_loss: float | None = None  # at this step, if it was measured


def save(checkpoints: RunCheckpoints, trainable: Trainable, state: TrainingState, *, recipe: Recipe, data: str) -> None:
    """Save everything that the next step depends on; ``data`` is the hash of the training data."""
    model = trainable.model
    weights = {**dict(model.named_parameters()), **model.stored_buffers}
    checkpoints.save(
        state.step,
        {f"{MODEL}{name}": tensor for name, tensor in weights.items()} | dict(trainable.optimizers.state()),
        {
            "position": list(state.position),
            "tokens": state.tokens,
            "validation_loss": state.validation_loss,
            "scaler": trainable.precision.scaler.state_dict(),
            "config": config_json(model, torch.float32),
            "recipe": recipe.shown(),
            "data": data,
            "protea": protea.__version__,
            "surroundings": surroundings(trainable),
        },
    )


def versions() -> dict[str, str]:
    """The versions that all processes of a run must share."""
    return {"Protea": protea.__version__, "PyTorch": torch.__version__, "NumPy": np.__version__}


def surroundings(trainable: Trainable) -> dict[str, str]:
    """What the last bits of a step depend on besides the recipe and the data."""
    device = trainable.model.device
    on_gpu = device.type == "cuda"
    own = None if on_gpu else native.instruction_set()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "attention kernel": "PyTorch's" if own is None else f"Protea's, {own}",
        _LAYOUT: str(trainable.parallel.layout),
    }


def compare_surroundings(before: Mapping[str, str], trainable: Trainable, progress: Progress) -> None:
    """Tell what changed of that on which the last bits of a step depend."""
    before = {_LAYOUT: str(ALONE.layout), **before}
    for name, now in surroundings(trainable).items():
        if before[name] != now:
            progress.note(f"{name} was {before[name]}, is now {now}: results will not be the same to the last bit")


def resume(checkpoints: RunCheckpoints, trainable: Trainable, progress: Progress, *, data: str) -> TrainingState:
    """Load the newest intact checkpoint, if there is any; damaged ones are skipped with a note."""
    saved = checkpoints.newest(progress)
    if saved is None:
        return TrainingState()
    try:
        state = _restore(saved, trainable, progress, data, checkpoints.world)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.folder / STATE}: is not from a training run: {error!r}") from error
    checkpoints.last = state.step
    progress.note(f"continues after step {state.step:,}")
    return state


def _restore(
    saved: SavedCheckpoint, trainable: Trainable, progress: Progress, data: str, world: World
) -> TrainingState:
    values = saved.values
    if values["data"] != data:
        raise ResumeError(f"{saved.folder}: was trained on other data; use that data again, or name a new folder")
    position = Position(*map(int, values["position"]))
    if len(position) != len(values["position"]) or min(position) < 0:
        raise ValueError(f"position {values['position']}")
    compare_surroundings(values["surroundings"], trainable, progress)
    model, precision = trainable.model, trainable.precision
    weights = {**dict(model.named_parameters()), **model.stored_buffers}
    tensors = saved.tensors(weights.items())
    for name, value in weights.items():
        fill(value, tensors, f"{MODEL}{name}")
    trainable.optimizers.load(_moments(tensors, trainable, world))
    scaler: dict[str, Any] = values["scaler"]
    if precision.scaler.is_enabled() and scaler:
        precision.scaler.load_state_dict(scaler)
    return TrainingState(saved.step, position, int(values["tokens"]), saved.loss)


def _moments(tensors: Tensors, trainable: Trainable, world: World) -> Parts:
    """The stored state of optimizers, divided as the parameters are; that of other processes' parameters left out."""
    parameters = trainable.optimizers.parameters
    elsewhere = {name for names in world.gather([*parameters]) for name in names} - parameters.keys()
    models = {}
    for key in tensors:
        name = key.removeprefix(PREFIX).rpartition(".")[0]
        if key.startswith(PREFIX) and name not in elsewhere:
            models[key] = parameters.get(name)
    return Parts(tensors, models)
