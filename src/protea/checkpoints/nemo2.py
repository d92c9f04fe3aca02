"""BioNeMo 2's checkpoint directories for ESM-2: ``context/`` beside ``weights/`` in Megatron's distributed format.

Megatron stacks equal layers: the key has no number, and the tensor's first axis counts the layers. Other runs keep
``layers.N.`` in the key; both are read. Query, key and value are fused and interleaved head by head, norms belong to
the projection after them, the vocabulary is padded to a multiple of 128. Rotary frequencies are computed, not stored.
Sources: BioNeMo 2's converter from Hugging Face and megatron-core's ``dist_checkpointing``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.distcp import DistributedTensors, write_distributed
from protea.checkpoints.hf_config import write_vocabulary
from protea.checkpoints.layout import Layout, Parameter, StoredShapes, plan_of, true_vocabulary
from protea.checkpoints.region import Region
from protea.checkpoints.settings_files import count, number, read_json, read_yaml, write_json
from protea.checkpoints.tensors import Tensors
from protea.checkpoints.torch_file import to_bytes
from protea.checkpoints.vocabulary import VOCABULARY
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.registry import stored_in

NAME: Final = "nemo2"
TITLE: Final = "a checkpoint directory of BioNeMo 2"

_WORDS: Final = "embedding.word_embeddings.weight"
_FC1: Final = "mlp.linear_fc1.weight"
_MODEL: Final = "model.yaml"
_LAYERS: Final = "encoder.layers."


def _layout(family: type[Encoder], prefix: str = "module.", *, stacked: bool = True) -> Layout:
    layers = _LAYERS if stacked else f"{_LAYERS}{{}}."
    keys = {name: key.replace(_LAYERS, layers) for name, key in family.stored[NAME].keys.items()}
    leftovers = r"optimizer\..*|.*_extra_state.*|.*output_layer\.weight"
    return Layout(keys=keys, prefix=prefix, padding=128, leftovers=leftovers)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory, or its ``weights`` (see ``Format``)."""
    weights = path / "weights" if (path / "weights").is_dir() else path
    if (weights / "metadata.json").is_file():
        backend = read_json(weights / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(f"{weights}: backend {str(backend)[:50]!r}; only torch_dist is supported")
    tensors = DistributedTensors(weights)
    words = [key for key in tensors if key.endswith(_WORDS) and not key.startswith("optimizer.")]
    if len(words) != 1:
        raise CheckpointError(
            f"{weights}: no tensor module.{_WORDS}, so this is no checkpoint of BioNeMo 2; if FSDP wrote it, make one "
            f"file of it (`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {weights} FILE`) and name "
            "that"
        )
    prefix = words[0].removesuffix(_WORDS)
    settings = _read_settings(weights.parent / "context" / _MODEL)
    family = stored_in(NAME, settings)
    assert family is not None
    layout = _layout(family, prefix, stacked=f"{prefix}{_LAYERS}{_FC1}" in tensors)
    try:
        sizes = _sizes(family, settings, tensors, f"{prefix}{_LAYERS}")
        sizes["vocab_size"] = true_vocabulary(tensors, layout, len(family.config_type.alphabet))
        rotary = {"rotary_base": float(number(settings, "rotary_base", 10_000.0))}
        config = family.stored[NAME].config(settings | rotary, sizes, StoredShapes(tensors, layout))
    except CheckpointError as error:
        raise CheckpointError(f"{weights} with context/{_MODEL}: {error}") from error
    checkpoint = Checkpoint(config, tensors, layout, f"context/{_MODEL}")
    checkpoint.check_tied((f"{prefix}output_layer.weight", words[0]))
    return checkpoint


def _read_settings(path: Path) -> dict[str, Any]:
    """The part of ``model.yaml`` that describes the model; empty if there is no such file."""
    waiting = [read_yaml(Region.of_file(path))] if path.exists() else []
    seen: set[int] = set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        if isinstance(node, dict) and "num_attention_heads" in node:
            return node
        waiting += node.values() if isinstance(node, dict) else node
    return {}


def _sizes(family: type[Encoder], settings: dict[str, Any], tensors: Tensors, layers: str) -> dict[str, Any]:
    number_of_layer = re.compile(rf"{re.escape(layers)}(\d{{1,6}})\.")
    numbers = [int(match[1]) for key in tensors if (match := number_of_layer.match(key))]
    stacked = f"{layers}{_FC1}" in tensors
    fc1, axes = (f"{layers}{_FC1}", 3) if stacked else (f"{layers}0.{_FC1}", 2)
    if fc1 not in tensors or len(tensors.shape(fc1)) != axes:
        raise CheckpointError(f"no tensor {fc1} of {axes} axes; this is not a checkpoint of ESM-2")
    *stack, inner, width = tensors.shape(fc1)
    depth = stack[0] if stack else 1 + max(numbers)
    for key, stored in (("num_layers", depth), ("hidden_size", width), ("ffn_hidden_size", inner)):
        if isinstance(settings.get(key), int) and settings[key] != stored:
            raise CheckpointError(f"{key} is {settings[key]}, and the weights have {stored}; fetch both again")
    published: list[Any] = [known.config for known in family.published if known.publisher == "NVIDIA"]
    heads = {(known.num_hidden_layers, known.hidden_size): known.num_attention_heads for known in published}
    if settings.get("num_attention_heads") is None and (depth, width) not in heads:
        raise CheckpointError(
            f"the number of attention heads is unknown: no published model has {depth} layers of width {width}; put "
            f"{_MODEL} with num_attention_heads into context/"
        )
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": count(settings, "num_attention_heads", heads.get((depth, width))),
        "intermediate_size": inner,
        "layer_norm_eps": float(number(settings, "layernorm_epsilon", 1e-5)),
        "hidden_dropout_prob": float(number(settings, "hidden_dropout", 0.0)),
        "attention_probs_dropout_prob": float(number(settings, "attention_dropout", 0.0)),
    }


def write(path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write a checkpoint directory, one layer of one tensor at a time (see ``Format``).

    ``weights/`` is what megatron-core's ``dist_checkpointing`` loads. ``context/`` holds ``model.yaml``; it lacks
    ``io.json``, which NeMo makes by serialising its own classes.
    """
    weights, context = path / "weights", path / "context"
    for folder in (path, weights, context):
        folder.mkdir(exist_ok=True)
    write_distributed(weights, plan_of(model, _layout(type(model)), parameter, dtype))
    (weights / "common.pt").write_bytes(to_bytes({"epoch": 0, "global_step": 0}))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(weights / "metadata.json", backends | {"common_backend": "torch", "common_backend_version": 1})
    described = type(model).stored[NAME].describe(model.config)
    (context / _MODEL).write_text(yaml.safe_dump({"config": described}, sort_keys=False), encoding="utf-8")
    write_vocabulary(context / VOCABULARY, model)
