"""How a format keeps our parameters: one table of places for reading and writing, so that neither can drift.

A family says under which key of a format each parameter is kept; what happens to values on the way (queries, keys and
values fused, rows padded, layers stacked) is here. Nothing here knows any format, family or file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from protea.checkpoints.tensors import Tensors
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.stored import Keys, key_of

VOCABULARY: Final = ("word_embeddings.weight", "lm_head.bias")
"""Parameters with a row a token, which some formats pad."""

APART: Final = ("contact_head.p_proj.weight", "contact_head.q_proj.weight", "contact_head.bias")
"""Parameters of a bilinear contact head, for which no format has a place. The first one's rows are its rank."""


class Place(NamedTuple):
    """Where a parameter is stored.

    Attributes:
        key: the tensor's stored name; parameters of one key are its parts, query, key and value in this order.
        layer: its entry on a leading axis of layers, where layers are stacked.
    """

    key: str
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a format keeps parameters.

    Attributes:
        keys: a family's table of names in the format.
        prefix: what every key begins with.
        interleaved: a fused query, key, value is ordered head by head, not one after another.
        padding: multiple that the rows of the vocabulary are padded to; 1 for none.
        bias_padding: what the output bias is padded with, by type; the embeddings with zeros.
        leftovers: stored tensors that nobody needs, not worth a word.
    """

    keys: Keys
    prefix: str = ""
    interleaved: bool = True
    padding: int = 1
    bias_padding: Callable[[torch.dtype], float] = lambda _: 0.0
    leftovers: Callable[[str], bool] = lambda _: False

    def place(self, name: str) -> Place | None:
        """Where a parameter of ours is kept; ``None`` where the format has no place for it."""
        found = key_of(self.keys, name)
        return None if found is None else Place(f"{self.prefix}{found[0]}", found[1])

    def buffer_keys(self, name: str, layers: int) -> list[str]:
        """Where a buffer of ours is kept, in each layer where the format repeats it; nowhere where it is computed."""
        place = self.place(name)
        if place is None or place.layer is not None:
            return []
        return list(dict.fromkeys(place.key.replace("{}", str(number)) for number in range(layers)))


class Entry(NamedTuple):
    """One stored tensor, or one entry of a stack: its place and the parameters it is made of."""

    place: Place
    names: tuple[str, ...]


def entries(model: Encoder, layout: Layout) -> list[Entry]:
    """What a format stores of a model, in the model's order; what it has no place for is kept apart."""
    found: dict[Place, list[str]] = {}
    for name, _ in model.named_parameters():
        place = layout.place(name)
        if place is not None:
            found.setdefault(place, []).append(name)
    return [Entry(place, tuple(names)) for place, names in found.items()]


def stored_shape(model: Encoder, layout: Layout, entry: Entry) -> tuple[int, ...]:
    """The shape a format gives an entry, its place in a stack apart."""
    first, *rest = model.get_parameter(entry.names[0]).shape
    rows = first * len(entry.names)
    if entry.names[0] in VOCABULARY:
        rows = -(-rows // layout.padding) * layout.padding
    return (rows, *rest)


def fused_heads(model: Encoder, layout: Layout) -> int:
    """In how many stretches a fused query, key, value is ordered: one for each head where it is interleaved."""
    return max(model.config.attention_heads) if layout.interleaved else 1


def join(model: Encoder, layout: Layout, entry: Entry, parameter: Callable[[str], Tensor]) -> Tensor:
    """The tensor a format stores for some parameters: one, padded perhaps, or query, key and value fused."""
    values = [parameter(name) for name in entry.names]
    if len(values) > 1:
        heads = fused_heads(model, layout)
        split = [value.view(heads, -1, *value.shape[1:]) for value in values]
        return torch.stack(split, dim=1).flatten(0, 2)
    (value,) = values
    missing = stored_shape(model, layout, entry)[0] - value.shape[0]
    if not missing:
        return value
    fill = layout.bias_padding(value.dtype) if value.ndim == 1 else 0.0
    return torch.cat((value, value.new_full((missing, *value.shape[1:]), fill)))


class Planned(NamedTuple):
    """A tensor to be written: its name and size are known before its values, which are made when asked for."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def value(self) -> Tensor:
        """The tensor."""
        tensor = self.make()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), self.key
        return tensor


def plan_of(model: Encoder, layout: Layout, parameter: Callable[[str], Tensor], dtype: torch.dtype) -> list[Planned]:
    """The tensors a format writes for a model, those that are not stacked.

    Args:
        model: says which parameters there are; may be on the meta device.
        layout: the format's.
        parameter: gives the value of a parameter, of type ``dtype``, by our name.
        dtype: the type.
    """
    plan: list[Planned] = []
    for name, buffer in model.stored_buffers.items():
        # Not in the narrow type: rounding rotary frequencies further would move every position.
        keys = layout.buffer_keys(name, model.config.num_hidden_layers)
        plan += [Planned(key, tuple(buffer.shape), buffer.dtype, partial(torch.Tensor.detach, buffer)) for key in keys]
    for entry in entries(model, layout):
        make = partial(join, model, layout, entry, parameter)
        plan.append(Planned(entry.place.key, stored_shape(model, layout, entry), dtype, make))
    return plan


class StoredShapes:
    """Shapes of stored matrices by our names.

    Args:
        tensors: what is stored.
        layout: how.
    """

    def __init__(self, tensors: Tensors, layout: Layout) -> None:
        self._tensors, self._layout = tensors, layout

    def __contains__(self, name: object) -> bool:
        place = self._layout.place(str(name))
        return place is not None and place.key in self._tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        place = self._layout.place(name)
        if place is None or place.key not in self._tensors or len(self._tensors.shape(place.key)) != 2:
            key = name if place is None else place.key
            raise CheckpointError(f"no tensor {key} of two axes; the file is incomplete: fetch it again")
        return self._tensors.shape(place.key)


def true_vocabulary(tensors: Tensors, layout: Layout, size: int) -> int:
    """Rows of a stored vocabulary that are a model's: ``size`` of them if all others are this format's padding.

    Rows that training touched are kept, so that writing the checkpoint back gives what was read.

    Raises:
        CheckpointError: the embeddings are missing, or have fewer than ``size`` rows.
    """
    words, bias = (place.key for name in VOCABULARY if (place := layout.place(name)) is not None)
    if words not in tensors:
        raise CheckpointError(f"{', '.join(map(str, tensors.paths))}: no tensor {words}; fetch the file again")
    shape = tensors.shape(words)
    if len(shape) != 2 or shape[0] < size:
        raise CheckpointError(
            f"{tensors.path(words)}: {words} has shape {list(shape)}, fewer than the alphabet's {size} rows; models "
            "with another alphabet are not supported"
        )
    rows = -(-size // layout.padding) * layout.padding
    if shape[0] != rows or tensors[words][size:].any():
        return shape[0]
    if bias in tensors:
        values = tensors[bias]
        if values.shape != (rows,) or not (values[size:] == layout.bias_padding(values.dtype)).all():
            return rows
    return size
