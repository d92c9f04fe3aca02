"""All formats: which one a path holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from protea.checkpoints import fair_esm, hf, nemo, nemo2, te
from protea.checkpoints.archive import is_gzip
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.extras import EXTRAS, complete, extras_path
from protea.checkpoints.files import CONFIG, Region
from protea.checkpoints.safetensors_files import INDEX
from protea.errors import CheckpointError
from protea.models.encoder import Encoder


class Format(Protocol):
    """What a module of a format offers."""

    NAME: str
    """What ``--to`` calls it."""
    TITLE: str
    """What messages call it."""

    def recognise(self, path: Path) -> bool:
        """Whether a path holds this format, from what is in it."""

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open one."""

    def unsupported(self, model: Encoder) -> str | None:
        """Why a model cannot be written in it."""

    def write(self, path: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        """Write one."""


FORMATS: Final = {module.NAME: cast("Format", module) for module in (te, hf, nemo2, nemo, fair_esm)}
"""By name, in the order in which they are looked for: a recipe's folder has all that a Hugging Face folder has."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any format, with what lies beside it.

    Raises:
        CheckpointError: nothing known is there, or it is damaged, hostile, or does not fit together.
    """
    return complete(recognised(path).open_checkpoint(path), path)


def recognised(path: Path) -> Format:
    """The format of what is at a path.

    Raises:
        CheckpointError: none is known there; says what was looked for.
    """
    for known in FORMATS.values():
        if known.recognise(path):
            return known
    if (path / "checkpoints").is_dir() and (path / "recipe.yaml").is_file():
        raise CheckpointError(f"{path}: a training run; `protea export {path} -o FOLDER` makes a model of it")
    if path.is_dir():
        raise CheckpointError(
            f"{path}: no checkpoint in this folder; looked for {CONFIG} (Hugging Face, TransformerEngine), "
            "weights/.metadata (BioNeMo 2) and model_config.yaml (an unpacked .nemo)"
        )
    if is_gzip(Region.of_file(path)):
        raise CheckpointError(f"{path}: compressed; unpack it (tar xzf {path.name}) and name what comes out")
    raise CheckpointError(
        f"{path}: no checkpoint; looked for a file of torch.save (Meta's esm package) and a tar archive (.nemo)"
    )


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path belongs to: itself, or the folder that a weight file or configuration is in."""
    inside = path.suffix in (".safetensors", ".bin") or path.name in (CONFIG, INDEX, "pytorch_model.bin.index.json")
    return path.parent if inside and path.is_file() and not path.name.endswith(EXTRAS) else path


def files_of(path: Path, checkpoint: Checkpoint) -> list[Path]:
    """The files a checkpoint is in, what lies beside it included."""
    beside = extras_path(path)
    return [*checkpoint.files, *([beside] if beside.exists() and beside not in checkpoint.files else [])]
