"""NVIDIA's TransformerEngine recipe for ESM-2 (``nvidia/esm2_*``): ``config.json`` beside safetensors.

The files are Hugging Face's, the modules TransformerEngine's: norms fused with the projections after them, query, key
and value fused and interleaved head by head, vocabulary rows padded to a multiple of 64 with an output bias of the
type's lowest number. Keys begin with ``model.`` or, in later versions, ``esm.``. Source: the recipe's ``convert.py``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import RECIPE_MODEL_TYPE
from protea.checkpoints.hf_config import config_from, config_json, write_vocabulary
from protea.checkpoints.layout import Layout, Parameter, plan_of, true_vocabulary
from protea.checkpoints.settings_files import CONFIG, read_json, write_json
from protea.checkpoints.tensors import WEIGHTS, open_safetensors, shards, write_safetensors
from protea.checkpoints.vocabulary import VOCABULARY
from protea.checkpoints.wrappers import unwrap
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.registry import family_of

NAME: Final = "te"
TITLE: Final = "a folder of NVIDIA's TransformerEngine recipe"


def _layout(family: type[Encoder], *, interleaved: bool = True) -> Layout:
    return Layout(
        keys=family.stored[NAME].keys,
        interleaved=interleaved,
        padding=64,
        bias_padding=lambda dtype: torch.finfo(dtype).min,
        leftovers=r"lm_head\.decoder\.weight",
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder of the recipe (see ``Format``)."""
    described = read_json(folder / CONFIG)
    tensors = open_safetensors(shards(folder))
    unwrap(tensors, "embeddings.word_embeddings.weight", r"(?:model|esm)\.")
    tensors.rename(lambda key: re.sub(r"^esm\.", "model.", key))
    try:
        config = config_from(described | {"model_type": "esm"})
        family = family_of(config)
        if NAME not in family.stored:
            raise CheckpointError("position_embedding_type is not 'rotary', which the recipe's models have")
        layout = _layout(family, interleaved=described.get("qkv_weight_interleaved", True) is not False)
        config = replace(config, vocab_size=true_vocabulary(tensors, layout, len(config.alphabet)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    checkpoint = Checkpoint(config, tensors, layout, CONFIG)
    checkpoint.check_tied(("lm_head.decoder.weight", "model.embeddings.word_embeddings.weight"))
    return checkpoint


def write(folder: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write a folder that ``NVEsmForMaskedLM.from_pretrained`` loads (see ``Format``)."""
    folder.mkdir(exist_ok=True)
    layout = _layout(type(model))
    write_safetensors(folder / WEIGHTS, plan_of(model, layout, parameter, dtype))
    described = {
        "architectures": ["NVEsmForMaskedLM"],
        "model_type": RECIPE_MODEL_TYPE,
        "vocab_size": len(model.alphabet),
        "padded_vocab_size": layout.padded(model.config.vocab_size),
        "qkv_weight_interleaved": True,
        "encoder_activation": "gelu",
        "attn_input_format": "bshd",
        "fuse_qkv_params": True,
    }
    write_json(folder / CONFIG, config_json(model, dtype, NAME) | described)
    write_vocabulary(folder / VOCABULARY, model)
