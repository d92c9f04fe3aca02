"""Checkpoints of ``torch.distributed.checkpoint``, which Megatron uses too: read in place, written in pieces.

A folder of ``.distcp`` files and ``.metadata``, a pickle that says which piece of which tensor is where. PyTorch's own
reader runs that pickle; this one does not.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from protea.checkpoints.region import Region, aligned, damaged, hostile
from protea.checkpoints.tensors import Box, Planned, StoredTensor, Tensors, type_name
from protea.checkpoints.torch_file import TorchFile, to_bytes
from protea.checkpoints.unpickle import MAX_AXES, MAX_LENGTH, Inert, TensorRef, unpickle
from protea.errors import CheckpointError

METADATA: Final = ".metadata"

_ALIGNMENT: Final = 64
"""Pieces begin at multiples of this many bytes, as values do within a file of torch.save, so they can be mapped."""


_WRITERS: Final = 32
"""So many processes describe the pieces of a model of 48 layers, and of its moments, in half of what may be read."""


class _Piece(NamedTuple):
    """A piece's place in its tensor, and where its bytes are."""

    box: Box
    region: Region


class Piece(NamedTuple):
    """A piece to write: the shape of its tensor, its place in it, and its values, which ``make`` computes."""

    key: str
    shape: tuple[int, ...]
    box: Box
    make: Callable[[], Tensor]


class WrittenPiece(NamedTuple):
    """A piece in a file: its type, and where its bytes are."""

    key: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    start: int
    length: int


class DistributedTensors(Tensors):
    """The tensors of a folder with ``.metadata`` and the files that it names."""

    def __init__(self, folder: Path) -> None:
        super().__init__([])
        self._folder, self._metadata = folder, folder / METADATA
        self._files: dict[str, Region] = {}
        # Each process that writes adds a piece of each tensor.
        scale = 1 + len([*folder.glob("*.distcp")]) // _WRITERS
        metadata = unpickle(Region.of_file(self._metadata), str(self._metadata), scale)
        try:
            self._add_all(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged(self._metadata, f"not as torch.distributed.checkpoint writes: {error!r}") from error
        self.paths = sorted(path for path in folder.iterdir() if path.is_file())

    def _add_all(self, metadata: Any) -> None:
        places = {
            (index.state["fqn"], _lengths(index.state["offset"])): info.state
            for index, info in metadata.state["storage_data"].items()
            if index.state.get("offset") is not None
        }
        regions: list[Region] = []
        for key, described in metadata.state["state_dict_metadata"].items():
            if not isinstance(described, Inert) or not described.name.endswith(".TensorStorageMetadata"):
                continue
            shape, dtype = _lengths(described.state["size"]), _dtype(described.state["properties"])
            pieces: list[_Piece] = []
            for chunk in described.state["chunks"]:
                offsets, sizes = _lengths(chunk.state["offsets"]), _lengths(chunk.state["sizes"])
                box = tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
                if any(stop > length for (_, stop), length in zip(box, shape, strict=True)):
                    raise ValueError(f"{key}: a piece outside its tensor")
                pieces.append(_Piece(box, self._region(key, places[key, offsets])))
            regions += [piece.region for piece in pieces]
            path = regions[-1].path if pieces else self._metadata
            read = partial(_read, f"{self._folder}: {key}", pieces, shape, dtype)
            self.add(key, StoredTensor(path, shape, type_name(dtype), read, read))
        # Pieces that share their bytes could form a tensor of any size.
        spans = sorted((str(region.path), region.start, region.start + region.size) for region in regions)
        if any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(spans)):
            raise ValueError("pieces that overlap in their file")

    def _region(self, key: str, info: dict[str, Any]) -> Region:
        """Where the bytes of a piece are."""
        name = info["relative_path"]
        if Path(name).name != name or name in ("", "..", "."):
            raise hostile(self._metadata, f"{name[:200]!r} leads out of the folder")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{self._metadata}: {key} is compressed, which is not supported")
        path = self._folder / name
        if name not in self._files:
            if not path.is_file():
                raise CheckpointError(f"{self._folder}: {name} is missing, which {METADATA} names; fetch it")
            self._files[name] = Region.of_file(path)
        return self._files[name].part(int(info["offset"]), int(info["length"]), f"{path}: {key}")


def _read(
    name: str, pieces: list[_Piece], shape: tuple[int, ...], dtype: torch.dtype, box: Box | None = None
) -> Tensor:
    """A tensor, or a box of it; of the pieces, only what lies in the box is read."""
    box = whole(shape) if box is None else box
    size = size_of(box)
    parts: list[tuple[tuple[slice, ...], Tensor]] = []
    for piece in pieces:
        shared = [(max(a, b), min(c, d)) for (a, c), (b, d) in zip(box, piece.box, strict=True)]
        if all(start < stop for start, stop in shared):
            parts.append((_within(shared, box), _piece(piece, dtype)[_within(shared, piece.box)]))
    if len(parts) == 1 and parts[0][1].shape == size:
        return aligned(parts[0][1])
    # Count the values first: a damaged shape may be too large to reserve memory for.
    if sum(part.numel() for _, part in parts) != prod(size):
        raise damaged(name, "its pieces do not fill it")
    values, filled = torch.empty(size, dtype=dtype), torch.zeros(size, dtype=torch.bool)
    for place, part in parts:
        values[place] = part
        filled[place] = True
    if not filled.all():
        raise damaged(name, "its pieces do not fill it")
    return values


def whole(shape: Iterable[int]) -> Box:
    """The box that is a whole tensor."""
    return tuple((0, length) for length in shape)


def size_of(box: Box) -> tuple[int, ...]:
    """The lengths of the axes of a box."""
    return tuple(stop - start for start, stop in box)


def _within(box: Iterable[tuple[int, int]], outer: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    """The place of a box, counted from the beginning of the box that contains it."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def _piece(piece: _Piece, dtype: torch.dtype) -> Tensor:
    name, shape = piece.region.name, size_of(piece.box)
    file = TorchFile(piece.region)
    if not isinstance(file.content, TensorRef):
        raise damaged(name, "a piece that holds no tensor")
    tensor = file.mapped(file.content)
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        raise damaged(name, f"a piece of {tensor.dtype}{list(tensor.shape)} where {METADATA} says {dtype}{list(shape)}")
    return tensor


def _lengths(values: Any) -> tuple[int, ...]:
    lengths = tuple(values)
    if len(lengths) > MAX_AXES or not all(isinstance(length, int) and 0 <= length < MAX_LENGTH for length in lengths):
        raise ValueError("an impossible shape or offset")
    return lengths


def _dtype(properties: Any) -> torch.dtype:
    """A type from ``TensorProperties``, whose state is a tuple with the type in the first place."""
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no type")
    return dtype


def write_distributed(folder: Path, plan: Iterable[Planned]) -> None:
    """Write a checkpoint of one file into a folder, with one tensor of the plan in memory at a time.

    Tensors with the same key are pieces of one tensor, in order along its first axis.
    """
    by_key: dict[str, list[Planned]] = {}
    for planned in plan:
        by_key.setdefault(planned.key, []).append(planned)
    pieces: list[Piece] = []
    for key, members in by_key.items():
        shape, row = (sum(member.shape[0] for member in members), *members[0].shape[1:]), 0
        for member in members:
            box = ((row, row + member.shape[0]), *whole(shape[1:]))
            pieces.append(Piece(key, shape, box, member.make))
            row += member.shape[0]
    name = data_file()
    (folder / METADATA).write_bytes(metadata({name: write_pieces(folder / name, pieces)}))


def data_file(rank: int = 0) -> str:
    """The name of the file that a process writes."""
    return f"__{rank}_0.distcp"


def write_pieces(path: Path, pieces: Iterable[Piece]) -> list[WrittenPiece]:
    """Write pieces to a file, and the file to disk, with one piece in memory at a time."""
    written: list[WrittenPiece] = []
    with path.open("wb") as stream:
        for piece in pieces:
            values = piece.make()
            # torch.save writes the whole storage of a view.
            data = to_bytes(values if values.nbytes == values.untyped_storage().nbytes() else values.clone())
            stream.write(bytes(-stream.tell() % _ALIGNMENT))
            written.append(WrittenPiece(*piece[:3], values.dtype, stream.tell(), len(data)))
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return written


def metadata(files: Mapping[str, Iterable[WrittenPiece]]) -> bytes:
    """The content of ``.metadata`` for pieces in files, by their names."""
    # The format consists of these classes, pickled. One of them is private.
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    sizes: dict[tuple[int, ...], torch.Size] = {}  # an equal one is pickled once
    for name, pieces in files.items():
        for piece in pieces:
            if piece.key not in described:
                properties, size = dcp.TensorProperties(dtype=piece.dtype), torch.Size(piece.shape)
                described[piece.key] = dcp.TensorStorageMetadata(properties=properties, size=size, chunks=[])
            start, length = tuple(first for first, _ in piece.box), size_of(piece.box)
            start, length = (sizes.setdefault(each, torch.Size(each)) for each in (start, length))
            chunks = described[piece.key].chunks
            places[dcp.MetadataIndex(piece.key, start, len(chunks))] = _StorageInfo(name, piece.start, piece.length)
            chunks.append(dcp.ChunkStorageMetadata(offsets=start, sizes=length))
    planner_data = {key: (key,) for key in described}
    return pickle.dumps(dcp.Metadata(state_dict_metadata=described, planner_data=planner_data, storage_data=places))
