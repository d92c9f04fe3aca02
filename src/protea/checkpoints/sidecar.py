"""Files beside a checkpoint for what its format cannot hold: parameters, rotary frequencies, settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.hf_config import config_from, config_json
from protea.checkpoints.safetensors_files import open_safetensors, write_safetensors
from protea.checkpoints.tensors import FLOATS, Planned, raw_bytes
from protea.errors import CheckpointError
from protea.models.encoder import Encoder

EXTRAS: Final = "extras.safetensors"
HEAD_RECORD: Final = "contact-head.json"
_CONFIG_KEY: Final = "protea_config"
_OWNER_KEY: Final = "protea_written_for"
_FINGERPRINTED: Final[tuple[str, ...]] = (
    "word_embeddings.weight",
    "layers.0.self_attn.out_proj.weight",
    "emb_layer_norm_after.weight",
)


def extras_path(path: Path) -> Path:
    """Where the extras of a checkpoint are: inside a folder, or beside a file."""
    return _beside(path, EXTRAS)


def head_record_path(path: Path) -> Path:
    """Where the record of how a checkpoint's contact head was fitted is: inside a folder, or beside a file."""
    return _beside(path, HEAD_RECORD)


def _beside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path.with_name(f"{path.name}.{name}")


def complete(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the extras of a checkpoint to it, if there are any."""
    beside = extras_path(path)
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
    extras = extras_path(path)
    plan = [Planned(name, tuple(value.shape), value.dtype, value.detach) for name, value in values.items()]
    metadata = {_CONFIG_KEY: json.dumps(config_json(model, torch.float32), sort_keys=True)}
    metadata[_OWNER_KEY] = _fingerprint(checkpoint)
    write_safetensors(extras, plan, metadata)
    return extras
