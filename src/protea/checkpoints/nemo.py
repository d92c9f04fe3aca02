"""BioNeMo 1's ``.nemo``: a tar archive of ``model_config.yaml`` and ``model_weights.ckpt``, for ESM-1nv and ESM-2nv.

Megatron's names, vocabulary rows padded to a multiple of 128, query, key and value fused and interleaved head by head;
tensor-parallel runs keep one ``mp_rank_XX/model_weights.ckpt`` a rank. Sources: BioNeMo 1's ``base_config.yaml`` of
both models, its converter from Hugging Face, and NeMo 1's ``bert_model.py``.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from torch import Tensor

from protea.checkpoints.archive import folder_members, tar_members
from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.formats import NEMO_CONFIG
from protea.checkpoints.layout import Layout, StoredShapes, plan_of, true_vocabulary
from protea.checkpoints.region import Region
from protea.checkpoints.tensors import Tensors
from protea.checkpoints.torch_file import TorchFile, TorchTensors, save_torch_file
from protea.checkpoints.unpickle import shown
from protea.checkpoints.yaml_files import MAX_YAML_BYTES, read_yaml
from protea.errors import CheckpointError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.models.registry import stored_in

NAME: Final = "nemo"
TITLE: Final = "a .nemo file of BioNeMo 1"

_WEIGHTS: Final = "model_weights.ckpt"

_LAYER: Final = re.compile(r"model\.language_model\.encoder\.layers\.(\d{1,6})\.")
_PADDING: Final = 128


def layout(family: type[Encoder]) -> Layout:
    """How the format keeps a family."""
    return Layout(keys=family.stored[NAME].keys, padding=_PADDING)


_COLUMN_PARALLEL: Final = re.compile(
    r".*(query_key_value|dense_h_to_4h)\.(weight|bias)|.*word_embeddings\.weight|model\.lm_head\.bias"
)
_ROW_PARALLEL: Final = re.compile(r".*(self_attention\.dense|dense_4h_to_h)\.weight")


# --- reading -----------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.nemo`` file, or the folder it was unpacked into.

    Raises:
        CheckpointError: it is damaged, hostile, of another architecture, or its parts do not fit together.
    """
    members = folder_members(path) if path.is_dir() else tar_members(path)
    tensors = _tensors(path, members)
    if NEMO_CONFIG not in members:
        raise CheckpointError(f"{path}: no {NEMO_CONFIG} in it; this is no .nemo file, or part of one")
    try:
        family, config = _config(_read_yaml(members[NEMO_CONFIG]), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {NEMO_CONFIG}: {error}") from error
    return Checkpoint(config, tensors, layout(family), NEMO_CONFIG)


def _tensors(path: Path, members: dict[str, Region]) -> Tensors:
    weights = sorted(name for name in members if name.rsplit("/", 1)[-1] == _WEIGHTS)
    if not weights:
        raise CheckpointError(f"{path}: no {_WEIGHTS} in it; this is no .nemo file, or part of one")
    if weights != [_WEIGHTS] and not all(
        re.fullmatch(r"(mp|tp)_rank_\d+/" + re.escape(_WEIGHTS), name) for name in weights
    ):
        raise CheckpointError(
            f"{path}: weights in {', '.join(weights[:4])}; pipeline-parallel parts are not supported: merge them with "
            "NeMo's megatron_change_num_partitions.py"
        )
    parts: list[TorchTensors] = []
    for name in weights:
        file = TorchFile(members[name])
        state = file.content
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        parts.append(TorchTensors({path: (file, state, set())}))
    return parts[0] if len(parts) == 1 else _Merged(parts)


class _Merged(Tensors):
    """The parts of a tensor-parallel run as the tensors they are parts of."""

    def __init__(self, parts: list[TorchTensors]) -> None:
        self._parts = parts
        self._keys = parts[0]
        self.paths = parts[0].paths
        for number, part in enumerate(parts):
            if differing := sorted(part.keys() ^ parts[0].keys()):
                raise CheckpointError(f"{self.paths[0]}: rank {number} and rank 0 do not both hold {differing[0]}")
            for key in part:
                a, b = (one.dtype(key) + str(list(one.shape(key))) for one in (parts[0], part))
                if a != b:
                    raise CheckpointError(f"{self.paths[0]}: {key} is {a} in rank 0 and {b} in rank {number}")

    @staticmethod
    def _axis(key: str) -> int | None:
        if _COLUMN_PARALLEL.fullmatch(key):
            return 0
        return 1 if _ROW_PARALLEL.fullmatch(key) else None

    def __getitem__(self, key: str) -> Tensor:
        axis = self._axis(key)
        values = [part[key] for part in self._parts]
        if axis is None:
            if not all(torch.equal(value, values[0]) for value in values):
                raise CheckpointError(f"{self.paths[0]}: {key} differs between ranks, which should hold the same")
            return values[0]
        return torch.cat(values, dim=axis)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        axis = self._axis(key)
        shapes = [part.shape(key) for part in self._parts]
        if axis is None or axis >= len(shapes[0]):
            return shapes[0]
        return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])

    def dtype(self, key: str) -> str:
        """The stored type."""
        return self._parts[0].dtype(key)

    def path(self, key: str) -> Path:
        """The archive."""
        return self._parts[0].path(key)


def _read_yaml(region: Region) -> dict[str, Any]:
    raw = read_yaml(region.read(0, MAX_YAML_BYTES + 1))
    # NeMo writes the model's own section; a whole run's configuration has it under ``model``.
    if isinstance(raw, dict) and isinstance(raw.get("model"), dict) and "num_attention_heads" not in raw:
        raw = raw["model"]
    if not isinstance(raw, dict):
        raise CheckpointError("no mapping of options")
    return raw


def _config(raw: dict[str, Any], tensors: Tensors) -> tuple[type[Encoder], EncoderConfig]:
    for key, allowed in (
        ("megatron_legacy", (None, False)),
        ("normalization", (None, "layernorm")),
        ("share_embeddings_and_output_weights", (None, True)),
        ("position_embedding_type", (None, "rope", "learned_absolute")),
        ("bias", (None, True)),
        ("activation", (None, "gelu")),
        ("transformer_block_type", (None, "pre_ln")),
    ):
        if raw.get(key) not in allowed:
            raise CheckpointError(f"{key} {shown(raw[key])} is not supported; expected {allowed[-1]!r}")
    family = stored_in(NAME, raw)
    assert family is not None, "position_embedding_type tells the families apart"
    stored, arranged = family.stored[NAME], layout(family)
    shapes = StoredShapes(tensors, arranged)
    rows, width = shapes["word_embeddings.weight"]
    sizes: dict[str, Any] = {
        "num_hidden_layers": _count(raw, "num_layers", _depth(tensors)),
        "num_attention_heads": _count(raw, "num_attention_heads"),
        "hidden_size": _count(raw, "hidden_size", width),
        "intermediate_size": _count(raw, "ffn_hidden_size", shapes["layers.0.fc1.weight"][0]),
        "vocab_size": rows if stored.padded else true_vocabulary(tensors, arranged, len(family.config_type.alphabet)),
        "layer_norm_eps": _number(raw, "layernorm_epsilon", 1e-5),
        "hidden_dropout_prob": _number(raw, "hidden_dropout", 0.1),
        "attention_probs_dropout_prob": _number(raw, "attention_dropout", 0.1),
        "initializer_range": _number(raw, "init_method_std", 0.02),
    }
    return family, stored.config(raw, sizes, shapes)


def _depth(tensors: Tensors) -> int:
    numbers = [int(match[1]) for key in tensors if (match := _LAYER.match(key))]
    return 1 + max(numbers, default=0)


def _number(raw: dict[str, Any], key: str, default: Any = None) -> Any:
    """An option's number; what it refers to elsewhere (``${...}``) is taken from the weights."""
    value = raw.get(key)
    if value is None or (isinstance(value, str) and value.startswith("${")):
        value = default
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1 << 60:
        raise CheckpointError(f"{key} is {shown(raw.get(key))}, not a number")
    return value


def _count(raw: dict[str, Any], key: str, default: Any = None) -> int:
    value = _number(raw, key, default)
    if value != int(value):
        raise CheckpointError(f"{key} is {value}, not a whole number")
    return int(value)


# --- writing -----------------------------------------------------------------------------------------------------


def unsupported(model: Encoder) -> str | None:
    """Why BioNeMo 1 has no such model."""
    return None if NAME in type(model).stored else f"BioNeMo 1 has no {model.config.family}"


def write(path: Path, model: Encoder, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a ``.nemo`` file of one part.

    The weights are written beside it first, one tensor at a time, and then copied in: for a moment they take their
    space twice.

    Args:
        path: the file.
        model: says which parameters there are; may be on the meta device.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.

    Raises:
        OSError: the file cannot be written.
    """
    weights = path.with_name(f".{path.name}.{_WEIGHTS}")
    save_torch_file(weights, lambda tensors: tensors, plan_of(model, layout(type(model)), parameter, dtype))
    vocabulary = path.with_name(f".{path.name}.vocab.txt")
    vocabulary.write_text("\n".join(model.alphabet.tokens) + "\n", encoding="utf-8")
    described = path.with_name(f".{path.name}.{NEMO_CONFIG}")
    described.write_text(yaml.safe_dump(_described(model), sort_keys=False), encoding="utf-8")
    with tarfile.open(path, "w") as archive:
        for name, part in ((NEMO_CONFIG, described), (_WEIGHTS, weights), ("vocab.txt", vocabulary)):
            archive.add(part, f"./{name}", filter=_anonymous)
            part.unlink()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


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
