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

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.extras import write_extras
from protea.checkpoints.files import CONFIG, staged, write_json
from protea.checkpoints.hf_config import read_config, write_config
from protea.checkpoints.layout import APART, Layout, Place, Planned, plan_of
from protea.checkpoints.safetensors_files import INDEX, WEIGHTS, SafetensorsFiles, shards, write_safetensors
from protea.checkpoints.torch_file import open_state_dicts
from protea.models import initial_value
from protea.models.encoder import Encoder

NAME: Final = "hf"
TITLE: Final = "a Hugging Face folder"

MAX_SHARD_BYTES: Final = 5 << 30
"""Above this a checkpoint is split, as ``transformers`` does."""

_MODULES: Final = {
    "word_embeddings": "esm.embeddings.word_embeddings",
    "position_embeddings": "esm.embeddings.position_embeddings",
    "emb_layer_norm_before": "esm.embeddings.layer_norm",
    "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "contact_head.regression": "esm.contact_head.regression",
    "lm_head": "lm_head",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
}
_LAYER_MODULES: Final = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_BARE_ROOTS: Final = ("embeddings.", "encoder.", "contact_head.", "rotary_embeddings.")
_BIN: Final = "pytorch_model.bin"
_BIN_INDEX: Final = "pytorch_model.bin.index.json"


def hf_name(name: str) -> str:
    """Hugging Face's name for one of our parameters."""
    module, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        return f"esm.encoder.layer.{match[1]}.{_LAYER_MODULES[match[2]]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def normalized(key: str) -> str:
    """A key as ``EsmForMaskedLM`` of transformers 4 spells it, whoever wrote it."""
    if key.startswith(_BARE_ROOTS):
        key = f"esm.{key}"
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


def _leftover(key: str) -> bool:
    """A repeat of the tied head, position ids, or the position embeddings that rotary files carry for nothing."""
    return key.endswith(".position_ids") or key.startswith(("lm_head.decoder.", _MODULES["position_embeddings"]))


LAYOUT: Final = Layout(
    place=lambda name: Place(hf_name(name)),
    # Readers look for frequencies in every layer, and rounding them further would move every position.
    frequencies=lambda layer: (f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq",),
    leftovers=_leftover,
)


# --- reading -----------------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Whether a path is a folder with a ``config.json``."""
    return path.is_dir() and (path / CONFIG).exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: ``config.json`` and ``model.safetensors``, its shards, or ``pytorch_model.bin``.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts the configuration, naming file, tensor, shapes.
    """
    config = read_config(folder)
    legacy = not any((folder / name).exists() for name in (WEIGHTS, INDEX)) and any(folder.glob("pytorch_model*.bin*"))
    tensors = (
        open_state_dicts(shards(folder, _BIN, _BIN_INDEX), normalized)
        if legacy
        else SafetensorsFiles(shards(folder), normalized)
    )
    checkpoint = Checkpoint(config, tensors, LAYOUT, CONFIG)
    tied = (("weight", "word_embeddings.weight"), ("bias", "lm_head.bias"))
    checkpoint.check_tied(*((f"lm_head.decoder.{kind}", hf_name(name)) for kind, name in tied))
    return checkpoint


# --- writing -----------------------------------------------------------------------------------------------------


def unsupported(model: Encoder) -> None:
    """This layout holds every family."""


def save(model: Encoder, folder: Path) -> None:
    """Write a model so that Protea and ``transformers`` load it back unchanged.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    parameters = dict(model.named_parameters())
    dtype = model.word_embeddings.weight.dtype
    with staged(folder) as place:
        write(place, model, lambda name: parameters[name], dtype)


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
    plan = plan_of(model, LAYOUT, parameter, dtype)
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
