"""What is kept beside a checkpoint because its format has no room for it: parameters, rotary frequencies, settings."""

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
from protea.checkpoints.layout import Planned
from protea.checkpoints.safetensors_files import SafetensorsFiles, write_safetensors
from protea.checkpoints.tensors import FLOATS, raw_bytes
from protea.errors import CheckpointError
from protea.models.encoder import Encoder

EXTRAS: Final = "extras.safetensors"
HEAD_RECORD: Final = "contact-head.json"
_CONFIG_KEY: Final = "protea_config"
_OWNER_KEY: Final = "protea_written_for"
_TELLING: Final[tuple[str, ...]] = (
    "word_embeddings.weight",
    "layers.0.self_attn.out_proj.weight",
    "emb_layer_norm_after.weight",
)


def extras_path(path: Path) -> Path:
    """Where what a format has no room for is kept: in a folder, or beside a file."""
    return path / EXTRAS if path.is_dir() else path.with_name(f"{path.name}.{EXTRAS}")


def head_record_path(path: Path) -> Path:
    """Where the record of how a checkpoint's contact head was fitted is kept: in a folder, or beside a file."""
    return path / HEAD_RECORD if path.is_dir() else path.with_name(f"{path.name}.{HEAD_RECORD}")


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
    names = [name for entry in checkpoint.entries for name in entry.names]
    # A family that has none of these is told by its first parameter and its last.
    for name in [name for name in _TELLING if name in names] or [names[0], names[-1]]:
        digest.update(raw_bytes(checkpoint.parameter(name)))
    return digest.hexdigest()


def write_extras(path: Path, checkpoint: Checkpoint, model: Encoder, values: Mapping[str, Tensor]) -> Path:
    """Keep beside a checkpoint what its format has no room for.

    Args:
        path: the checkpoint.
        checkpoint: the same, opened, without anything beside it.
        model: whose configuration is kept.
        values: parameters and buffers by our names.

    Returns:
        The file.
    """
    plan = [Planned(name, tuple(value.shape), value.dtype, value.detach) for name, value in values.items()]
    metadata = {_CONFIG_KEY: json.dumps(config_json(model, torch.float32), sort_keys=True)}
    metadata[_OWNER_KEY] = _fingerprint(checkpoint)
    write_safetensors(extras_path(path), plan, metadata)
    return extras_path(path)
