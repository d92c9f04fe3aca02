"""Hugging Face's layout, which is Protea's own: ``config.json`` beside one or several safetensors files.

Reads what ``transformers`` 4 and 5 write for ``EsmForMaskedLM``, ``EsmModel`` and the classification models, and
writes what both load unchanged. ESM-1nv, for which ``transformers`` has no class, uses the same layout and the same
tensor names with ``model_type`` ``esm1nv``. Weights stay memory-mapped wherever their type needs no change.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from protea.checkpoints.files import CONFIG, INDEX, WEIGHTS, Weights, new_folder, write_json
from protea.checkpoints.hf_config import read_config, write_config
from protea.errors import CheckpointError, ProteaWarning
from protea.models import build, initial_value
from protea.models.encoder import Encoder, EncoderConfig
from protea.models.esm2 import ESM2

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
_INV_FREQ: Final = "rotary_embeddings.inv_freq"
_DECODER: Final = "lm_head.decoder."
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_MISFIT: Final = f"the file does not fit its {CONFIG}, or is incomplete: fetch both again"


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


# --- reading -----------------------------------------------------------------------------------------------------


def read(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Encoder:
    """Load a checkpoint folder.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` or its shards.
        dtype: type of all parameters; rotary frequencies stay float32.
        device: where they go.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts the configuration, naming file, tensor, shapes.
    """
    config = read_config(folder)
    with Weights(folder, normalized) as weights:
        model = skeleton(config, weights)
        expected = {name: hf_name(name) for name, _ in model.named_parameters()}
        state = {name: weights[key].to(device=device, dtype=dtype) for name, key in expected.items()}
        if isinstance(model, ESM2):
            state["inv_freq"] = _stored_frequencies(model, weights).to(device)
        _check_tied(weights)
        _report_ignored(folder, weights, expected.values())
    model.load_state_dict(state, assign=True)
    return model


def skeleton(config: EncoderConfig, weights: Weights) -> Encoder:
    """The model that some weights make up, on the meta device, with the heads they have, every shape checked.

    Raises:
        CheckpointError: the configuration and the weights do not fit together.
    """
    model = build(config)
    # A checkpoint of the bare encoder, or one without contact head, is complete without them.
    if not any(key.startswith("lm_head.") for key in weights):
        model.lm_head = None
    if not any(key.startswith(_MODULES["contact_head.regression"]) for key in weights):
        model.contact_head = None
    _check_shapes(model, weights, {name: hf_name(name) for name, _ in model.named_parameters()})
    return model


def _check_shapes(model: Encoder, weights: Weights, expected: Mapping[str, str]) -> None:
    if missing := [key for key in expected.values() if key not in weights]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{', '.join(map(str, weights.paths))}: no tensor {missing[0]}{more}; {_MISFIT}")
    for name, parameter in model.named_parameters():
        key = expected[name]
        found = weights.shape(key)
        if found != tuple(parameter.shape):
            raise CheckpointError(
                f"{weights.path(key)}: {key} has shape {list(found)}, {CONFIG} asks for {list(parameter.shape)}; "
                f"{_MISFIT}"
            )
        _check_floating(weights, key)


def _check_floating(weights: Weights, key: str) -> None:
    """Quantized weights mean nothing without their scales, whatever type they are converted to."""
    if weights.dtype(key) not in _FLOATS:
        raise CheckpointError(
            f"{weights.path(key)}: {key} is stored as {weights.dtype(key)}, which is not supported; save it as one of "
            f"{', '.join(_FLOATS)}"
        )


def _stored_frequencies(model: ESM2, weights: Weights) -> Tensor:
    """The file's rotary frequencies, which Meta's models carry rounded to float16; the exact ones if it has none."""
    exact = model.inv_freq
    keys = sorted(key for key in weights if key.endswith(_INV_FREQ))
    if not keys:
        return exact
    stored = weights[keys[0]]
    for key in keys:
        _check_floating(weights, key)
        if weights.shape(key) != tuple(exact.shape):
            raise CheckpointError(
                f"{weights.path(key)}: {key} has shape {list(weights.shape(key))}, {CONFIG} asks for "
                f"{list(exact.shape)}; {_MISFIT}"
            )
        if not torch.equal(weights[key], stored):
            raise CheckpointError(
                f"{weights.path(key)}: {key} differs from {keys[0]}, and one for all layers is supported; fetch the "
                "file again, or leave these tensors out to have them computed"
            )
    if stored.dtype == torch.bfloat16:
        warnings.warn(
            f"{weights.path(keys[0])}: {_INV_FREQ} is stored in bfloat16, too coarse for positions; computed anew "
            f"from rope_theta {model.config.rope_theta:g}",
            ProteaWarning,
            stacklevel=2,
        )
        return exact
    return stored.to(torch.float32)


def _check_tied(weights: Weights) -> None:
    """Files may repeat the tied output matrix and its bias; ones that differ belong to another architecture."""
    for kind, tied in (("weight", hf_name("word_embeddings.weight")), ("bias", hf_name("lm_head.bias"))):
        key = f"{_DECODER}{kind}"
        if key in weights and not torch.equal(weights[key], weights[tied]):
            raise CheckpointError(
                f"{weights.path(key)}: {key} differs from {tied}; an untied head is not supported: leave {key} out if "
                f"{tied} is right"
            )


def _report_ignored(folder: Path, weights: Weights, used: Iterable[str]) -> None:
    """Name what the file holds and the model has no use for; known leftovers are not worth a word."""
    unknown = sorted(
        key
        for key in weights.keys() - set(used)
        if not key.endswith((_INV_FREQ, ".position_ids"))
        and not key.startswith((_DECODER, _MODULES["position_embeddings"]))
    )
    if unknown:
        roots = sorted({key.split(".")[0] for key in unknown})
        warnings.warn(
            f"{folder}: {len(unknown)} tensors have no place in the model and were left out: "
            f"{', '.join(f'{root}.*' for root in roots)} (first: {unknown[0]})",
            ProteaWarning,
            stacklevel=2,
        )


# --- writing -----------------------------------------------------------------------------------------------------


def save(model: Encoder, folder: Path) -> None:
    """Write a model so that Protea and ``transformers`` load it back unchanged.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    parameters = dict(model.named_parameters())
    write(folder, model, lambda name: parameters[name].detach().cpu())


def write_random(folder: Path, model: Encoder, *, seed: int, dtype: torch.dtype) -> None:
    """Write a model with random weights, one shard at a time, by its family's published initialisation.

    Args:
        folder: must not exist, or be empty.
        model: the architecture; may be on the meta device.
        seed: same seed, same weights.
        dtype: type to store.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    write(folder, model, lambda name: initial_value(model, name, seed), dtype=dtype)


def write(
    folder: Path,
    model: Encoder,
    parameter: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint one shard at a time; no more than a shard is held in memory.

    Args:
        folder: must not exist, or be empty; appears only when complete.
        model: says which parameters there are; may be on the meta device.
        parameter: gives the value of a parameter by our name.
        dtype: type to store; the values' own by default.
        max_shard_bytes: size above which a file is split.

    Raises:
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    shards = _plan_shards(model, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    with new_folder(folder) as temporary:
        for number, names in enumerate(shards, start=1):
            tensors = {hf_name(name): parameter(name).to(dtype=dtype).contiguous() for name in names}
            if number == 1 and isinstance(model, ESM2):
                # Readers look for them in every layer, and rounding them further would move every position.
                for layer in range(model.config.num_hidden_layers):
                    key = f"esm.encoder.layer.{layer}.attention.self.{_INV_FREQ}"
                    tensors[key] = model.inv_freq.to("cpu", torch.float32, copy=True)
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(tensors, temporary / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            stored_dtype = next(iter(tensors.values())).dtype
        if len(shards) > 1:
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_config(temporary, model, stored_dtype)


def _plan_shards(model: Encoder, dtype: torch.dtype | None, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * (dtype or parameter.dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
