"""All formats: which one a path holds, and the module that reads and writes it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

import torch

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.json_files import CONFIG, read_json
from protea.checkpoints.layout import Parameter
from protea.checkpoints.region import Region, is_tar
from protea.checkpoints.safetensors_files import INDEX
from protea.checkpoints.sidecar import EXTRAS, complete, extras_path
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder

_MODULES: Final = {"te": "te", "hf": "hf", "nemo2": "nemo2", "nemo": "nemo", "fair-esm": "fair_esm"}
"""The module of each format, by the format's name."""

RECIPE_MODEL_TYPE: Final = "nv_esm"
"""The ``model_type`` of NVIDIA's recipe, which distinguishes its folders from Hugging Face's."""

NEMO_CONFIG: Final = "model_config.yaml"
"""The file that identifies an unpacked .nemo."""


class Format(Protocol):
    """A module of a format."""

    NAME: str
    """What ``--to`` calls the format."""
    TITLE: str
    """What messages call a checkpoint of the format."""

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open a checkpoint."""

    def write(self, path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
        """Write a checkpoint.

        Args:
            path: the file or folder.
            model: says which parameters there are; may be on the meta device.
            parameter: gives values of type ``dtype``.
            dtype: the type to store.
        """


def format_named(name: str) -> Format:
    """The module of a format. It is imported only now, since most runs need only one format.

    Raises:
        UsageError: there is no such format.
    """
    if name not in _MODULES:
        raise UsageError(f"unknown format {name!r}; use {', '.join(_MODULES)}")
    return cast("Format", import_module(f"protea.checkpoints.{_MODULES[name]}"))


def unsupported(model: Encoder, name: str) -> str | None:
    """Why a format, or the library that reads it, cannot hold a model; ``None`` if it can."""
    stored = type(model).stored.get(name)
    if stored is None:
        return f"the format has no {model.config.family}"
    if name == "fair-esm" and model.lm_head is None:
        return "Meta's classes have a language-model head, this checkpoint has none"
    return stored.unsupported(model.config)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any format, with the files beside it that belong to it."""
    return complete(recognised(path).open_checkpoint(path), path)


def recognised(path: Path) -> Format:
    """The format of a checkpoint, by its content."""
    return format_named(_folder_format(path) if path.is_dir() else _file_format(path))


def _folder_format(path: Path) -> str:
    if (path / CONFIG).exists():
        # A recipe's folder contains everything that a Hugging Face folder contains.
        recipe = (path / CONFIG).is_file() and read_json(path / CONFIG).get("model_type") == RECIPE_MODEL_TYPE
        return "te" if recipe else "hf"
    weights = path / "weights" if (path / "weights").is_dir() else path
    if (weights / ".metadata").is_file() or (weights / "metadata.json").is_file():
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
    from protea.checkpoints.torch_file import is_torch_file

    region = Region.of_file(path)
    if is_tar(region):
        return "nemo"
    if is_torch_file(region):
        return "fair-esm"
    if region.read(0, 2) == b"\x1f\x8b":
        raise CheckpointError(f"{path}: compressed; unpack it (tar xzf {path.name}) and name the unpacked folder")
    raise CheckpointError(
        f"{path}: no checkpoint; looked for a file of torch.save (Meta's esm package) and a tar archive (.nemo)"
    )


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path belongs to: itself, or the folder of a weight file or configuration."""
    inside = path.suffix in (".safetensors", ".bin") or path.name in (CONFIG, INDEX, "pytorch_model.bin.index.json")
    return path.parent if inside and path.is_file() and not path.name.endswith(EXTRAS) else path


def files_of(path: Path, checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint, its extras included."""
    extras = extras_path(path)
    return [*checkpoint.files, *([extras] if extras.exists() and extras not in checkpoint.files else [])]
