"""Stored tensors by their stored names, whatever files they are in, read when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights are read in, by safetensors' names for them."""


class Tensors(Mapping[str, Tensor], ABC):
    """Stored tensors by their stored names, read when asked for.

    Attributes:
        paths: the files they are in.
    """

    paths: list[Path]

    _keys: Mapping[str, Any]
    """What is there, by stored name; asking for a name must not read its tensor."""

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    @abstractmethod
    def dtype(self, key: str) -> str:
        """A tensor's stored type, as safetensors names it (``F32``, ``BF16``, ...)."""

    @abstractmethod
    def path(self, key: str) -> Path:
        """The file a tensor is in."""

    def row(self, key: str, index: int) -> Tensor:
        """One entry along a tensor's first axis."""
        return self[key][index]

    def close(self) -> None:
        """Let the files go; tensors already read stay valid."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, in the machine's order, which all formats here take to be little-endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
