"""All formats: the format of a path, the module of each format, and extra files for what a format cannot hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.hf_config import config_from, config_json
from protea.checkpoints.layout import Parameter
from protea.checkpoints.region import Region, is_tar
from protea.checkpoints.settings_files import CONFIG, read_json
from protea.checkpoints.tensors import (
    FLOATS,
    INDEX,
    WEIGHTS,
    Planned,
    is_safetensors,
    open_safetensors,
    raw_bytes,
    write_safetensors,
)
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder

_MODULES: Final = {
    "te": "te",
    "hf": "hf",
    "nemo2": "nemo2",
    "nemo": "nemo",
    "fair-esm": "fair_esm",
    "sequence-models": "sequence_models",
    "evolutionaryscale": "evolutionary_scale",
}
"""The module of each format, by the format's name."""

_READERS: Final = {**_MODULES, "state-dict": "state_dict"}

_JOIN: Final = "; then put {config} of the model beside the result"
_PARTS: Final = {
    "*/.metadata": "parts of a model, written by FSDP: join them with `accelerate merge-weights FOLDER OUTPUT`, where "
    f"FOLDER is the one with .metadata{_JOIN}",
    "zero_to_fp32.py": "parts of a model, written by DeepSpeed: join them with `python {folder}/zero_to_fp32.py "
    f"{{folder}} OUTPUT`{_JOIN}",
    "global_step*": f"parts of a model, written by DeepSpeed: join them with its zero_to_fp32.py{_JOIN}",
    "*mp_rank_*": "parts of a model, written by DeepSpeed: join them with zero_to_fp32.py, which is in the folder above"
    f"{_JOIN}",
    "adapter_config.json": "an adapter of peft without its model: load both with peft, and save them as one with "
    "`model.merge_and_unload().save_pretrained(FOLDER)`",
}
"""Patterns of files in folders that hold only parts of a model, and the way to make a whole model of them."""

RECIPE_MODEL_TYPE: Final = "nv_esm"
"""The ``model_type`` of NVIDIA's recipe, which distinguishes its folders from Hugging Face's."""

NEMO_CONFIG: Final = "model_config.yaml"
"""The file that identifies an unpacked .nemo."""

_OF_FOLDER: Final = re.compile(
    r"config\.json|(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?"
)
"""Files that are read as a folder; any other weight file there is another model."""

EXTRAS: Final = "extras.safetensors"
"""Parameters, rotary frequencies and settings that a format cannot hold."""

HEAD_RECORD: Final = "contact-head.json"
"""The record of how a contact head was fitted."""

_CONFIG_KEY: Final = "protea_config"
_OWNER_KEY: Final = "protea_written_for"
_FINGERPRINTED = ["word_embeddings.weight", "layers.0.self_attn.out_proj.weight", "emb_layer_norm_after.weight"]


class FormatReader(Protocol):
    """A module that reads a kind of files: its name, its title in messages, and its reader."""

    NAME: str
    TITLE: str
    open_checkpoint: Callable[[Path], Checkpoint]


class Format(FormatReader, Protocol):
    """A module of a format: a reader whose name is that of ``--to``, and a writer.

    The writer gets the file or folder, a model that lists the parameters (its own may be on the meta
    device), a function that gives their values, and the type of these values.
    """

    write: Callable[[Path, Encoder, Parameter, torch.dtype], None]


def format_named(name: str) -> Format:
    """The module of a format. It is imported only now, since most runs need only one format."""
    if name not in _MODULES:
        raise UsageError(f"unknown format {name!r}; use {', '.join(_MODULES)}")
    return cast("Format", import_module(f"protea.checkpoints.{_MODULES[name]}"))


def unsupported(model: Encoder, name: str) -> str | None:
    """Why a format, or the library that reads it, cannot hold a model; ``None`` if it can."""
    stored = type(model).stored.get(name)
    if stored is None:
        return f"the format has no {model.config.family}; use --to {' or '.join(type(model).stored)}"
    if name == "fair-esm" and model.lm_head is None:
        return "Meta's classes have a language-model head, this checkpoint has none"
    return stored.unsupported(model.config)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any format, with the files beside it that belong to it."""
    return complete(recognised(path).open_checkpoint(path), path)


def recognised(path: Path) -> FormatReader:
    """The format of a checkpoint, by its content."""
    name = _folder_format(path) if path.is_dir() else _file_format(path)
    return cast("FormatReader", import_module(f"protea.checkpoints.{_READERS[name]}"))


def _folder_format(path: Path) -> str:
    if (path / CONFIG).exists() and (has_weights(path) or not parts_of(path)):
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
    if parts := parts_of(path):
        raise CheckpointError(f"{path}: holds {parts}")
    if has_weights(path):
        raise CheckpointError(
            f"{path}: holds weights without {CONFIG}: put {CONFIG} of the model they were trained from beside them, or "
            "name the file, to have its model recognised by shapes"
        )
    raise CheckpointError(
        f"{path}: no checkpoint in this folder; looked for {CONFIG} (Hugging Face, TransformerEngine), "
        f"weights/.metadata (BioNeMo 2) and {NEMO_CONFIG} (an unpacked .nemo)"
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights as transformers names them."""
    return any(_OF_FOLDER.fullmatch(entry.name) for entry in folder.iterdir() if entry.name != CONFIG)


def parts_of(folder: Path) -> str | None:
    """The advice for a folder that holds only parts of a model; ``None`` if no pattern fits."""
    advice = (advice for pattern, advice in _PARTS.items() if any(folder.glob(pattern)))
    return next((text.format(folder=folder, config=CONFIG) for text in advice), None)


def _file_format(path: Path) -> str:
    from protea.checkpoints import evolutionary_scale, fair_esm, sequence_models
    from protea.checkpoints.torch_file import TorchFile, is_torch_file

    region = Region.of_file(path)
    if is_tar(region):
        return "nemo"
    if is_torch_file(region):
        content = TorchFile(region).content
        described = (
            form.NAME for form in (fair_esm, sequence_models, evolutionary_scale) if form.is_described(content)
        )
        return next(described, "state-dict")
    if is_safetensors(region):
        return "state-dict"
    if region.read(0, 2) == b"\x1f\x8b":
        raise CheckpointError(f"{path}: compressed; unpack it (tar xzf {path.name}) and name the unpacked folder")
    raise CheckpointError(
        f"{path}: no checkpoint; looked for a file of torch.save (Meta's esm package, a state dict), safetensors and a "
        "tar archive (.nemo)"
    )


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path belongs to: itself, or the folder of a weight file or configuration."""
    unread = path.suffix == ".bin" and any((path.parent / name).exists() for name in (WEIGHTS, INDEX))
    whole = not unread and _OF_FOLDER.fullmatch(path.name) and path.is_file() and (path.parent / CONFIG).exists()
    return path.parent if whole else path


def companion(path: Path, name: str) -> Path:
    """The path of a checkpoint's ``EXTRAS`` or ``HEAD_RECORD``: inside a folder, or beside a file."""
    return path / name if path.is_dir() else path.with_name(f"{path.name}.{name}")


def complete(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the extras of a checkpoint to it, if there are any."""
    beside = companion(path, EXTRAS)
    if not beside.exists():
        return checkpoint
    extras = open_safetensors({beside: set()})
    try:
        described = json.loads(extras.metadata[_CONFIG_KEY])
        if not isinstance(described, dict):
            raise ValueError("no configuration")
        if unknown := sorted({stored.dtype for stored in extras.stored.values()} - FLOATS.keys()):
            raise ValueError(f"stored as {unknown[0]}")
        if extras.metadata[_OWNER_KEY] != _fingerprint(checkpoint):
            raise CheckpointError("were written for other weights")
        checkpoint.complete(dict(extras), config_from(described))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{beside}: damaged: {error!r}; convert the checkpoint again, or remove it") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{beside}: belongs to another checkpoint than {path}: its contents {error}; remove it, or convert again"
        ) from error
    if beside not in checkpoint.tensors.paths:
        checkpoint.tensors.paths.append(beside)
    return checkpoint


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of some parameters, as the format stores them, which differs between checkpoints of one architecture."""
    digest = hashlib.sha256()
    names = [name for entry in checkpoint.entries for name in entry.names]
    # A family that has none of these parameters is identified by its first and its last one.
    for name in [name for name in _FINGERPRINTED if name in names] or [names[0], names[-1]]:
        digest.update(raw_bytes(checkpoint.parameter(name)))
    return digest.hexdigest()


def write_extras(path: Path, checkpoint: Checkpoint, model: Encoder, values: Mapping[str, Tensor]) -> Path:
    """Write the extras of a checkpoint, opened without any: parameters and buffers, and a model's configuration."""
    extras = companion(path, EXTRAS)
    plan = [Planned(name, tuple(value.shape), value.dtype, value.detach) for name, value in values.items()]
    described = json.dumps(config_json(model, torch.float32), sort_keys=True)
    write_safetensors(extras, plan, {_CONFIG_KEY: described, _OWNER_KEY: _fingerprint(checkpoint)})
    return extras
