"""How a format keeps our parameters, for reading and for writing: their keys, and what is fused, padded or stacked.

Nothing here knows a particular format, family or file; a family says under which key of a format a parameter is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Final, NamedTuple

import torch
from torch import Tensor

from protea.checkpoints.tensors import Planned, Tensors
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.family import Keys, key_of

VOCABULARY: Final = ("word_embeddings.weight", "lm_head.bias")
"""Parameters with one row for each token; some formats pad them."""

APART: Final = ("contact_head.p_proj.weight", "contact_head.q_proj.weight", "contact_head.bias")
"""Parameters of a bilinear contact head, which no format has a place for. The first has one row for each rank."""

Parameter = Callable[[str], Tensor]
"""Gives the value of a parameter by our name."""


class Place(NamedTuple):
    """Where a parameter is stored: a tensor's key, and the index on its first axis if the tensor stacks all layers.

    Parameters at the same place are parts of one tensor, in the model's order.
    """

    key: str
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a format keeps parameters.

    Attributes:
        keys: a family's table of names in the format.
        prefix: beginning of every key.
        interleaved: whether a fused query, key and value is ordered head by head, or one after another.
        padding: the vocabulary's rows are padded to a multiple of this number.
        bias_padding: the value that pads the output bias, by type; zeros pad the embeddings.
        leftovers: pattern of the keys of tensors that the model does not need, and that need no warning.
    """

    keys: Keys
    prefix: str = ""
    interleaved: bool = True
    padding: int = 1
    bias_padding: Callable[[torch.dtype], float] = lambda _: 0.0
    leftovers: str = ""

    def place(self, name: str) -> Place | None:
        """Where a parameter is kept; ``None`` where the format has no place for it."""
        key = key_of(self.keys, name)
        return None if key is None else Place(f"{self.prefix}{key[0]}", key[1])

    def buffer_keys(self, name: str, layers: int) -> list[str]:
        """The keys of a buffer: one per layer if the format repeats it, none if the format does not store it."""
        place = self.place(name)
        if place is None or place.layer is not None:
            return []
        return list(dict.fromkeys(place.key.replace("{}", str(number)) for number in range(layers)))

    def padded(self, rows: int) -> int:
        """The vocabulary's rows with their padding."""
        return -(-rows // self.padding) * self.padding


class Entry(NamedTuple):
    """A stored tensor, or one layer's part of a stack of layers: its place and the parameters in it."""

    place: Place
    names: tuple[str, ...]


def entries(model: Encoder, layout: Layout) -> list[Entry]:
    """The entries that a format stores of a model, in the model's order; parameters without a place are left out."""
    names: dict[Place, list[str]] = {}
    for name, _ in model.named_parameters():
        place = layout.place(name)
        if place is not None:
            names.setdefault(place, []).append(name)
    return [Entry(place, tuple(parts)) for place, parts in names.items()]


def encoder_root(stored: list[Entry], layout: Layout) -> tuple[str, bool]:
    """How the keys of an encoder begin in a format, and whether only they begin so, and not those of a head too."""
    keys = [entry.place.key for entry in stored if not entry.names[0].startswith(("lm_head.", "contact_head."))]
    columns = zip(*(key.split(".") for key in keys), strict=False)
    start = "".join(f"{names[0]}." for names in takewhile(lambda names: len(set(names)) == 1, columns))
    head = layout.place("lm_head.dense.weight")
    return start, bool(start) and not (head and head.key.startswith(start))


def stored_shape(model: Encoder, layout: Layout, entry: Entry) -> tuple[int, ...]:
    """The shape of an entry in a format, without the axis of layers."""
    first, *rest = model.get_parameter(entry.names[0]).shape
    rows = first * len(entry.names)
    return (layout.padded(rows) if entry.names[0] in VOCABULARY else rows, *rest)


def fused_heads(model: Encoder, layout: Layout) -> int:
    """The number of blocks in a fused query, key and value: one for each head where it is interleaved."""
    return max(model.config.attention_heads) if layout.interleaved else 1


def plan_of(model: Encoder, layout: Layout, parameter: Parameter, dtype: torch.dtype) -> list[Planned]:
    """The tensors that a format stores of a model; ``parameter`` gives values of ``dtype``.

    The layers of a stack are separate tensors with the same key and a first axis of 1, along which they are joined.
    """
    plan: list[Planned] = []
    for name, buffer in model.stored_buffers.items():
        # Buffers keep their type: rounding rotary frequencies further would change every position.
        keys = layout.buffer_keys(name, model.config.num_hidden_layers)
        plan += [Planned(key, tuple(buffer.shape), buffer.dtype, partial(torch.Tensor.detach, buffer)) for key in keys]
    for entry in entries(model, layout):
        stack = () if entry.place.layer is None else (1,)
        shape = (*stack, *stored_shape(model, layout, entry))
        plan.append(Planned(entry.place.key, shape, dtype, partial(_value, model, layout, entry, parameter, shape)))
    return plan


def _value(model: Encoder, layout: Layout, entry: Entry, parameter: Parameter, shape: tuple[int, ...]) -> Tensor:
    """The tensor that a format stores for an entry: a parameter with its padding, or query, key and value fused."""
    values = [parameter(name) for name in entry.names]
    if len(values) > 1:
        heads = fused_heads(model, layout)
        split = [value.view(heads, -1, *value.shape[1:]) for value in values]
        return torch.stack(split, dim=1).view(shape)
    (value,) = values
    missing = stored_shape(model, layout, entry)[0] - value.shape[0]
    if missing:
        fill = layout.bias_padding(value.dtype) if value.ndim == 1 else 0.0
        value = torch.cat((value, value.new_full((missing, *value.shape[1:]), fill)))
    return value.view(shape)


class StoredShapes:
    """Shapes of stored matrices by our names of the parameters."""

    def __init__(self, tensors: Tensors, layout: Layout) -> None:
        self._tensors, self._layout = tensors, layout

    def __contains__(self, name: object) -> bool:
        place = self._layout.place(str(name))
        return place is not None and place.key in self._tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        place = self._layout.place(name)
        key = name if place is None else place.key
        if key not in self._tensors or len(self._tensors.shape(key)) != 2:
            raise CheckpointError(f"no tensor {key} of two axes; the file is incomplete: fetch it again")
        return self._tensors.shape(key)


def true_vocabulary(tensors: Tensors, layout: Layout, size: int) -> int:
    """The rows of a stored vocabulary: ``size``, or all rows if training changed the padding, so that none is lost."""
    words, bias = (place.key for name in VOCABULARY if (place := layout.place(name)) is not None)
    stored, _ = StoredShapes(tensors, layout)[VOCABULARY[0]]
    if stored < size:
        raise CheckpointError(f"{words} has {stored} rows, the alphabet {size}; other alphabets are not supported")
    rows = layout.padded(size)
    if stored != rows or tensors[words][size:].any():
        return stored
    if bias in tensors:
        values = tensors[bias]
        if values.shape != (rows,) or not (values[size:] == layout.bias_padding(values.dtype)).all():
            return rows
    return size
