"""Attention probabilities for whoever looks at them; what computes a layer's output never has them whole.

Shapes: T tokens of a pack, H heads, K head width, L length of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protea.packing import CuSeqlens


@dataclass(frozen=True)
class AttentionMaps:
    """The attention probabilities of one layer, computed when they are looked at, head by head, in float32 or better.

    All heads at once are what attention is written not to hold: ``[H, L, L]`` for every sequence.

    Attributes:
        q: ``[T, H, K]``, scaled.
        k: ``[T, H, K]``.
        cu: boundaries of the sequences.
    """

    q: Tensor
    k: Tensor
    cu: CuSeqlens

    def __iter__(self) -> Iterator[Iterator[Tensor]]:
        """For each sequence its heads, each a map ``[L, L]`` whose rows sum to 1."""
        for start, end in self.cu.spans():
            yield (self._map(slice(start, end), head) for head in range(self.q.shape[1]))

    def of(self, sequence: int, head: int) -> Tensor:
        """The map ``[L, L]`` of one head of one sequence."""
        start, end = list(self.cu.spans())[sequence]
        return self._map(slice(start, end), head)

    def _map(self, rows: slice, head: int) -> Tensor:
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        queries, keys = (x[rows, head].to(dtype) for x in (self.q, self.k))
        return (queries @ keys.T).softmax(-1)
