"""Hugging Face's ``config.json`` and vocabulary files, to and from our configurations."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

import torch

from protea.alphabet import Alphabet
from protea.checkpoints.files import CONFIG, read_json, read_text, write_json
from protea.checkpoints.safetensors_files import WEIGHTS
from protea.errors import CheckpointError
from protea.models.encoder import Encoder, EncoderConfig
from protea.models.esm1b import ESM1bConfig
from protea.models.esm1nv import ESM1nvConfig
from protea.models.esm2 import ESM2Config

VOCABULARY: Final = "vocab.txt"


def read_config(folder: Path) -> EncoderConfig:
    """The configuration in a checkpoint folder.

    Raises:
        CheckpointError: ``config.json`` is missing, damaged, or describes something Protea does not run.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder}: no {CONFIG}; a checkpoint folder holds {CONFIG} and {WEIGHTS}")
    raw = read_json(path)
    try:
        config = config_from(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_vocabulary(folder, config.alphabet)
    return config


def config_from(raw: dict[str, Any]) -> EncoderConfig:
    """The configuration that a ``config.json`` describes.

    Raises:
        CheckpointError: a value is missing, of the wrong type or out of range, or describes what Protea does not run.
    """
    family = _family(raw)
    required = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} missing")
    # Where a file leaves a key out, transformers' class defaults apply, not the published models' values.
    values: dict[str, Any] = {
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    if raw["model_type"] == "esm":
        values |= {"token_dropout": False}
    for name, kind in _field_types(family).items():
        if raw.get(name) is not None:
            _check_type(raw, name, kind)
            values[name] = raw[name]
    config = family(**values)
    alphabet = config.alphabet
    if config.vocab_size < len(alphabet):
        raise CheckpointError(
            f"vocab_size {config.vocab_size} is smaller than the {len(alphabet)} tokens of the {alphabet.name} "
            "alphabet; models with another alphabet are not supported"
        )
    for key, token_id in (("mask_token_id", alphabet.mask), ("pad_token_id", alphabet.pad)):
        if raw.get(key) not in (None, token_id):
            raise CheckpointError(
                f"{key} {raw[key]} is not the {alphabet.name} alphabet's {token_id}; models with another alphabet "
                "are not supported"
            )
    return config


def _family(raw: dict[str, Any]) -> type[EncoderConfig]:
    if raw.get("model_type") == ESM1nvConfig.model_type:
        return ESM1nvConfig
    if raw.get("model_type") != ESM2Config.model_type:
        raise CheckpointError(f"model_type {raw.get('model_type')!r} is not supported; Protea reads 'esm' and 'esm1nv'")
    for key, allowed in (
        ("is_folding_model", (None, False)),
        ("is_decoder", (None, False)),
        ("add_cross_attention", (None, False)),
        ("hidden_act", (None, "gelu")),
        ("tie_word_embeddings", (None, True)),
    ):
        if raw.get(key) not in allowed:
            raise CheckpointError(f"{key} {raw[key]!r} is not supported; expected {allowed[1]!r}")
    if raw.get("emb_layer_norm_before") is None:
        raw["emb_layer_norm_before"] = False
    _check_type(raw, "emb_layer_norm_before", bool)
    position = raw.get("position_embedding_type", "absolute")
    if position == "absolute":
        return ESM1bConfig
    if position != "rotary":
        raise CheckpointError(f"position_embedding_type {position!r} is not supported; expected 'rotary' or 'absolute'")
    if raw["emb_layer_norm_before"]:
        raise CheckpointError("emb_layer_norm_before with rotary positions is no published architecture")
    return ESM2Config


def _check_type(raw: dict[str, Any], name: str, kind: type) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(raw[name], allowed) or (isinstance(raw[name], bool) and kind is not bool):
        raise CheckpointError(f"{name} must be of type {kind.__name__}, got {raw[name]!r}")


def _field_types(family: type[EncoderConfig]) -> dict[str, type]:
    hints = get_type_hints(family)
    return {field.name: hints[field.name] for field in fields(family)}


def _check_vocabulary(folder: Path, alphabet: Alphabet) -> None:
    path = folder / VOCABULARY
    try:
        tokens = tuple(read_text(path).split())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read: {reason}; fetch it again, or remove it") from error
    if tokens[: len(alphabet)] != alphabet.tokens:
        differing = next(
            (i for i, (a, b) in enumerate(zip(tokens, alphabet.tokens, strict=False)) if a != b), len(tokens)
        )
        found = tokens[differing] if differing < len(tokens) else "nothing"
        raise CheckpointError(
            f"{path}: token {differing} is {found!r} where the {alphabet.name} alphabet has "
            f"{alphabet.tokens[differing]!r}; models with another alphabet are not supported"
        )


def write_config(folder: Path, model: Encoder, dtype: torch.dtype) -> None:
    """Write ``config.json``, the vocabulary, and for the ESM alphabet what ``AutoTokenizer`` looks for."""
    write_json(folder / CONFIG, config_json(model, dtype))
    _write_tokenizer(folder, model)


def config_json(model: Encoder, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` says of a model stored as ``dtype``."""
    config = model.config
    values = asdict(config) | {
        "model_type": config.model_type,
        "mask_token_id": model.alphabet.mask,
        "pad_token_id": model.alphabet.pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(config, ESM1nvConfig):
        return values | {"architectures": ["ESM1nv"]}
    return values | {
        "architectures": ["EsmForMaskedLM" if model.lm_head is not None else "EsmModel"],
        "position_embedding_type": "rotary" if isinstance(config, ESM2Config) else "absolute",
        "emb_layer_norm_before": isinstance(config, ESM1bConfig) and config.emb_layer_norm_before,
        "is_folding_model": False,
        "esmfold_config": None,
        "vocab_list": None,
        "use_cache": True,
    }


def _write_tokenizer(folder: Path, model: Encoder) -> None:
    alphabet = model.alphabet
    (folder / VOCABULARY).write_text("\n".join(alphabet.tokens) + "\n", encoding="utf-8")
    if model.config.model_type != ESM2Config.model_type:
        return
    special = {
        "unk_token": alphabet.tokens[alphabet.unk],
        "cls_token": alphabet.tokens[alphabet.bos],
        "pad_token": alphabet.tokens[alphabet.pad],
        "mask_token": alphabet.tokens[alphabet.mask],
        "eos_token": alphabet.tokens[alphabet.eos],
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": "EsmTokenizer"})
