"""Files of EvolutionaryScale's esm 3: ``NAME.pth`` with the state dict of an ``ESMC``, and nothing beside it.

Follows ``esm/pretrained.py`` of version 3.2. The numbers of layers and rows are those of the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.layout import Layout, Parameter, StoredShapes, plan_of
from protea.checkpoints.region import Region
from protea.checkpoints.torch_file import TorchFile, named_tensors, open_state_dicts, save_torch_file, state_of
from protea.checkpoints.wrappers import unwrap
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.registry import family_of, stored_in

NAME: Final = "evolutionaryscale"
TITLE: Final = "a file of EvolutionaryScale's esm"

_WORDS: Final = "embed.weight"
_BLOCK: Final = re.compile(r"(?:.*\.)?transformer\.blocks\.(\d+)\.attn\.layernorm_qkv\.1\.weight")
"""A tensor of every layer. ESM3 has it too, but no embeddings of this name."""


def _layout(family: type[Encoder]) -> Layout:
    return Layout(keys=family.stored[NAME].keys, interleaved=False)


def is_described(content: Any) -> bool:
    """Whether the content of a file is, or holds, the state dict of such a model."""
    names = [str(key) for key, _ in named_tensors(content)]
    return any(map(_BLOCK.fullmatch, names)) and any(f".{name}".endswith(f".{_WORDS}") for name in names)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.pth`` file (see ``Format``)."""
    file = TorchFile(Region.of_file(path))
    tensors = open_state_dicts({path: (file, state_of(path, file.content))})
    unwrap(tensors, _WORDS)
    blocks = [int(match[1]) for key in tensors if (match := _BLOCK.fullmatch(key))]
    family = stored_in(NAME, {})
    if family is None:
        raise CheckpointError(f"{path}: no family has such files")
    shapes = StoredShapes(tensors, _layout(family))
    try:
        config = family.stored[NAME].config({}, {"num_hidden_layers": 1 + max(blocks, default=0)}, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(config, tensors, _layout(family_of(config)), "tensors")


def write(path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write ``NAME.pth`` (see ``Format``)."""
    save_torch_file(path, lambda tensors: tensors, plan_of(model, _layout(type(model)), parameter, dtype))
