"""Hugging Face's ``config.json`` and vocabulary files, to and from our configurations."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

import torch

from protea.checkpoints.settings_files import CONFIG, read_json, write_json
from protea.checkpoints.tensors import WEIGHTS
from protea.checkpoints.vocabulary import PIECES, TOKENIZER, VOCABULARY, check_vocabulary, stored_tokens
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import families

NAME: Final = "hf"
"""The name of the format for ``--to``."""

_TOKENS: Final = "tokens"
"""The field of configurations that have a vocabulary of their own."""


def read_config(folder: Path) -> EncoderConfig:
    """The configuration in a checkpoint folder."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder}: no {CONFIG}; a checkpoint folder holds {CONFIG} and {WEIGHTS}")
    described = read_json(path)
    try:
        if own := hasattr(_family(described).config_type, _TOKENS):
            described = described | _own_tokens(folder, described.get(_TOKENS))
        config = config_from(described)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not own:
        check_vocabulary(folder / VOCABULARY, config.alphabet)
    return config


def _own_tokens(folder: Path, described: Any) -> dict[str, Any]:
    """The tokens of a checkpoint with a vocabulary of its own, from the tokenizer's files or else as described."""
    tokens = stored_tokens(folder)
    if tokens is None and described is None:
        raise CheckpointError(f"no vocabulary: copy the model's {TOKENIZER} or {PIECES} into the folder")
    if None not in (tokens, described) and described != list(tokens or ()):
        raise CheckpointError(f"{_TOKENS} are not those of the tokenizer's files; remove the wrong ones")
    return {} if tokens is None else {_TOKENS: list(tokens)}


def _family(described: dict[str, Any]) -> type[Encoder]:
    """The family that a ``config.json`` means."""
    model_type = described.get("model_type")
    readable = (family for family in families() if family.config_type.model_type == model_type)
    family = next((family for family in readable if family.stored[NAME].accepts(described)), None)
    if family is None:
        *most, last = sorted({repr(family.config_type.model_type) for family in families()})
        raise CheckpointError(f"model_type {model_type!r} is not supported; Protea reads {', '.join(most)} and {last}")
    return family


def config_from(described: dict[str, Any]) -> EncoderConfig:
    """The configuration that a ``config.json`` describes."""
    family = _family(described)
    kind = family.config_type
    described = {**described, **{ours: described.get(theirs) for ours, theirs in kind.spelled.items()}}
    if missing := [kind.spelled.get(key, key) for key in kind.required if described.get(key) is None]:
        raise CheckpointError(f"{', '.join(missing)} missing")
    values = dict(kind.absent)
    hints = get_type_hints(kind)
    for field in fields(kind):
        if described.get(field.name) is not None:
            values[field.name] = _checked(described, field.name, hints[field.name])
    config = family.stored[NAME].config(described, values, {})
    alphabet = config.alphabet
    if config.vocab_size < len(alphabet):
        raise CheckpointError(
            f"vocab_size {config.vocab_size} is smaller than the {len(alphabet)} tokens of the {alphabet.name} "
            "alphabet; models with another alphabet are not supported"
        )
    for key, token in (("mask_token_id", alphabet.mask), ("pad_token_id", alphabet.pad)):
        if described.get(key) not in (None, token):
            raise CheckpointError(
                f"{key} {described[key]} is not the {alphabet.name} alphabet's {token}; models with another alphabet "
                "are not supported"
            )
    return config


def _checked(described: dict[str, Any], name: str, kind: Any) -> Any:
    value = described[name]
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise CheckpointError(f"{name} must be a list of strings")
        return tuple(value)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def write_config(folder: Path, model: Encoder, dtype: torch.dtype) -> None:
    """Write ``config.json``, the vocabulary, and the files that ``AutoTokenizer`` needs if it knows the family."""
    write_json(folder / CONFIG, config_json(model, dtype))
    files = type(model).stored[NAME].tokenizer_files(model.config)
    for name, content in files.items():
        write_json(folder / name, content)
    if TOKENIZER not in files:
        write_vocabulary(folder / VOCABULARY, model)


def write_vocabulary(path: Path, model: Encoder) -> None:
    """Write a model's tokens, one per line."""
    path.write_text("\n".join(model.alphabet.tokens) + "\n", encoding="utf-8")


def config_json(model: Encoder, dtype: torch.dtype, form: str = NAME) -> dict[str, Any]:
    """The content of ``config.json`` for a model stored as ``dtype`` in a format."""
    config, family = model.config, type(model)
    with_head, without_head = family.stored[NAME].classes or (family.__name__, family.__name__)
    values = {config.spelled.get(name, name): value for name, value in asdict(config).items()} | {
        "architectures": [without_head if model.lm_head is None else with_head],
        "model_type": config.model_type,
        "mask_token_id": model.alphabet.mask,
        "pad_token_id": model.alphabet.pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return values | family.stored[form].describe(config)
