"""BioNeMo 1's ``.nemo``: a tar archive of ``model_config.yaml`` and ``model_weights.ckpt``, for ESM-1nv and ESM-2nv.

Megatron's names, vocabulary rows padded to a multiple of 128, query, key and value fused and interleaved head by head.
Tensor-parallel runs keep one ``mp_rank_XX/model_weights.ckpt`` for each rank. Sources: BioNeMo 1's
``base_config.yaml`` of both models, its converter from Hugging Face, and NeMo 1's ``bert_model.py``.
"""

from __future__ import annotations

import re
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import NEMO_CONFIG
from protea.checkpoints.hf_config import write_vocabulary
from protea.checkpoints.layout import Layout, Parameter, StoredShapes, plan_of, true_vocabulary
from protea.checkpoints.region import Region, folder_members, tar_members
from protea.checkpoints.settings_files import count, number, read_yaml, shown
from protea.checkpoints.tensors import StoredTensor, Tensors
from protea.checkpoints.torch_file import TorchFile, open_state_dicts, save_torch_file
from protea.checkpoints.vocabulary import VOCABULARY
from protea.checkpoints.wrappers import unwrap
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import stored_in

NAME: Final = "nemo"
TITLE: Final = "a .nemo file of BioNeMo 1"

_WEIGHTS: Final = "model_weights.ckpt"
_RANK: Final = re.compile(r"(mp|tp)_rank_\d+/" + re.escape(_WEIGHTS))
_LAYER: Final = re.compile(r"model\.language_model\.encoder\.layers\.(\d{1,6})\.")
_PADDING: Final = 128

_COLUMN_PARALLEL: Final = re.compile(
    r".*(query_key_value|dense_h_to_4h)\.(weight|bias)|.*word_embeddings\.weight|.*\.lm_head\.bias"
)
_ROW_PARALLEL: Final = re.compile(r".*(self_attention\.dense|dense_4h_to_h)\.weight")

_ONLY: Final = {
    "megatron_legacy": (None, False),
    "normalization": (None, "layernorm"),
    "share_embeddings_and_output_weights": (None, True),
    "position_embedding_type": (None, "rope", "learned_absolute"),
    "bias": (None, True),
    "activation": (None, "gelu"),
    "transformer_block_type": (None, "pre_ln"),
}
"""Supported values of settings that change the architecture."""


def _layout(family: type[Encoder]) -> Layout:
    return Layout(keys=family.stored[NAME].keys, padding=_PADDING)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.nemo`` file, or the folder that it was unpacked into (see ``Format``)."""
    members = folder_members(path, {NEMO_CONFIG, _WEIGHTS}) if path.is_dir() else tar_members(path)
    tensors = _open_weights(path, members)
    unwrap(tensors, "model.language_model.embedding.word_embeddings.weight")
    if NEMO_CONFIG not in members:
        raise CheckpointError(f"{path}: no {NEMO_CONFIG} in it; this is not a complete .nemo file")
    settings = read_yaml(members[NEMO_CONFIG])
    # NeMo writes the model's own section; the configuration of a whole run has it under ``model``.
    if isinstance(settings, dict) and isinstance(settings.get("model"), dict) and "num_attention_heads" not in settings:
        settings = settings["model"]
    try:
        family, config = _config(settings, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {NEMO_CONFIG}: {error}") from error
    return Checkpoint(config, tensors, _layout(family), NEMO_CONFIG)


def _open_weights(path: Path, members: dict[str, Region]) -> Tensors:
    names = sorted(name for name in members if name.rsplit("/", 1)[-1] == _WEIGHTS)
    if not names:
        raise CheckpointError(f"{path}: no {_WEIGHTS} in it; this is not a complete .nemo file")
    if names != [_WEIGHTS] and not all(_RANK.fullmatch(name) for name in names):
        parts = f"weights in {', '.join(names[:4])}; pipeline-parallel parts are not supported"
        raise CheckpointError(f"{path}: {parts}: merge them with NeMo's megatron_change_num_partitions.py")
    ranks: list[Tensors] = []
    for name in names:
        file = TorchFile(members[name])
        state = file.content
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        ranks.append(open_state_dicts({path: (file, state)}))
    return ranks[0] if len(ranks) == 1 else _merged(path, ranks)


def _merged(path: Path, ranks: list[Tensors]) -> Tensors:
    """The parts of a tensor-parallel run as whole tensors."""
    tensors, first = Tensors([path]), ranks[0]
    for key in sorted(set().union(*ranks)):
        kinds = [f"{rank.stored[key].dtype}{list(rank.shape(key))}" if key in rank else "nothing" for rank in ranks]
        if len(set(kinds)) > 1:
            raise CheckpointError(f"{path}: {key} differs between ranks: {', '.join(kinds)}")
        axis = 0 if _COLUMN_PARALLEL.fullmatch(key) else 1 if _ROW_PARALLEL.fullmatch(key) else None
        shape = list(first.shape(key))
        if axis is not None and axis < len(shape):
            shape[axis] *= len(ranks)
        read = partial(_read_merged, path, ranks, key, axis)
        tensors.add(key, StoredTensor(path, tuple(shape), first.stored[key].dtype, read))
    return tensors


def _read_merged(path: Path, ranks: list[Tensors], key: str, axis: int | None) -> Tensor:
    values = [rank[key] for rank in ranks]
    if axis is not None:
        return torch.cat(values, dim=axis)
    if not all(torch.equal(value, values[0]) for value in values):
        raise CheckpointError(f"{path}: {key} differs between ranks, which should hold the same")
    return values[0]


def _config(settings: Any, tensors: Tensors) -> tuple[type[Encoder], EncoderConfig]:
    if not isinstance(settings, dict):
        raise CheckpointError("no mapping of options")
    for key, allowed in _ONLY.items():
        if settings.get(key) not in allowed:
            raise CheckpointError(f"{key} {shown(settings[key])} is not supported; expected {allowed[-1]!r}")
    family = stored_in(NAME, settings)
    assert family is not None, "position_embedding_type tells the families apart"
    stored, layout = family.stored[NAME], _layout(family)
    shapes = StoredShapes(tensors, layout)
    rows, width = shapes["word_embeddings.weight"]
    depth = 1 + max((int(match[1]) for key in tensors if (match := _LAYER.match(key))), default=0)
    sizes = {
        "num_hidden_layers": count(settings, "num_layers", depth),
        "num_attention_heads": count(settings, "num_attention_heads"),
        "hidden_size": count(settings, "hidden_size", width),
        "intermediate_size": count(settings, "ffn_hidden_size", shapes["layers.0.fc1.weight"][0]),
        "vocab_size": rows if stored.padded else true_vocabulary(tensors, layout, len(family.config_type.alphabet)),
        "layer_norm_eps": number(settings, "layernorm_epsilon", 1e-5),
        "hidden_dropout_prob": number(settings, "hidden_dropout", 0.1),
        "attention_probs_dropout_prob": number(settings, "attention_dropout", 0.1),
        "initializer_range": number(settings, "init_method_std", 0.02),
    }
    return family, stored.config(settings, sizes, shapes)


def write(path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write a ``.nemo`` file of one part (see ``Format``).

    The weights are first written to a file beside it and then copied into it, so they need twice their space.
    """
    parts = {name: path.with_name(f".{path.name}.{name}") for name in (NEMO_CONFIG, _WEIGHTS, VOCABULARY)}
    parts[NEMO_CONFIG].write_text(yaml.safe_dump(_described(model), sort_keys=False), encoding="utf-8")
    plan = plan_of(model, _layout(type(model)), parameter, dtype)
    save_torch_file(parts[_WEIGHTS], lambda tensors: tensors, plan)
    write_vocabulary(parts[VOCABULARY], model)
    with tarfile.open(path, "w") as archive:
        for name, part in parts.items():
            member = tarfile.TarInfo(f"./{name}")  # no owner and no time, so that equal models give equal files
            member.size = part.stat().st_size
            with part.open("rb") as stream:
                archive.addfile(member, stream)
            part.unlink()


def _described(model: Encoder) -> dict[str, Any]:
    config: Any = model.config
    length = model.max_tokens or model.trained_tokens
    return {
        "seq_length": length,
        "max_position_embeddings": length,
        "encoder_seq_length": length,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "init_method_std": config.initializer_range,
        "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "kv_channels": None,
        "layernorm_epsilon": config.layer_norm_eps,
        "make_vocab_size_divisible_by": _PADDING,
        "pre_process": True,
        "post_process": True,
        "bert_binary_head": False,
        "megatron_legacy": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    } | type(model).stored[NAME].describe(config)
