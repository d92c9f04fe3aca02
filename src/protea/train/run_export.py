"""The models of a run: one checkpoint, or the mean of several, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from protea.checkpoints import hf
from protea.checkpoints.checkpoint import contact_head
from protea.checkpoints.hf_config import config_from
from protea.checkpoints.targets import check_target
from protea.errors import CheckpointError, ResumeError
from protea.models.encoder import Encoder
from protea.models.registry import build
from protea.output import staged
from protea.progress import SILENT, Progress
from protea.text import counted
from protea.train.run_checkpoints import MODEL, SavedCheckpoint, choose, read_verified, run_folders


def export(
    run: Path,
    output: Path,
    *,
    which: str = "newest",
    dtype: torch.dtype = torch.float32,
    progress: Progress = SILENT,
) -> SavedCheckpoint:
    """Write one checkpoint of a run as a Hugging Face folder, which Protea and ``transformers`` load.

    ``which`` is ``newest``, ``best`` by validation loss, or a step.
    """
    saved = choose(run, which, progress)
    _write_mean([saved], output, dtype, progress)
    return saved


def average(
    run: Path, output: Path, *, last: int, dtype: torch.dtype = torch.float32, progress: Progress = SILENT
) -> list[SavedCheckpoint]:
    """Write the mean of the weights of a run's ``last`` checkpoints, as ``export`` writes one checkpoint.

    The sum is computed in float64, one parameter at a time. ESM-1nv's final model is such a mean, of 47 checkpoints.
    """
    folders = run_folders(run)
    if len(folders) < last:
        raise ResumeError(
            f"{run}: has {counted(len(folders), 'checkpoint')}, not {last}; save.newest and save.keep_every decide "
            "which are kept"
        )
    saved = [read_verified(folder, progress=progress) for folder in folders[-last:]]
    _write_mean(saved, output, dtype, progress)
    return saved


def _write_mean(checkpoints: list[SavedCheckpoint], output: Path, dtype: torch.dtype, progress: Progress) -> None:
    model = _model(checkpoints[-1])
    stored = [checkpoint.tensors(model.named_parameters()) for checkpoint in checkpoints]

    def mean(name: str) -> Tensor:
        total = torch.zeros(model.get_parameter(name).shape, dtype=torch.float64)
        for tensors in stored:
            total += tensors[f"{MODEL}{name}"]
        return (total / len(stored)).to(dtype)

    check_target(output, hf.NAME, model, mean, progress)
    with staged(output) as folder:
        hf.write(folder, model, mean, dtype, progress=progress)


def _model(saved: SavedCheckpoint) -> Encoder:
    """The checkpoint's model on the meta device, with the heads and buffers that are stored."""
    tensors = saved.tensors()
    try:
        model = build(config_from(dict(saved.values["config"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.folder}: does not say which model it holds: {error!r}") from error
    shapes = {key.removeprefix(MODEL): tensors.shape(key) for key in tensors if key.startswith(f"{MODEL}contact_head.")}
    model.contact_head = contact_head(model.config, shapes)
    for name in model.stored_buffers:
        if f"{MODEL}{name}" in tensors:
            model.set_buffer(name, tensors[f"{MODEL}{name}"])
    return model
