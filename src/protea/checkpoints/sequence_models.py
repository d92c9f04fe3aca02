"""Files of Microsoft's sequence-models: ``NAME.pt`` with sizes and a ``model_state_dict``.

Follows ``sequence_models/pretrained.py`` of version 1.8. Its linear layers are convolutions of width 1, whose weights
have a third axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints.checkpoint import Checkpoint
from protea.checkpoints.layout import Layout, Parameter, plan_of
from protea.checkpoints.region import Region
from protea.checkpoints.settings_files import count, shown
from protea.checkpoints.tensors import Planned
from protea.checkpoints.torch_file import TorchFile, open_state_dicts, save_torch_file
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import family_of, stored_in

NAME: Final = "sequence-models"
TITLE: Final = "a file of Microsoft's sequence-models"

_STATE: Final = "model_state_dict"
_SIZES: Final = ("d_embed", "d_model", "n_layers", "kernel_size", "r")
_POINTWISE: Final = (
    "sequence1.2.conv.weight",
    "sequence2.2.conv.weight",
    "up_embedder.conv.weight",
    "decoder.conv.weight",
)
"""How the keys of linear layers end."""


def is_described(content: Any) -> bool:
    """Whether the content of a file says what its model is, as these files do."""
    return isinstance(content, dict) and {"model", _STATE, *_SIZES} <= set(content)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.pt`` file (see ``Format``)."""
    file = TorchFile(Region.of_file(path))
    tensors = open_state_dicts({path: (file, file.content[_STATE])})
    for key in [key for key in tensors if key.endswith(_POINTWISE) and tensors.shape(key)[2:] == (1,)]:
        stored = tensors.stored[key]
        tensors.stored[key] = stored._replace(shape=stored.shape[:2], read=partial(_flat, stored.read))
    try:
        config = _config(file.content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(config, tensors, Layout(keys=family_of(config).stored[NAME].keys), "sizes")


def _flat(read: Callable[[], Tensor]) -> Tensor:
    return read().squeeze(-1)


def _config(content: dict[str, Any]) -> EncoderConfig:
    name = content["model"]
    family = stored_in(NAME, content) if isinstance(name, str) and name.startswith("carp") else None
    if family is None:
        raise CheckpointError(f"model {shown(name)} is not supported; CARP models are")
    settings = {key: count(content, key) for key in _SIZES}
    others = {"activation": content.get("activation"), "slim": content.get("slim")}
    if not isinstance(others["slim"], bool):
        raise CheckpointError(f"slim is {shown(others['slim'])}, not true or false")
    return family.stored[NAME].config(settings | others, {}, {})


def write(path: Path, model: Encoder, parameter: Parameter, dtype: torch.dtype) -> None:
    """Write ``NAME.pt`` (see ``Format``)."""
    stored = type(model).stored[NAME]
    plan = []
    for planned in plan_of(model, Layout(keys=stored.keys), parameter, dtype):
        pointwise = planned.key.endswith(_POINTWISE)
        plan.append(planned._replace(shape=(*planned.shape, 1), make=partial(_deep, planned)) if pointwise else planned)
    save_torch_file(path, lambda tensors: {**stored.describe(model.config), _STATE: tensors}, plan)


def _deep(planned: Planned) -> Tensor:
    return planned.make().unsqueeze(-1)
