"""Finished models out of a run's checkpoints: one of them, or the mean of several."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from protea.checkpoints import hf
from protea.checkpoints.checkpoint import contact_head
from protea.checkpoints.distcp import DistributedTensors
from protea.checkpoints.hf_config import config_from
from protea.errors import CheckpointError, ResumeError
from protea.models.encoder import Encoder
from protea.models.registry import build
from protea.output import staged
from protea.train.resume import MODEL
from protea.train.state import Saved, choose, newest_saved

NEWEST: Final = "newest"


def export(run: Path, output: Path, *, which: str = NEWEST, dtype: torch.dtype = torch.float32) -> Saved:
    """Write one checkpoint of a run as a Hugging Face folder, which Protea and ``transformers`` load.

    Args:
        run: the run's folder.
        output: folder to write; must be new.
        which: ``newest``, ``best`` by validation loss, or a step.
        dtype: of the weights.

    Raises:
        ResumeError: the run has no such checkpoint.
        CheckpointError: it is damaged.
        OutputError: the folder exists, or cannot be written.
    """
    saved = choose(run, which)
    tensors = saved.tensors()
    model = _model(saved, tensors)
    with staged(output) as place:
        hf.write(place, model, lambda name: tensors[f"{MODEL}{name}"].to(dtype), dtype)
    return saved


def average(run: Path, output: Path, *, last: int, dtype: torch.dtype = torch.float32) -> list[Saved]:
    """Write the mean of the weights of a run's last checkpoints, as ESM-1nv's final model is of 47.

    Summed in float64, one parameter at a time.

    Args:
        run: the run's folder.
        output: folder to write; must be new.
        last: how many, the newest included.
        dtype: of the weights.

    Raises:
        ResumeError: the run has fewer.
        CheckpointError: one is damaged, or of another model.
        OutputError: the folder exists, or cannot be written.
    """
    saved = newest_saved(run, last)
    if len(saved) < last:
        raise ResumeError(
            f"{run}: has {len(saved)} checkpoints, not {last}; save.newest and save.keep_every say which are kept"
        )
    stored = [each.tensors() for each in saved]
    model = _model(saved[-1], stored[-1])
    for each, tensors in zip(saved, stored, strict=True):
        for name, parameter in model.named_parameters():
            key = f"{MODEL}{name}"
            if key not in tensors or tensors.shape(key) != tuple(parameter.shape):
                raise CheckpointError(f"{each.folder}: {key} is missing or of another shape than the newest's")

    def mean(name: str) -> Tensor:
        total = torch.zeros(model.get_parameter(name).shape, dtype=torch.float64)
        for tensors in stored:
            total += tensors[f"{MODEL}{name}"]
        return (total / len(stored)).to(dtype)

    with staged(output) as place:
        hf.write(place, model, mean, dtype)
    return saved


def _model(saved: Saved, tensors: DistributedTensors) -> Encoder:
    """The model on the meta device, with the heads that are stored."""
    try:
        model = build(config_from(dict(saved.values["config"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.folder}: says not what model it is: {error!r}") from error
    shapes = {key.removeprefix(MODEL): tensors.shape(key) for key in tensors if key.startswith(f"{MODEL}contact_head.")}
    model.contact_head = contact_head(model.config, shapes)
    for name in model.stored_buffers:
        if f"{MODEL}{name}" in tensors:
            model.set_buffer(name, tensors[f"{MODEL}{name}"])
    for name, _ in model.named_parameters():
        if f"{MODEL}{name}" not in tensors:
            raise CheckpointError(f"{saved.folder}: {MODEL}{name} is missing")
    return model
