"""Checkpoints of ``torch.distributed.checkpoint``, in which Megatron keeps its own: read in place, written in pieces.

A folder of ``.distcp`` files and ``.metadata``, a pickle that says which piece of which tensor is where. PyTorch's own
reader runs that pickle; this one does not.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from protea.checkpoints.region import Region
from protea.checkpoints.tensors import FLOATS, Tensors
from protea.checkpoints.torch_file import TorchFile, to_bytes
from protea.checkpoints.unpickle import MAX_PICKLE_BYTES, Inert, TensorRef, unpickle
from protea.errors import CheckpointError

METADATA: Final = ".metadata"
_MAX_AXES: Final = 16

_ALIGNMENT: Final = 64
"""Where pieces begin: torch.save aligns numbers to this within a file, and readers then map them in place."""


class _Piece(NamedTuple):
    """A rectangular piece of a tensor: where it begins, how large it is, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    region: Region


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    pieces: list[_Piece]


class DistributedTensors(Tensors):
    """The tensors of a checkpoint folder.

    Args:
        folder: holds ``.metadata`` and the files it names.

    Raises:
        CheckpointError: it is damaged, incomplete, or asks for what no checkpoint needs.
    """

    _keys: dict[str, _Stored]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / METADATA
        region = Region.of_file(path)
        if region.size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: {region.size:,} bytes, far beyond what describes a model; not read")
        self._files: dict[str, Region] = {}
        try:
            self._keys = self._understood(unpickle(region.read(), str(path)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not as torch.distributed.checkpoint writes ({error!r}); fetch it again"
            ) from error
        self.paths = sorted(path for path in folder.iterdir() if path.is_file())

    def _understood(self, metadata: Any) -> dict[str, _Stored]:
        state = _fields(metadata, "Metadata")
        where: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
        for index, info in state["storage_data"].items():
            at = _fields(index, "MetadataIndex")
            if at.get("offset") is not None:
                where[_text(at["fqn"]), _numbers(at["offset"])] = _fields(info, "_StorageInfo")
        stored: dict[str, _Stored] = {}
        for key, described in state["state_dict_metadata"].items():
            if not isinstance(described, Inert) or not described.name.endswith(".TensorStorageMetadata"):
                continue
            tensor = _fields(described, "TensorStorageMetadata")
            shape = _numbers(tensor["size"])
            pieces = [self._piece(key, _fields(chunk, "ChunkStorageMetadata"), where) for chunk in tensor["chunks"]]
            for piece in pieces:
                bounds = zip(piece.offsets, piece.sizes, shape, strict=True)
                if any(offset + size > length for offset, size, length in bounds):
                    raise ValueError(f"{key}: a piece outside its tensor")
            stored[_text(key)] = _Stored(shape, _type_name(tensor["properties"]), pieces)
        # Pieces that share their bytes could make up a tensor of any size.
        regions = [piece.region for one in stored.values() for piece in one.pieces]
        spans = sorted((str(region.path), region.start, region.start + region.size) for region in regions)
        if any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(spans)):
            raise ValueError("pieces that overlap in their file")
        return stored

    def _piece(
        self, key: str, chunk: dict[str, Any], where: dict[tuple[str, tuple[int, ...]], dict[str, Any]]
    ) -> _Piece:
        offsets, sizes = _numbers(chunk["offsets"]), _numbers(chunk["sizes"])
        if (key, offsets) not in where:
            raise CheckpointError(
                f"{self._folder / METADATA}: says nowhere where {key} at {list(offsets)} is; fetch it again"
            )
        info = where[key, offsets]
        name = _text(info["relative_path"])
        if Path(name).name != name or name in ("", "..", "."):
            raise CheckpointError(f"{self._folder / METADATA}: {name[:200]!r} leads out of the folder; not loaded")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{self._folder / METADATA}: {key} is compressed, which is not supported")
        if name not in self._files:
            if not (self._folder / name).is_file():
                raise CheckpointError(f"{self._folder}: {name} is missing, which {METADATA} names; fetch it")
            self._files[name] = Region.of_file(self._folder / name)
        region = self._files[name].part(int(info["offset"]), int(info["length"]), f"{self._folder / name}: {key}")
        return _Piece(offsets, sizes, region)

    def __getitem__(self, key: str) -> Tensor:
        shape = self._keys[key].shape
        return self._read(key, tuple((0, length) for length in shape))

    def row(self, key: str, index: int) -> Tensor:
        """One entry along the first axis; only the pieces that hold it are read."""
        first, *rest = self._keys[key].shape
        if not 0 <= index < first:
            raise CheckpointError(f"{self._folder}: {key} has {first} layers, not {index + 1}")
        return self._read(key, ((index, index + 1), *((0, length) for length in rest)))[0]

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._keys[key].shape

    def dtype(self, key: str) -> str:
        """A tensor's stored type."""
        return self._keys[key].dtype

    def path(self, key: str) -> Path:
        """The file a tensor begins in."""
        pieces = self._keys[key].pieces
        return pieces[0].region.path if pieces else self._folder / METADATA

    def _read(self, key: str, wanted: tuple[tuple[int, int], ...]) -> Tensor:
        """A box of a tensor, put together from the pieces that it touches."""
        shape = tuple(stop - start for start, stop in wanted)
        found: list[tuple[tuple[slice, ...], Tensor]] = []
        for piece in self._keys[key].pieces:
            box = [
                (max(start, offset), min(stop, offset + size))
                for (start, stop), offset, size in zip(wanted, piece.offsets, piece.sizes, strict=True)
            ]
            if all(start < stop for start, stop in box) or not shape:
                inside = tuple(slice(a - o, b - o) for (a, b), o in zip(box, piece.offsets, strict=True))
                outside = tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, wanted, strict=True))
                found.append((outside, _tensor(piece, FLOATS.get(self._keys[key].dtype))[inside]))
        if len(found) == 1 and found[0][1].shape == shape:
            return found[0][1]
        missing = sum(part.numel() for _, part in found) != prod(shape)
        if not missing:
            filled = torch.zeros(shape, dtype=torch.bool)
            for outside, _ in found:
                filled[outside] = True
            missing = not bool(filled.all())
        if missing:
            raise CheckpointError(f"{self._folder}: the pieces of {key} do not make it up; fetch the checkpoint again")
        whole = torch.empty(shape, dtype=found[0][1].dtype) if found else torch.empty(shape)
        for outside, part in found:
            whole[outside] = part
        return whole


def _tensor(piece: _Piece, dtype: torch.dtype | None) -> Tensor:
    file = TorchFile(piece.region)
    if not isinstance(file.content, TensorRef):
        raise CheckpointError(f"{piece.region.name}: holds no tensor; fetch the checkpoint again")
    tensor = file.tensor(file.content)
    if tuple(tensor.shape) != piece.sizes or tensor.dtype != dtype:
        raise CheckpointError(
            f"{piece.region.name}: a piece of shape {list(tensor.shape)}, {METADATA} says {list(piece.sizes)}; fetch "
            "both again"
        )
    return tensor


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The fields of a record of a class of PyTorch's."""
    if not isinstance(record, Inert) or not record.name.endswith(f".{kind}") or not isinstance(record.state, dict):
        raise ValueError(f"no {kind}")
    return record.state


def _numbers(values: Any) -> tuple[int, ...]:
    """An offset or a shape."""
    numbers = tuple(values)
    if len(numbers) > _MAX_AXES or not all(isinstance(one, int) and 0 <= one < 1 << 60 for one in numbers):
        raise ValueError("an impossible shape or offset")
    return numbers


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name that is no text")
    return value


def _type_name(properties: Any) -> str:
    """A type from ``TensorProperties``, whose state is a tuple that begins with it."""
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no type")
    return next((name for name, known in FLOATS.items() if known == dtype), str(dtype).removeprefix("torch."))


class Stack(NamedTuple):
    """A tensor to be written: its pieces follow each other along the first axis."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Callable[[], Tensor]]


def write_distributed(folder: Path, stacks: Iterable[Stack]) -> None:
    """Write a checkpoint of one file, holding one piece at a time.

    Args:
        folder: where; made if need be.
        stacks: the tensors.

    Raises:
        OSError: a file cannot be written.
    """
    # The classes that readers look for, one of them private: the format is these classes, pickled.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(exist_ok=True)
    name = "__0_0.distcp"
    described: dict[str, Any] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    with (folder / name).open("wb") as stream:
        for stack in stacks:
            chunks: list[ChunkStorageMetadata] = []
            row = 0
            for number, make in enumerate(stack.pieces):
                piece = make()
                data = to_bytes(piece)
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                offsets = torch.Size((row, *[0] * (piece.ndim - 1)))
                where[MetadataIndex(stack.key, offsets, number)] = _StorageInfo(name, stream.tell(), len(data))
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=piece.shape))
                stream.write(data)
                row += piece.shape[0]
            described[stack.key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=stack.dtype), size=torch.Size(stack.shape), chunks=chunks
            )
    metadata = Metadata(
        state_dict_metadata=described, planner_data={key: (key,) for key in described}, storage_data=where
    )
    with (folder / METADATA).open("wb") as stream:
        pickle.dump(metadata, stream)
