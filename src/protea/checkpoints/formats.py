"""All formats: which one a path holds, and what is kept beside a checkpoint because its format has no room for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from protea.checkpoints import fair_esm, hf, nemo, nemo2, te
from protea.checkpoints.archive import is_gzip
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.files import CONFIG, Region
from protea.checkpoints.hf_config import config_from, config_json
from protea.checkpoints.layout import Planned
from protea.checkpoints.safetensors_files import INDEX, SafetensorsFiles, write_safetensors
from protea.checkpoints.tensors import FLOATS, raw_bytes
from protea.errors import CheckpointError
from protea.models.encoder import Encoder

EXTRAS: Final = "extras.safetensors"
_CONFIG_KEY: Final = "protea_config"
_OWNER_KEY: Final = "protea_written_for"


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


def extras_path(path: Path) -> Path:
    """Where what a format has no room for is kept: in a folder, or beside a file."""
    return path / EXTRAS if path.is_dir() else path.with_name(f"{path.name}.{EXTRAS}")


def complete(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add what is kept beside a checkpoint.

    Raises:
        CheckpointError: it is damaged, or belongs to another checkpoint.
    """
    beside = extras_path(path)
    if not beside.exists():
        return checkpoint
    extras = SafetensorsFiles({beside: set()})
    try:
        metadata = extras.metadata(beside)
        raw = json.loads(metadata[_CONFIG_KEY])
        if not isinstance(raw, dict):
            raise ValueError("no configuration")
        if wrong := sorted({extras.dtype(key) for key in extras} - FLOATS.keys()):
            raise ValueError(f"stored as {wrong[0]}")
        if metadata[_OWNER_KEY] != _fingerprint(checkpoint):
            raise CheckpointError("were written for other weights")
        checkpoint.complete({key: extras[key] for key in extras}, config_from(raw))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{beside}: damaged: {error!r}; convert the checkpoint again, or remove it") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{beside}: belongs to another checkpoint than {path}: its contents {error}; remove it, or convert again"
        ) from error
    return checkpoint


def _fingerprint(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from others of its architecture: the hash of some of it, as its format gives it."""
    digest = hashlib.sha256()
    for name in ("word_embeddings.weight", "layers.0.self_attn.out_proj.weight", "emb_layer_norm_after.weight"):
        digest.update(raw_bytes(checkpoint.parameter(name)))
    return digest.hexdigest()


def write_extras(path: Path, checkpoint: Checkpoint, model: Encoder, values: Mapping[str, Tensor]) -> Path:
    """Keep beside a checkpoint what its format has no room for.

    Args:
        path: the checkpoint.
        checkpoint: the same, opened, without anything beside it.
        model: whose configuration is kept.
        values: parameters by our names; ``inv_freq`` for rotary frequencies.

    Returns:
        The file.
    """
    plan = [Planned(name, tuple(value.shape), value.dtype, value.detach) for name, value in values.items()]
    metadata = {_CONFIG_KEY: json.dumps(config_json(model, torch.float32), sort_keys=True)}
    metadata[_OWNER_KEY] = _fingerprint(checkpoint)
    write_safetensors(extras_path(path), plan, metadata)
    return extras_path(path)
