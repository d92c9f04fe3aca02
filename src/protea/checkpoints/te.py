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

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import RECIPE_MODEL_TYPE
from protea.checkpoints.hf_config import config_from
from protea.checkpoints.json_files import CONFIG, read_json, write_json
from protea.checkpoints.layout import Layout, plan_of, true_vocabulary
from protea.checkpoints.safetensors_files import WEIGHTS, SafetensorsFiles, shards, write_safetensors
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.registry import family_of

NAME: Final = "te"
TITLE: Final = "a folder of NVIDIA's TransformerEngine recipe"

_PADDING: Final = 64


def layout(family: type[Encoder], *, interleaved: bool = True) -> Layout:
    """How the recipe keeps a family."""
    return Layout(
        keys=family.stored[NAME].keys,
        interleaved=interleaved,
        padding=_PADDING,
        bias_padding=lambda dtype: torch.finfo(dtype).min,
        leftovers=lambda key: key == "lm_head.decoder.weight",
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of the recipe.

    Raises:
        CheckpointError: a file is missing, truncated or contradicts the configuration, naming file, tensor, shapes.
    """
    raw = read_json(folder / CONFIG)
    tensors = SafetensorsFiles(shards(folder), lambda key: re.sub(r"^esm\.", "model.", key))
    try:
        config = config_from(raw | {"model_type": "esm"})
        family = family_of(config)
        if NAME not in family.stored:
            raise CheckpointError("position_embedding_type is not 'rotary', which the recipe's models have")
        arranged = layout(family, interleaved=raw.get("qkv_weight_interleaved", True) is not False)
        config = replace(config, vocab_size=true_vocabulary(tensors, arranged, len(config.alphabet)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    checkpoint = Checkpoint(config, tensors, arranged, CONFIG)
    words = arranged.place("word_embeddings.weight")
    assert words is not None
    checkpoint.check_tied(("lm_head.decoder.weight", words.key))
    return checkpoint


def unsupported(model: Encoder) -> str | None:
    """Why the recipe has no such model."""
    return None if NAME in type(model).stored else f"the recipe has no {model.config.family}"


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
    write_safetensors(folder / WEIGHTS, plan_of(model, layout(type(model)), parameter, dtype))
    config = model.config
    rows = -(-config.vocab_size // _PADDING) * _PADDING
    described: dict[str, Any] = asdict(config) | {
        "architectures": ["NVEsmForMaskedLM"],
        "model_type": RECIPE_MODEL_TYPE,
        "mask_token_id": model.alphabet.mask,
        "pad_token_id": model.alphabet.pad,
        "vocab_size": len(model.alphabet),
        "padded_vocab_size": rows,
        "qkv_weight_interleaved": True,
        "encoder_activation": "gelu",
        "attn_input_format": "bshd",
        "fuse_qkv_params": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / CONFIG, described | type(model).stored[NAME].describe(config))
    (folder / "vocab.txt").write_text("\n".join(model.alphabet.tokens) + "\n", encoding="utf-8")
