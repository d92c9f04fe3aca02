"""Stored tensors by their stored names, and safetensors files: values stay in the files until they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protea.checkpoints.region import Region, damaged
from protea.checkpoints.settings_files import CONFIG, read_json
from protea.errors import CheckpointError
from protea.progress import SILENT, Progress

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights are read in, by safetensors' names for them."""

_NAMES: Final = {dtype: name for name, dtype in FLOATS.items()}
_MAX_HEADER: Final = 16 << 20


Box = tuple[tuple[int, int], ...]
"""A part of a tensor: where it begins and ends on each axis."""


class StoredTensor(NamedTuple):
    """A tensor in a file. ``read_part`` reads a box of it, where the file allows it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    read_part: Callable[[Box], Tensor] | None = None

    def part(self, box: Box) -> Tensor:
        """The values in a box of the tensor."""
        return self.read()[tuple(slice(*axis) for axis in box)] if self.read_part is None else self.read_part(box)

    def row(self, index: int) -> Tensor:
        """One entry along the first axis."""
        return self.part(((index, index + 1), *((0, length) for length in self.shape[1:])))[0]


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their stored names; looking one up reads it.

    ``paths`` are the files they are in, ``metadata`` the strings that safetensors files hold beside their tensors,
    ``outside`` the names of tensors beside the module that holds the model, which keep their names.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.stored: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self.outside: frozenset[str] = frozenset()

    def add(self, key: str, stored: StoredTensor) -> None:
        """Add a tensor under a name that no other tensor has."""
        if key in self.stored:
            raise CheckpointError(f"{stored.path}: two tensors are called {key}; fetch the file again")
        self.stored[key] = stored

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Look all tensors up by other names from now on."""
        before, self.stored = self.stored, {}
        for key, stored in before.items():
            self.add(key if key in self.outside else renamed(key), stored)

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def part(self, key: str, box: Box) -> Tensor:
        """The values in a box of a tensor."""
        return self.stored[key].part(box)

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
    """A tensor's values as bytes, in the machine's byte order; all formats here expect little-endian bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits, NaN and the signs of zeros included."""
    return a.shape == b.shape and a.dtype == b.dtype and raw_bytes(a) == raw_bytes(b)


def is_safetensors(region: Region) -> bool:
    """Whether a file begins like safetensors files: with the length of a JSON header, and the header."""
    length = int.from_bytes(region.read(0, 8), "little")
    return length <= min(_MAX_HEADER, region.size - 8) and region.read(8, 1) == b"{"


def open_safetensors(files: dict[Path, set[str]]) -> Tensors:
    """The tensors of safetensors files, each given with the keys that its index expects in it."""
    tensors = Tensors(list(files))
    for path, expected in files.items():
        # safetensors says "no such file" of every file that it cannot open, and keeps the last of two equal names.
        region = Region.of_file(path)
        length = int.from_bytes(region.read(0, 8), "little")
        if length > _MAX_HEADER:
            raise damaged(path, f"a header of {length:,} bytes")
        try:
            handle = safe_open(path, framework="pt", device="cpu")  # checks the header
            header = json.loads(region.read(8, length), object_pairs_hook=_without_repeats)
        except (SafetensorError, OSError, ValueError, MemoryError, RecursionError) as error:
            raise damaged(path, error) from error
        tensors.metadata |= header.pop("__metadata__", {})
        check_expected(path, expected, set(header))
        for key in sorted(header):
            shape, dtype = tuple(header[key]["shape"]), header[key]["dtype"]
            tensors.add(key, StoredTensor(path, shape, dtype, partial(handle.get_tensor, key)))
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("two entries of the header have the same name")
    return entries


def check_expected(path: Path, expected: set[str], stored: set[str]) -> None:
    """Check that a shard holds what its index says."""
    if absent := sorted(expected - stored):
        raise CheckpointError(f"{path}: lacks {absent[0]}, which its index says it holds; fetch both again")


def shards(folder: Path, weights: str = WEIGHTS, index: str = INDEX) -> dict[Path, set[str]]:
    """A folder's weight files, each with the keys that the index expects in it (none without an index)."""
    # lexists, because a broken link counts as an unreadable file; opening it reports the reason.
    if not os.path.lexists(folder / index):
        if os.path.lexists(folder / weights):
            return {folder / weights: set()}
        raise CheckpointError(f"{folder}: no {weights} and no {index}; put the weights beside {CONFIG}")
    files: dict[Path, set[str]] = {}
    try:
        for key, name in read_json(folder / index)["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"{name[:200]!r} is in another folder")
            files.setdefault(folder / name, set()).add(key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / index, repr(error)) from error
    if not files:
        raise damaged(folder / index, "its weight_map names no tensors")
    if absent := sorted(path.name for path in files if not os.path.lexists(path)):
        raise CheckpointError(f"{folder}: {', '.join(absent)} missing of {len(files)} shards in {index}; fetch it")
    return dict(sorted(files.items()))


def write_safetensors(
    path: Path, plan: list[Planned], metadata: dict[str, str] | None = None, progress: Progress = SILENT
) -> None:
    """Write tensors, in order, with strings for the header; the library's own writer would hold all of them in memory.

    The format: the header's length in 8 bytes, a JSON header, the bytes of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for planned in plan:
        start, end = end, end + planned.size
        offsets = [start, end]
        header[planned.key] = {"dtype": type_name(planned.dtype), "shape": planned.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, because readers map the tensors in place
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            stream.write(planned.data())
            progress.advance(planned.size)
