"""Attention probabilities for whoever looks at them; what computes a layer's output never has them whole.

Shapes: T tokens of a pack, H heads, K head width, L tokens of one sequence.
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

    All heads at once are what attention is written not to hold: ``[H, L, L]`` for every sequence. Keys that a layer
    adds behind those of a sequence take part in the softmax and are left out of the map.

    Attributes:
        q: ``[Tq, H, K]``, scaled.
        k: ``[Tk, H, K]``.
        cu_q: boundaries of the queries.
        cu_k: boundaries of the keys.
        bias: ``[H, >=longest q, >=longest k]`` that the layer adds to the scores, or ``None``.
    """

    q: Tensor
    k: Tensor
    cu_q: CuSeqlens
    cu_k: CuSeqlens
    bias: Tensor | None = None

    def __getitem__(self, sequence: int) -> HeadMaps:
        (q0, q1), (k0, k1) = self.cu_q.spans()[sequence], self.cu_k.spans()[sequence]
        bias = None if self.bias is None else self.bias[:, : q1 - q0, : k1 - k0]
        return HeadMaps(self.q[q0:q1], self.k[k0:k1], bias)

    def __iter__(self) -> Iterator[HeadMaps]:
        return (self[sequence] for sequence in range(len(self.cu_q.spans())))


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one sequence in one layer, ``[L, L]`` a head: a row attends to columns.

    Rows sum to 1, less what keys took that the layer added.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None

    def __len__(self) -> int:
        return self.q.shape[1]

    def __getitem__(self, head: int) -> Tensor:
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        scores = self.q[:, head].to(dtype) @ self.k[:, head].to(dtype).T
        if self.bias is not None:
            scores = scores + self.bias[head].to(dtype)
        return scores.softmax(-1)[:, : len(self.q)]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[head] for head in range(len(self)))
