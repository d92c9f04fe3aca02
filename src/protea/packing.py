"""Sequences of unequal length as one flat row of tokens, without padding.

A packed batch is the concatenation of its sequences plus the places where each begins. Everything in the model
but attention works on the flat tokens; attention reads the boundaries. Knows nothing of models.
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

    Kernels on an accelerator read ``offsets``; Python loops read ``host_offsets``, which spares them a synchronisation.

    Attributes:
        offsets: ``[B+1]`` int32, on the device where the tokens are.
        host_offsets: ``[B+1]`` int32, the same values in main memory.
        max_length: length of the longest sequence.
    """

    offsets: Tensor
    host_offsets: Tensor
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> CuSeqlens:
        """Boundaries of sequences with the given numbers of tokens, in main memory.

        Raises:
            ValueError: if there is no sequence, or one without tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packed batch needs sequences of at least one token, got lengths {lengths}")
        host = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths), dim=0, dtype=torch.int32, out=host[1:])
        return cls(host, host, max(lengths))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CuSeqlens:
        """The same boundaries with ``offsets`` on another device."""
        moved = self.host_offsets.to(device, non_blocking=non_blocking)
        return CuSeqlens(moved, self.host_offsets, self.max_length)

    def spans(self) -> list[tuple[int, int]]:
        """First row and row after the last, a sequence each."""
        return list(pairwise(self.host_offsets.tolist()))

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int32 on the device: tokens in each sequence."""
        return self.offsets.diff()


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several sequences in a row.

    Attributes:
        input_ids: ``[T]`` int64, BOS and EOS included where the model's alphabet has them.
        cu_seqlens: where each sequence begins and ends.
    """

    input_ids: Tensor
    cu_seqlens: CuSeqlens

    @property
    def max_length(self) -> int:
        """Tokens in the longest sequence."""
        return self.cu_seqlens.max_length

    def __len__(self) -> int:
        return int(self.cu_seqlens.host_offsets.numel()) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which copies to an accelerator run beside its work."""
        cu = self.cu_seqlens
        pinned = cu.host_offsets.pin_memory()
        return PackedBatch(self.input_ids.pin_memory(), CuSeqlens(pinned, pinned, cu.max_length))

    def positions(self) -> Tensor:
        """``[T]`` int64: the index of each token within its own sequence, from 0."""
        total = self.input_ids.numel()
        starts = torch.repeat_interleave(self.cu_seqlens.offsets[:-1], self.cu_seqlens.lengths, output_size=total)
        return torch.arange(total, device=self.input_ids.device) - starts

    def sequence_index(self) -> Tensor:
        """``[T]`` int64: which sequence each token belongs to."""
        numbers = torch.arange(len(self), device=self.input_ids.device)
        return torch.repeat_interleave(numbers, self.cu_seqlens.lengths, output_size=self.input_ids.numel())


def pack(sequences: Sequence[NDArray[np.integer]]) -> PackedBatch:
    """Concatenate the tokens of some sequences, ids of shape ``[T]`` each, as the model is to see them."""
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences])
    return PackedBatch(torch.from_numpy(flat), CuSeqlens.from_lengths([len(ids) for ids in sequences]))


def pack_by_budget(items: Iterable[Item | None], size: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Group items, in order, so that no group holds more than ``budget`` tokens.

    Packed batches waste nothing on length differences, so input order is kept and nothing is sorted. An item
    larger than the budget makes a group of its own.

    Args:
        items: what to group. ``None`` among them ends a group at once, even an empty one.
        size: tokens an item takes.
        budget: tokens a group may hold, at least 1.
    """
    if budget < 1:
        raise ValueError(f"a token budget must be at least 1, got {budget}")
    group: list[Item] = []
    filled = 0
    for item in items:
        if item is None:
            yield group
            group, filled = [], 0
            continue
        tokens = size(item)
        if group and filled + tokens > budget:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += tokens
    if group:
        yield group
