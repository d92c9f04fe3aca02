"""Stored tensors by their stored names. Their values stay in their files until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from protea.errors import CheckpointError

FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights are read in, by safetensors' names for them."""

_NAMES: Final = {dtype: name for name, dtype in FLOATS.items()}


class StoredTensor(NamedTuple):
    """A tensor in a file. ``read_row`` reads one entry along the first axis, where the file allows it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    read_row: Callable[[int], Tensor] | None = None

    def row(self, index: int) -> Tensor:
        """One entry along the first axis."""
        return self.read()[index] if self.read_row is None else self.read_row(index)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their stored names; looking one up reads it.

    Attributes:
        paths: the files they are in.
        stored: what is known of them before they are read.
        metadata: the strings that safetensors files hold beside their tensors.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.stored: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}

    def add(self, key: str, stored: StoredTensor) -> None:
        """Add a tensor under a name that no other tensor has."""
        if key in self.stored:
            raise CheckpointError(f"{stored.path}: two tensors are called {key}; fetch the file again")
        self.stored[key] = stored

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.stored[key].shape


class Planned(NamedTuple):
    """A tensor to write. Its name and size are known before its values, which ``make`` computes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def data(self) -> memoryview:
        """Its values as bytes."""
        tensor = self.make()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), self.key
        return raw_bytes(tensor)


def type_name(dtype: torch.dtype) -> str:
    """A type as safetensors names it; PyTorch's own name for a type that no weights are read in."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, in the machine's order, which all formats here take to be little-endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits, NaN and the signs of zeros included."""
    return a.shape == b.shape and a.dtype == b.dtype and raw_bytes(a) == raw_bytes(b)
