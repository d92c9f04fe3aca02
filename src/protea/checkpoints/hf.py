"""Hugging Face's layout, which is Protea's own: ``config.json`` beside one or several safetensors files.

Reads what ``transformers`` 4 and 5 write for ``EsmForMaskedLM``, ``EsmModel`` and the classification models, and
writes what both load unchanged. ESM-1nv, for which ``transformers`` has no class, uses the same layout and the same
tensor names with ``model_type`` ``esm1nv``. Weights stay memory-mapped wherever their type needs no change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from protea.checkpoints import hf_config
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.checkpoints.hf_config import read_config, write_config
from protea.checkpoints.json_files import CONFIG, staged, write_json
from protea.checkpoints.layout import APART, Layout, Planned, plan_of
from protea.checkpoints.safetensors_files import INDEX, WEIGHTS, SafetensorsFiles, shards, write_safetensors
from protea.checkpoints.sidecar import write_extras
from protea.checkpoints.tensors import Tensors
from protea.models.encoder import Encoder
from protea.models.registry import family_of, initial_value
from protea.transforms.cpu import unpacked

NAME: Final = hf_config.NAME
TITLE: Final = "a Hugging Face folder"

MAX_SHARD_BYTES: Final = 5 << 30
"""Above this a checkpoint is split, as ``transformers`` does."""

_BARE_ROOTS: Final = ("embeddings.", "encoder.", "contact_head.", "rotary_embeddings.")
_BIN: Final = "pytorch_model.bin"
_BIN_INDEX: Final = "pytorch_model.bin.index.json"


def normalized(key: str) -> str:
    """A key as ``EsmForMaskedLM`` of transformers 4 spells it, whoever wrote it."""
    if key.startswith(_BARE_ROOTS):
        key = f"esm.{key}"
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


def _leftover(key: str) -> bool:
    """A repeat of the tied head, position ids, or the position embeddings that rotary files carry for nothing."""
    return key.endswith(".position_ids") or key.startswith(("lm_head.decoder.", "esm.embeddings.position_embeddings"))


def layout(family: type[Encoder]) -> Layout:
    """How the format keeps a family."""
    return Layout(keys=family.stored[NAME].keys, leftovers=_leftover)


# --- reading -----------------------------------------------------------------------------------------------------


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: ``config.json`` and ``model.safetensors``, its shards, or ``pytorch_model.bin``.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts the configuration, naming file, tensor, shapes.
    """
    config = read_config(folder)
    arranged = layout(family_of(config))
    legacy = not any((folder / name).exists() for name in (WEIGHTS, INDEX)) and any(folder.glob("pytorch_model*.bin*"))
    tensors = _legacy(folder) if legacy else SafetensorsFiles(shards(folder), normalized)
    checkpoint = Checkpoint(config, tensors, arranged, CONFIG)
    tied = (("weight", "word_embeddings.weight"), ("bias", "lm_head.bias"))
    places = ((f"lm_head.decoder.{kind}", arranged.place(name)) for kind, name in tied)
    checkpoint.check_tied(*((repeat, place.key) for repeat, place in places if place is not None))
    return checkpoint


def _legacy(folder: Path) -> Tensors:
    """The tensors of ``pytorch_model.bin`` or its shards."""
    from protea.checkpoints.torch_file import open_state_dicts

    return open_state_dicts(shards(folder, _BIN, _BIN_INDEX), normalized)


# --- writing -----------------------------------------------------------------------------------------------------


def unsupported(model: Encoder) -> str | None:
    """Why this layout cannot hold a model: its family has no table for it."""
    return None if NAME in type(model).stored else f"{model.config.family} has no names there"


def save(model: Encoder, folder: Path) -> None:
    """Write a model so that Protea and ``transformers`` load it back unchanged.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    with staged(folder) as place:
        # A model that was packed for computing has its parameters elsewhere; a blank one says which there are.
        write(place, like(model), unpacked(model), model.compute_dtype)


def write_random(folder: Path, model: Encoder, *, seed: int, dtype: torch.dtype) -> None:
    """Write a model with random weights, one tensor at a time, by its family's published initialisation.

    Args:
        folder: must not exist, or be empty.
        model: the architecture; may be on the meta device.
        seed: same seed, same weights.
        dtype: type to store.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    with staged(folder) as place:
        write(place, model, lambda name: initial_value(model, name, seed).to(dtype), dtype)


def write(
    folder: Path,
    model: Encoder,
    parameter: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint one tensor at a time, and beside it a bilinear contact head, which ``transformers`` ignores.

    Args:
        folder: where; made if need be.
        model: says which parameters there are; may be on the meta device.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.
        max_shard_bytes: size above which a file is split.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    plan = plan_of(model, layout(type(model)), parameter, dtype)
    files = _split(plan, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, some in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, some)
        weight_map |= dict.fromkeys((planned.key for planned in some), name)
    if len(files) > 1:
        total = sum(planned.size for planned in plan)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_config(folder, model, dtype)
    if apart := {name: parameter(name) for name, _ in model.named_parameters() if name in APART}:
        with open_checkpoint(folder) as written:
            write_extras(folder, written, model, apart)


def _split(plan: list[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    files: list[list[Planned]] = [[]]
    filled = 0
    for planned in plan:
        if files[-1] and filled + planned.size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(planned)
        filled += planned.size
    return files
