"""Between fair-esm's padded batches ``[B, T]`` and the packed ones that Protea's models compute.

Shapes: B sequences, T tokens of the longest, N tokens that are not padding, L tokens of one sequence, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from protea.errors import UsageError
from protea.models.attention import AttentionCall
from protea.models.encoder import Encoder
from protea.packing import CuSeqlens, PackedBatch


@dataclass(frozen=True)
class PlacedBatch(PackedBatch):
    """A packed batch whose tokens have the positions ``columns``, as padding among a sequence's tokens leaves them."""

    columns: Tensor
    width: int

    @property
    def extent(self) -> int:
        """Positions are below this number."""
        return self.width

    def positions(self) -> Tensor:
        """``[N]`` int64: the column of each token in the padded batch."""
        return self.columns


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch: its tokens ``[B, T]``, which of them are not padding, and the same tokens packed."""

    tokens: Tensor
    present: Tensor
    packed: PackedBatch

    @classmethod
    def of(cls, tokens: Tensor, model: Encoder) -> Self:
        """Check a batch and pack it; ``UsageError`` if it is none."""
        alphabet = model.alphabet
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
            kind = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UsageError(
                f"tokens are {kind}; the model takes a tensor of ids [B, T], as the batch converter makes them; "
                "tokens[None] makes a batch of one sequence"
            )
        if tokens.device != model.device:
            raise UsageError(f"tokens are on {tokens.device}, the model is on {model.device}; tokens.to(device)")
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= len(alphabet):
            wrong = least if least < 0 else most
            raise UsageError(f"token id {wrong} is not in the alphabet of {len(alphabet)} tokens of this model")
        present = tokens.ne(alphabet.pad)
        lengths = present.sum(1).tolist()
        if 0 in lengths:
            raise UsageError(f"row {lengths.index(0)} of the batch holds nothing but padding; leave it out")
        ids = tokens[present].long()
        boundaries = CuSeqlens.from_lengths(lengths).to(tokens.device)
        # fair-esm counts columns, padding included; where positions are learned, it counts tokens.
        if model.max_tokens is None and bool((present[:, 1:] > present[:, :-1]).any()):
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[present]
            return cls(tokens, present, PlacedBatch(ids, boundaries, columns, tokens.shape[1]))
        return cls(tokens, present, PackedBatch(ids, boundaries))

    def padded(self, x: Tensor) -> Tensor:
        """``[N, D]`` to ``[B, T, D]``; rows of padding are 0."""
        shape = (*self.present.shape, x.shape[-1])
        if len(x) == self.present.numel():
            return x.view(shape)
        places = self.present.flatten().nonzero()[:, 0]
        return x.new_zeros(self.present.numel(), x.shape[-1]).index_copy(0, places, x).view(shape)

    def maps(self, call: AttentionCall) -> Tensor:
        """The attention maps ``[B, H, T, T]`` of a layer; rows and columns of padding are 0."""
        return torch.stack([self._map(torch.stack(list(call.maps(i))), i) for i in range(len(self.tokens))])

    def _map(self, maps: Tensor, sequence: int) -> Tensor:
        """``[H, L, L]`` to ``[H, T, T]``."""
        size = self.tokens.shape[1]
        if maps.shape[-1] == size:
            return maps
        heads = torch.arange(len(maps), device=maps.device)[:, None, None]
        places = self.present[sequence].nonzero()[:, 0]
        return maps.new_zeros(len(maps), size, size).index_put((heads, places[:, None], places), maps)
