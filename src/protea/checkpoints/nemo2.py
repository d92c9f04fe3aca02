"""BioNeMo 2's checkpoint directories for ESM-2: ``context/`` beside ``weights/`` in Megatron's distributed format.

Megatron stacks like layers: no number in the key, an axis of layers first in the tensor; other runs keep
``layers.N.`` in the key, and both are read. Query, key and value are fused and interleaved head by head, norms belong
to the projection after them, the vocabulary is padded to a multiple of 128. Rotary frequencies are computed, not
stored. Sources: BioNeMo 2's converter from Hugging Face and megatron-core's ``dist_checkpointing``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.distcp import DistributedTensors, Stack, write_distributed
from protea.checkpoints.json_files import read_json, write_json
from protea.checkpoints.layout import Entry, Layout, StoredShapes, entries, join, stored_shape, true_vocabulary
from protea.checkpoints.tensors import Tensors
from protea.checkpoints.torch_file import to_bytes
from protea.checkpoints.unpickle import shown
from protea.checkpoints.yaml_files import MAX_YAML_BYTES, read_yaml
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.registry import stored_in

NAME: Final = "nemo2"
TITLE: Final = "a checkpoint directory of BioNeMo 2"

_WORDS: Final = "embedding.word_embeddings.weight"
_MODEL: Final = "model.yaml"
_PREFIX: Final = "module."
_PADDING: Final = 128
_STACK: Final = "encoder.layers."


def layout(family: type[Encoder], prefix: str = _PREFIX, *, stacked: bool = True) -> Layout:
    """How the directories keep a family.

    Args:
        family: one that the format has.
        prefix: what keys begin with.
        stacked: layers are stacked.
    """
    keys = family.stored[NAME].keys
    if not stacked:
        keys = {name: key.replace(_STACK, f"{_STACK}{{}}.") for name, key in keys.items()}
    return Layout(keys=keys, prefix=prefix, padding=_PADDING, leftovers=_leftover)


def _leftover(key: str) -> bool:
    return key.startswith("optimizer.") or "_extra_state" in key or key.endswith("output_layer.weight")


def _weights(path: Path) -> Path:
    return path / "weights" if (path / "weights").is_dir() else path


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory, or its ``weights``.

    Raises:
        CheckpointError: it is damaged, hostile, incomplete, of another architecture, or does not fit together.
    """
    weights = _weights(path)
    if (weights / "metadata.json").is_file():
        backend = read_json(weights / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{weights}: written by the backend {str(backend)[:50]!r}; only torch_dist is supported"
            )
    tensors = DistributedTensors(weights)
    words = [key for key in tensors if key.endswith(_WORDS) and not key.startswith("optimizer.")]
    if len(words) != 1:
        raise CheckpointError(f"{weights}: no tensor {_PREFIX}{_WORDS}; this is no checkpoint of ESM-2")
    prefix = words[0].removesuffix(_WORDS)
    stacked = f"{prefix}encoder.layers.mlp.linear_fc1.weight" in tensors
    described = _described_in(weights.parent / "context" / _MODEL)
    family = stored_in(NAME, described)
    assert family is not None
    arranged = layout(family, prefix, stacked=stacked)
    try:
        sizes = _sizes(family, described, tensors, prefix, stacked=stacked)
        sizes["vocab_size"] = true_vocabulary(tensors, arranged, len(family.config_type.alphabet))
        rotary = {"rotary_base": _float(described, "rotary_base", 10_000.0)}
        config = family.stored[NAME].config(described | rotary, sizes, StoredShapes(tensors, arranged))
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    checkpoint = Checkpoint(config, tensors, arranged, f"context/{_MODEL}")
    checkpoint.check_tied((f"{prefix}output_layer.weight", words[0]))
    return checkpoint


def _described_in(path: Path) -> dict[str, Any]:
    """The part of ``model.yaml`` that says how the model is built; nothing if there is no such file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; check the file, or remove it") from error
    try:
        waiting = [read_yaml(data)]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; fetch it again, or remove it") from error
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen or not isinstance(one, dict | list):
            continue
        seen.add(id(one))
        if isinstance(one, dict) and "num_attention_heads" in one:
            return one
        waiting += one.values() if isinstance(one, dict) else one
    return {}


def _sizes(
    family: type[Encoder], described: dict[str, Any], tensors: Tensors, prefix: str, *, stacked: bool
) -> dict[str, Any]:
    fc1 = f"{prefix}encoder.layers.{'' if stacked else '0.'}mlp.linear_fc1.weight"
    if fc1 not in tensors or len(tensors.shape(fc1)) != 2 + stacked:
        raise CheckpointError(f"no tensor {fc1} of {2 + stacked} axes; this is no checkpoint of ESM-2")
    *stack, inner, width = tensors.shape(fc1)
    depth = stack[0] if stacked else _depth(tensors, prefix)
    for key, found in (("num_layers", depth), ("hidden_size", width), ("ffn_hidden_size", inner)):
        if isinstance(described.get(key), int) and described[key] != found:
            raise CheckpointError(f"context/{_MODEL} has {key} {described[key]}, the weights {found}; fetch both again")
    heads = described.get("num_attention_heads")
    if heads is None:
        published: list[Any] = [known.config for known in family.published if known.publisher == "NVIDIA"]
        same = [config for config in published if (config.num_hidden_layers, config.hidden_size) == (depth, width)]
        if not same:
            raise CheckpointError(
                f"no context/{_MODEL} says how many attention heads there are, and no published model has {depth} "
                f"layers of width {width}; put {_MODEL} with num_attention_heads into context/"
            )
        heads = same[0].num_attention_heads
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise CheckpointError(f"context/{_MODEL} has num_attention_heads {shown(heads)}, not a number")
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "layer_norm_eps": _float(described, "layernorm_epsilon", 1e-5),
        "hidden_dropout_prob": _float(described, "hidden_dropout", 0.0),
        "attention_probs_dropout_prob": _float(described, "attention_dropout", 0.0),
    }


def _depth(tensors: Tensors, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}encoder\.layers\.(\d{{1,6}})\.")
    return 1 + max(int(match[1]) for key in tensors if (match := pattern.match(key)))


def _float(described: dict[str, Any], key: str, default: float) -> float:
    value = described.get(key, default)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"context/{_MODEL} has {key} {shown(value)}, not a number") from None


# --- writing -----------------------------------------------------------------------------------------------------


def unsupported(model: Encoder) -> str | None:
    """Why BioNeMo 2 has no such model."""
    return None if NAME in type(model).stored else f"BioNeMo 2's ESM-2 cannot hold {model.config.family}"


def write(path: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a checkpoint directory, one layer of one tensor at a time.

    ``weights/`` is what megatron-core's ``dist_checkpointing`` loads. ``context/`` holds ``model.yaml``; ``io.json``,
    which NeMo makes by serialising its own classes, is not written.

    Args:
        path: the directory; made if need be.
        model: says which parameters there are; may be on the meta device.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.

    Raises:
        OSError: a file cannot be written.
    """
    weights, context = path / "weights", path / "context"
    for folder in (path, weights, context):
        folder.mkdir(exist_ok=True)
    write_distributed(weights, _stacks(model, parameter, dtype))
    (weights / "common.pt").write_bytes(to_bytes({"epoch": 0, "global_step": 0}))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(weights / "metadata.json", backends | {"common_backend": "torch", "common_backend_version": 1})
    described = type(model).stored[NAME].describe(model.config)
    (context / _MODEL).write_text(yaml.safe_dump({"config": described}, sort_keys=False), encoding="utf-8")
    (context / "vocab.txt").write_text("\n".join(model.alphabet.tokens) + "\n", encoding="utf-8")


def _stacks(model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> Iterator[Stack]:
    arranged = layout(type(model))
    by_key: dict[str, list[Entry]] = {}
    for entry in entries(model, arranged):
        by_key.setdefault(entry.place.key, []).append(entry)

    def piece(entry: Entry) -> Callable[[], Tensor]:
        if entry.place.layer is None:
            return lambda: join(model, arranged, entry, parameter).clone()
        return lambda: join(model, arranged, entry, parameter).clone()[None]

    for key, some in by_key.items():
        shape = stored_shape(model, arranged, some[0])
        if some[0].place.layer is not None:
            shape = (len(some), *shape)
        yield Stack(key, shape, dtype, [piece(entry) for entry in some])
