"""All formats: which one a path holds, and the module that reads and writes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.json_files import CONFIG, read_json
from protea.checkpoints.safetensors_files import INDEX
from protea.checkpoints.sidecar import EXTRAS, complete, extras_path
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder

_MODULES: Final = {"te": "te", "hf": "hf", "nemo2": "nemo2", "nemo": "nemo", "fair-esm": "fair_esm"}
"""Modules of this package by their formats' names."""

NAMES: Final = tuple(_MODULES)
"""What ``--to`` may say."""

RECIPE_MODEL_TYPE: Final = "nv_esm"
"""By which a folder of NVIDIA's recipe differs from a Hugging Face folder."""

NEMO_CONFIG: Final = "model_config.yaml"
"""By which a folder that a .nemo was unpacked into is known."""


class Format(Protocol):
    """What a module of a format offers."""

    NAME: str
    """What ``--to`` calls it."""
    TITLE: str
    """What messages call it."""

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open one."""

    def unsupported(self, model: Encoder) -> str | None:
        """Why a model cannot be written in it."""

    def write(self, path: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        """Write one."""


def format_named(name: str) -> Format:
    """The module of a format, imported now: a run needs one or two of them.

    Raises:
        UsageError: no such format.
    """
    if name not in _MODULES:
        raise UsageError(f"unknown format {name!r}; use {', '.join(NAMES)}")
    return cast("Format", import_module(f"protea.checkpoints.{_MODULES[name]}"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any format, with what lies beside it.

    Raises:
        CheckpointError: nothing known is there, or it is damaged, hostile, or does not fit together.
    """
    return complete(recognised(path).open_checkpoint(path), path)


def recognised(path: Path) -> Format:
    """The format of what is at a path, from what is in it.

    Raises:
        CheckpointError: none is known there; says what was looked for.
    """
    return format_named(_folder_format(path) if path.is_dir() else _file_format(path))


def _folder_format(path: Path) -> str:
    if (path / CONFIG).exists():
        # A recipe's folder has all that a Hugging Face folder has.
        recipe = (path / CONFIG).is_file() and read_json(path / CONFIG).get("model_type") == RECIPE_MODEL_TYPE
        return "te" if recipe else "hf"
    weights = path / "weights" if (path / "weights").is_dir() else path
    if any((weights / name).is_file() for name in (".metadata", "metadata.json")):
        return "nemo2"
    if (path / NEMO_CONFIG).is_file():
        return "nemo"
    if (path / "checkpoints").is_dir() and (path / "recipe.yaml").is_file():
        raise CheckpointError(f"{path}: a training run; `protea export {path} -o FOLDER` makes a model of it")
    raise CheckpointError(
        f"{path}: no checkpoint in this folder; looked for {CONFIG} (Hugging Face, TransformerEngine), "
        f"weights/.metadata (BioNeMo 2) and {NEMO_CONFIG} (an unpacked .nemo)"
    )


def _file_format(path: Path) -> str:
    from protea.checkpoints.archive import is_gzip, is_tar
    from protea.checkpoints.region import Region
    from protea.checkpoints.torch_file import is_torch_file

    region = Region.of_file(path)
    if is_tar(region):
        return "nemo"
    if is_torch_file(region):
        return "fair-esm"
    if is_gzip(region):
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
