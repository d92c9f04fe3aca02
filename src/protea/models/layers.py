"""Parts that several families share.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from protea.models.attention import AttentionCall
from protea.packing import CuSeqlens, PackedBatch

MASK_TRAIN: Final = 0.15 * 0.8  # in Meta's training, 15 % of tokens were selected and 80 % of these masked

Rotary = tuple[Tensor, Tensor]  # cosine and sine of the rotary angles, [T, 1, K/2] float32 each


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its input.

    Attributes:
        rotary: for families with rotary positions.
        bias: ``[H, >=longest, >=longest]``, added to the attention scores of every sequence, for families that add one.
        on_attention: receives the layer's call of attention, if a caller observes it.
    """

    cu_seqlens: CuSeqlens
    rotary: Rotary | None = None
    bias: Tensor | None = None
    on_attention: Callable[[AttentionCall], None] | None = None


def blank_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without initial values.

    ``nn.Embedding`` draws them at random, which on the meta device imports PyTorch's compiler and takes a second.
    """
    blank = torch.empty(rows, width)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(blank, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


def inverse_frequencies(head_width: int, base: float) -> Tensor:
    """Rotary frequencies base^(-2i/K), ``[K/2]`` in float32, on the CPU even if a model is built on meta."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    return 1.0 / (base**exponents)


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> Rotary:
    """Cosine and sine of position times frequency, in float32 as in the published code."""
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[T, H, K]``: the first half of each head's width pairs with the second (GPT-NeoX's layout)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def token_dropout(x: Tensor, batch: PackedBatch, mask_id: int) -> Tensor:
    """Set the embeddings of mask tokens to 0 and rescale the sequence, as Meta's models were trained.

    x · (1 - 0.12) / (1 - n_mask/L), where L counts BOS and EOS: a sequence without masks is scaled by 0.88.
    A sequence of masks alone stays 0; the published code divides 0 by 0 there.
    """
    masked = batch.input_ids == mask_id
    sequence = batch.sequence_index()
    counts = torch.zeros(len(batch), dtype=torch.float32, device=x.device).index_add_(0, sequence, masked.float())
    kept = 1 - counts / batch.cu_seqlens.lengths
    kept = torch.where(kept > 0, kept, 1.0)
    scaled = x.masked_fill(masked[:, None], 0.0) * (1 - MASK_TRAIN) / kept[sequence, None]
    return scaled.to(x.dtype)
