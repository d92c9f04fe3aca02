"""Layers and heads that several families share.

Shapes: T tokens, D model width, V vocabulary rows, H heads, K head width, L length of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.models.attention import AttentionCall
from protea.packing import CuSeqlens, PackedBatch, PackedRows

MASK_TRAIN: Final = 0.15 * 0.8  # in Meta's training, 15 % of tokens were selected and 80 % of these masked

Rotary = tuple[Tensor, Tensor]  # cosine and sine of the rotary angles, [T, 1, K/2] float32 each


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its input.

    Attributes:
        rotary: for families with rotary positions.
        bias: ``[H, >=longest, >=longest]``, added to the attention scores of every sequence, for families that add one.
        relative: ``[H, 2M-1]``, added to the scores by distance (see ``AttentionCall``), for families that add such.
        on_attention: receives the layer's call of attention, if a caller observes it.
        rows: the rows whose output is wanted, if the layer has ``chooses_rows = True``; ``None`` stands for all.
    """

    cu_seqlens: CuSeqlens
    rotary: Rotary | None = None
    bias: Tensor | None = None
    relative: Tensor | None = None
    on_attention: Callable[[AttentionCall], None] | None = None
    rows: PackedRows | None = None

    def chosen(self, x: Tensor) -> Tensor:
        """The wanted rows of ``[T, ...]``."""
        return x if self.rows is None else x.index_select(0, self.rows.index)


def is_replaceable(layer: nn.Module) -> bool:
    """Whether transforms may replace the linear layers and convolutions inside a layer.

    A layer says so with ``replaceable = True`` if it does nothing with them but call them.
    """
    return bool(getattr(layer, "replaceable", False))


def kind_of(part: nn.Module) -> type[nn.Module]:
    """The class of a module; for one that a transform made faster to train, the class that it replaces."""
    kind: type[nn.Module] = vars(type(part)).get("faster_form_of", type(part))
    return kind


def chooses_rows(layer: nn.Module) -> bool:
    """Whether a layer returns ``[R, D]``, the rows of its context, if there are such.

    A layer says so with ``chooses_rows = True``.
    """
    return bool(getattr(layer, "chooses_rows", False))


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


class LanguageModelHead(nn.Module):
    """RoBERTa's head: dense, GELU, norm, then the word embeddings as output matrix, plus a bias.

    All families use the exact GELU here, even ESM-1nv, whose blocks use the tanh form.
    """

    def __init__(self, width: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """``[T, D]`` and ``[V, D]`` to ``[T, V]``."""
        return F.linear(self.layer_norm(F.gelu(self.dense(x))), word_embeddings, self.bias)


class ContactHead(nn.Module):
    """Weights of the logistic regression from the attention maps of all layers to contacts (Rao et al. 2020)."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.regression = nn.Linear(maps, 1)


class BilinearContactHead(nn.Module):
    """Contact logits from the last hidden states h: (⟨P hᵢ, Q hⱼ⟩ + ⟨P hⱼ, Q hᵢ⟩) / 2 + b.

    No published model or checkpoint format has such a head; it is stored in a file beside the checkpoint.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.p_proj = nn.Linear(width, rank, bias=False)
        self.q_proj = nn.Linear(width, rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[L, L]``, float32 and symmetric, from the residues ``[L, D]`` of one sequence."""
        p, q = (F.linear(x.float(), projection.weight.float()) for projection in (self.p_proj, self.q_proj))
        products = p @ q.T
        return (products + products.T) / 2 + self.bias.float()


AnyContactHead = ContactHead | BilinearContactHead
