"""Attention probabilities of one sequence, for observers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadMaps:
    """The maps ``[L, L]`` of one sequence in one layer, computed head by head on access, in float32 or better.

    Rows attend to columns. Keys that a layer adds behind a sequence take part in the softmax but are not in the map, so
    rows then sum to less than 1. ``q`` is ``[L, H, K]``, scaled, ``k`` ``[>=L, H, K]``, ``bias`` as long as both.
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
