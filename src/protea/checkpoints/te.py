"""NVIDIA's TransformerEngine recipe for ESM-2 (``nvidia/esm2_*``): ``config.json`` beside safetensors.

Hugging Face's outside, TransformerEngine's modules inside: norms fused with the projections after them, query, key and
value fused and interleaved head by head, vocabulary rows padded to 64 with an output bias of the type's lowest number.
Keys begin with ``model.`` or, in later versions, ``esm.``. Source: the recipe's ``convert.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.alphabet import ESM
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.files import CONFIG, read_json, write_json
from protea.checkpoints.hf_config import config_from
from protea.checkpoints.layout import Layout, Place, plan_of, true_vocabulary
from protea.checkpoints.safetensors_files import WEIGHTS, SafetensorsFiles, shards, write_safetensors
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.esm2 import ESM2Config

NAME: Final = "te"
TITLE: Final = "a folder of NVIDIA's TransformerEngine recipe"

_MODEL_TYPE: Final = "nv_esm"
_MODULES: Final = {
    "word_embeddings.weight": "model.embeddings.word_embeddings.weight",
    "emb_layer_norm_after.weight": "model.encoder.emb_layer_norm_after.weight",
    "emb_layer_norm_after.bias": "model.encoder.emb_layer_norm_after.bias",
    "lm_head.layer_norm.weight": "lm_head.decoder.layer_norm_weight",
    "lm_head.layer_norm.bias": "lm_head.decoder.layer_norm_bias",
    "lm_head.bias": "lm_head.decoder.bias",
}
_LAYER_MODULES: Final = {
    "self_attn.q_proj.": "self_attention.layernorm_qkv.",
    "self_attn.k_proj.": "self_attention.layernorm_qkv.",
    "self_attn.v_proj.": "self_attention.layernorm_qkv.",
    "self_attn.out_proj.": "self_attention.proj.",
    "self_attn_layer_norm.": "self_attention.layernorm_qkv.layer_norm_",
    "final_layer_norm.": "layernorm_mlp.layer_norm_",
    "fc1.": "layernorm_mlp.fc1_",
    "fc2.": "layernorm_mlp.fc2_",
}


def _place(name: str) -> Place:
    if match := re.fullmatch(r"layers\.(\d+)\.(.+\.)(weight|bias)", name):
        return Place(f"model.encoder.layers.{match[1]}.{_LAYER_MODULES[match[2]]}{match[3]}")
    return Place(_MODULES.get(name, name))


LAYOUT: Final = Layout(
    place=_place,
    padding=64,
    bias_padding=lambda dtype: torch.finfo(dtype).min,
    leftovers=lambda key: key == "lm_head.decoder.weight",
)


def recognise(path: Path) -> bool:
    """Whether a path is a folder whose configuration is the recipe's."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).get("model_type") == _MODEL_TYPE


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of the recipe.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts the configuration, naming file, tensor, shapes.
    """
    raw = read_json(folder / CONFIG)
    layout = replace(LAYOUT, interleaved=raw.get("qkv_weight_interleaved", True) is not False)
    tensors = SafetensorsFiles(shards(folder), lambda key: re.sub(r"^esm\.", "model.", key))
    try:
        config = config_from(raw | {"model_type": "esm"})
        if not isinstance(config, ESM2Config):
            raise CheckpointError("position_embedding_type is not 'rotary', which the recipe's models have")
        config = replace(config, vocab_size=true_vocabulary(tensors, layout, len(ESM)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    checkpoint = Checkpoint(config, tensors, layout, CONFIG)
    checkpoint.check_tied(("lm_head.decoder.weight", _MODULES["word_embeddings.weight"]))
    return checkpoint


def unsupported(model: Encoder) -> str | None:
    """Why the recipe has no such model."""
    if not isinstance(model.config, ESM2Config):
        return f"the recipe has no {model.config.family}"
    return None


def write(folder: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a folder in the recipe's layout, one tensor at a time; ``NVEsmForMaskedLM.from_pretrained`` takes it.

    Args:
        folder: where; made if need be.
        model: says which parameters there are; may be on the meta device.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    plan = [one for one in plan_of(model, LAYOUT, parameter, dtype) if not one.key.startswith("contact_head.")]
    write_safetensors(folder / WEIGHTS, plan)
    config = model.config
    rows = -(-config.vocab_size // LAYOUT.padding) * LAYOUT.padding
    described: dict[str, Any] = asdict(config) | {
        "architectures": ["NVEsmForMaskedLM"],
        "model_type": _MODEL_TYPE,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "mask_token_id": ESM.mask,
        "pad_token_id": ESM.pad,
        "vocab_size": len(ESM),
        "padded_vocab_size": rows,
        "qkv_weight_interleaved": True,
        "encoder_activation": "gelu",
        "attn_input_format": "bshd",
        "fuse_qkv_params": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / CONFIG, described)
    (folder / "vocab.txt").write_text("\n".join(ESM.tokens) + "\n", encoding="utf-8")
