"""Hugging Face's ``config.json`` and vocabulary files, to and from our configurations."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

import torch

from protea.alphabet import Alphabet
from protea.checkpoints.json_files import CONFIG, read_json, read_text, write_json
from protea.checkpoints.safetensors_files import WEIGHTS
from protea.errors import CheckpointError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.models.registry import families, family_of

VOCABULARY: Final = "vocab.txt"

NAME: Final = "hf"
"""What ``--to`` calls the format."""


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
    kind = family.config_type
    missing = [key for key in kind.required if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} missing")
    values = dict(kind.absent)
    for name, wanted in _field_types(kind).items():
        if raw.get(name) is not None:
            _check_type(raw, name, wanted)
            values[name] = raw[name]
    config = family.stored[NAME].config(raw, values, {})
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


def _family(raw: dict[str, Any]) -> type[Encoder]:
    named = (family for family in families() if family.config_type.model_type == raw.get("model_type"))
    found = next((one for one in named if NAME in one.stored and one.stored[NAME].accepts(raw)), None)
    if found is None:
        *most, last = sorted({repr(one.config_type.model_type) for one in families() if NAME in one.stored})
        raise CheckpointError(
            f"model_type {raw.get('model_type')!r} is not supported; Protea reads {', '.join(most)} and {last}"
        )
    return found


def _check_type(raw: dict[str, Any], name: str, kind: type) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(raw[name], allowed) or (isinstance(raw[name], bool) and kind is not bool):
        raise CheckpointError(f"{name} must be of type {kind.__name__}, got {raw[name]!r}")


def _field_types(kind: type[EncoderConfig]) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


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
    """Write ``config.json``, the vocabulary, and what ``AutoTokenizer`` looks for if it has one for the family."""
    write_json(folder / CONFIG, config_json(model, dtype))
    _write_tokenizer(folder, model)


def config_json(model: Encoder, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` says of a model stored as ``dtype``."""
    config = model.config
    family = family_of(config)
    stored = family.stored[NAME]
    with_head, without = stored.classes or (family.__name__, family.__name__)
    values = asdict(config) | {
        "architectures": [with_head if model.lm_head is not None else without],
        "model_type": config.model_type,
        "mask_token_id": model.alphabet.mask,
        "pad_token_id": model.alphabet.pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return values | stored.describe(config)


def _write_tokenizer(folder: Path, model: Encoder) -> None:
    alphabet = model.alphabet
    (folder / VOCABULARY).write_text("\n".join(alphabet.tokens) + "\n", encoding="utf-8")
    tokenizer = family_of(model.config).stored[NAME].tokenizer
    if not tokenizer:
        return
    ids = {
        "unk_token": alphabet.unk,
        "cls_token": alphabet.bos,
        "pad_token": alphabet.pad,
        "mask_token": alphabet.mask,
        "eos_token": alphabet.eos,
    }
    special = {name: alphabet.tokens[token] for name, token in ids.items() if token is not None}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": tokenizer})
