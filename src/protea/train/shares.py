"""The parts of a run's tensors that its processes hold: which process writes which, and who reads what.

A part is a box of a tensor. A process holds one part of each of its tensors, whole ones too; several may hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from protea.checkpoints.tensors import Box, Tensors
from protea.errors import OutputError, ProteaError, TrainingError
from protea.train.world import Gather, World, local

Value = TypeVar("Value")


class Part(NamedTuple):
    """What a process holds of a tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    box: Box

    @property
    def size(self) -> int:
        """The number of values."""
        return prod(stop - start for start, stop in self.box)


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this process holds."""
    shape = tuple(tensor.shape)
    # PyTorch's distributed checkpoints ask divided tensors the same.
    chunks = getattr(tensor, "__create_chunk_list__", None)
    if chunks is None:
        return Part(shape, tensor.dtype, tuple((0, length) for length in shape))
    (chunk,) = chunks()
    sizes = tuple(local(tensor).shape)
    if tuple(chunk.sizes) != sizes:
        raise TrainingError(f"a tensor of shape {shape} is divided in a way that checkpoints cannot describe")
    box = tuple((start, start + length) for start, length in zip(chunk.offsets, sizes, strict=True))
    return Part(shape, tensor.dtype, box)


def own_share(held: Sequence[Mapping[str, Part]], rank: int) -> frozenset[str]:
    """The names of the tensors whose parts a process writes, by what each process holds.

    Of the processes that hold the same part, the one with the fewest bytes so far writes it. ``TrainingError`` if parts
    overlap or leave a gap.
    """
    share: set[str] = set()
    given = [0] * len(held)
    for name in dict.fromkeys(name for parts in held for name in parts):
        holders: dict[Box, list[int]] = {}
        alike = set()
        for number, parts in enumerate(held):
            if part := parts.get(name):
                alike.add(part[:2])
                holders.setdefault(part.box, []).append(number)
        sizes = {box: prod(stop - start for start, stop in box) for box in holders}
        ((shape, dtype), *others) = alike
        mine = held[rank].get(name)
        if others or sum(sizes.values()) != prod(shape) or (mine and any(_overlap(mine.box, box) for box in holders)):
            raise TrainingError(f"{name}: the parts that processes hold of it are not parts of one tensor")
        for box, numbers in holders.items():
            writer = min(numbers, key=given.__getitem__)
            given[writer] += sizes[box] * dtype.itemsize
            # An empty part is written only if the whole tensor is empty.
            if writer == rank and (sizes[box] or not prod(shape)):
                share.add(name)
    return frozenset(share)


def _overlap(one: Box, other: Box) -> bool:
    pairs = zip(one, other, strict=True)
    return one != other and all(max(a, b) < min(c, d) for (a, c), (b, d) in pairs)


def fill(tensor: Tensor, stored: Tensors, key: str) -> None:
    """Read the part of a tensor that this process holds, and nothing else."""
    with torch.no_grad():
        local(tensor).copy_(stored.part(key, part_of(tensor).box))


class Parts(Mapping[str, Tensor]):
    """Stored tensors that are divided as others are, each read when it is looked up.

    ``models`` has those others, by key. A scalar has no parts.
    """

    def __init__(self, stored: Tensors, models: Mapping[str, Tensor | None]) -> None:
        self._stored, self._models = stored, models

    def __getitem__(self, key: str) -> Tensor:
        model, shape = self._models[key], self._stored.shape(key)
        if model is None or local(model) is model or shape != tuple(model.shape):
            return self._stored[key]
        part = self._stored.part(key, part_of(model).box)
        tensor = torch.empty_like(model, dtype=part.dtype, requires_grad=False)
        local(tensor).copy_(part)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def all_do(world: World, work: Callable[[], Value], gather: Gather | None = None) -> list[Value]:
    """What each process's work returns, by rank; if it fails on some, all raise the error of the first of them."""
    value, error = None, None
    try:
        value = work()
    except Exception as caught:
        error = caught
    # Errors of other libraries may not survive pickling.
    told = error if error is None or isinstance(error, ProteaError) else reason_of(error)
    results = (gather or world.gather)((value, told))
    for rank, (_, reason) in enumerate(results):
        if reason is not None:
            if rank == world.rank and error is not None:
                raise error
            raise reason if isinstance(reason, ProteaError) else OutputError(f"rank {rank}: {reason}")
    return [each for each, _ in results]


def reason_of(error: BaseException) -> str:
    """An error in words, without the file that the user has not chosen."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
