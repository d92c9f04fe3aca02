"""Packed batches: sequences of unequal length in one row of tokens, without padding.

Attention reads where each sequence begins and ends; the rest of a model works on the row of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class CuSeqlens:
    """Cumulative lengths: sequence ``b`` of a packed batch is rows ``cu[b]`` to ``cu[b + 1]``.

    Sequences have at least one token, but may have none of the rows that a ``PackedRows`` chooses.

    Attributes:
        offsets: ``[B+1]`` int32, on the device of the tokens, for kernels.
        host_offsets: the same values in main memory; loops in Python read them without waiting for the device.
        max_length: tokens in the longest sequence.
    """

    offsets: Tensor
    host_offsets: Tensor
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> CuSeqlens:
        """Boundaries in main memory, from the number of tokens of each sequence, at least 1."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packed batch needs sequences of at least one token, got lengths {lengths}")
        return cls.from_offsets(np.cumsum([0, *lengths]))

    @classmethod
    def from_offsets(cls, offsets: NDArray[np.int64]) -> CuSeqlens:
        """Boundaries in main memory, from ``[B+1]`` cumulative lengths."""
        host = torch.from_numpy(offsets.astype(np.int32))
        return cls(host, host, int(np.diff(offsets).max()))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CuSeqlens:
        """The same boundaries with ``offsets`` on another device."""
        moved = self.host_offsets.to(device, non_blocking=non_blocking)
        return CuSeqlens(moved, self.host_offsets, self.max_length)

    def pin_memory(self) -> CuSeqlens:
        """The same boundaries in page-locked memory."""
        pinned = self.host_offsets.pin_memory()
        return CuSeqlens(pinned, pinned, self.max_length)

    def spans(self) -> list[tuple[int, int]]:
        """First row and row after the last of each sequence."""
        return list(pairwise(self.host_offsets.tolist()))

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int32 on the device: tokens in each sequence."""
        return self.offsets.diff()


@dataclass(frozen=True)
class PackedBatch:
    """The tokens ``[T]`` int64 of several sequences, with BOS and EOS if the alphabet has them, and the boundaries."""

    input_ids: Tensor
    cu_seqlens: CuSeqlens

    def __len__(self) -> int:
        return len(self.cu_seqlens.host_offsets) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        ids = self.input_ids.to(device, non_blocking=non_blocking)
        return PackedBatch(ids, self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, which an accelerator can copy from while it computes."""
        return PackedBatch(self.input_ids.pin_memory(), self.cu_seqlens.pin_memory())

    def positions(self) -> Tensor:
        """``[T]`` int64: the index of each token within its own sequence, from 0."""
        total = len(self.input_ids)
        starts = torch.repeat_interleave(self.cu_seqlens.offsets[:-1], self.cu_seqlens.lengths, output_size=total)
        return torch.arange(total, device=self.input_ids.device) - starts

    @property
    def extent(self) -> int:
        """Positions are below this number."""
        return self.cu_seqlens.max_length

    def sequence_index(self) -> Tensor:
        """``[T]`` int64: the number of the sequence that each token is in."""
        numbers = torch.arange(len(self), device=self.input_ids.device)
        return torch.repeat_interleave(numbers, self.cu_seqlens.lengths, output_size=len(self.input_ids))


@dataclass(frozen=True)
class PackedRows:
    """Some rows of a packed batch, sequence by sequence: ``index`` ``[R]`` int64, and where each sequence's begin."""

    index: Tensor
    cu_seqlens: CuSeqlens

    @classmethod
    def of(cls, index: NDArray[np.int64], tokens: CuSeqlens) -> PackedRows:
        """Rows of a batch with these boundaries, in main memory; in a sequence they may have any order."""
        sequence = np.searchsorted(tokens.host_offsets.numpy(), index, side="right")
        numbers = np.arange(len(tokens.host_offsets))
        if len(index) and (sequence[0] < 1 or sequence[-1] > numbers[-1] or np.any(np.diff(sequence) < 0)):
            raise ValueError("rows must be those of a packed batch, sequence by sequence")
        return cls(torch.from_numpy(index), CuSeqlens.from_offsets(np.searchsorted(sequence, numbers, side="right")))

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedRows:
        """The same rows on another device."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return PackedRows(self.index.to(device, non_blocking=non_blocking), cu_seqlens)

    def pin_memory(self) -> PackedRows:
        """The same rows in page-locked memory."""
        return PackedRows(self.index.pin_memory(), self.cu_seqlens.pin_memory())


def pack(sequences: Sequence[NDArray[np.integer]]) -> PackedBatch:
    """A batch of sequences, ids of shape ``[T]`` each."""
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences])
    return PackedBatch(torch.from_numpy(flat), CuSeqlens.from_lengths([len(ids) for ids in sequences]))


def pack_by_budget(items: Iterable[Item | None], size: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Group items, in order, into groups of at most ``budget`` tokens, at least 1.

    An item with more tokens, as ``size`` counts them, is a group by itself. ``None`` among the items ends a group.
    """
    if budget < 1:
        raise ValueError(f"a token budget must be at least 1, got {budget}")
    group: list[Item] = []
    filled = 0
    for item in items:
        if item is None or (group and filled + size(item) > budget):
            yield group
            group, filled = [], 0
        if item is not None:
            group.append(item)
            filled += size(item)
    if group:
        yield group
