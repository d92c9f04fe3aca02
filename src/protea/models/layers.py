"""The parts that several families use identically.

Parameter names are those of Meta's ``esm`` package, which users of LoRA and converters know: ``self_attn.q_proj``,
``fc1``, ``final_layer_norm`` and so on. Nothing here knows of checkpoints or devices.

Shapes: T tokens, D model width, H heads, K head width, F feed-forward width, V vocabulary rows, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.models.attention import attend
from protea.models.attention_maps import AttentionMaps
from protea.packing import CuSeqlens, PackedBatch

MASK_TRAIN: Final = 0.15 * 0.8
"""Share of tokens that were the mask token in Meta's training: 15 % selected, 80 % of them masked."""

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its input.

    Attributes:
        cu_seqlens: where each sequence begins and ends.
        rotary: cosine and sine of the rotary angles, ``[T, 1, K/2]`` float32 each, for models that rotate.
        bias: ``[H, >=longest, >=longest]``, added to the scores of every sequence, for models that add one.
        on_attention: receives the layer's attention maps, if somebody asked for them.
    """

    cu_seqlens: CuSeqlens
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    on_attention: Callable[[AttentionMaps], None] | None = None


class SelfAttention(nn.Module):
    """Projections of multi-head attention; the query is scaled by K^-1/2 before any rotation, as in Meta's code.

    Args:
        width: D of the model.
        heads: H, how many.
        head_width: K, the width of one.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, heads * head_width)
        self.k_proj = nn.Linear(width, heads * head_width)
        self.v_proj = nn.Linear(width, heads * head_width)
        self.out_proj = nn.Linear(heads * head_width, width)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        # How many heads there are follows from the width of one: a shard of the weights has fewer.
        shape = (-1, self.head_width)
        q, k, v = (project(x).unflatten(-1, shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = q * self.head_width**-0.5
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)


class TransformerLayer(nn.Module):
    """Pre-norm block: attention and feed-forward, each normed before and added after.

    What lies before and after attention, token by token, is a method each: a compiler gains from those, not from
    attention.
    """

    tokenwise: ClassVar[tuple[str, ...]] = ("before", "after")
    """Methods that work token by token, which a compiler may fuse."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        ffn_width: int,
        *,
        activation: str,
        dropout: float,
        attention_dropout: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.activate = ACTIVATIONS[activation]
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.self_attn = SelfAttention(width, heads, head_width)
        self.final_layer_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        q, k, v = self.before(x, context.rotary)
        if context.on_attention is not None:
            context.on_attention(AttentionMaps(q, k, context.cu_seqlens, context.cu_seqlens, context.bias))
        y = attend(
            q,
            k,
            v,
            context.cu_seqlens,
            context.cu_seqlens,
            scale=1.0,
            bias=context.bias,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.after(x, y.flatten(-2))

    def before(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """All that comes before attention, token by token: ``[T, D]`` to queries, keys and values ``[T, H, K]``."""
        return self.self_attn.project(self.self_attn_layer_norm(x), rotary)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """All that comes after, token by token: the layer's input and what attention gathered, both ``[T, D]``."""
        x = x + self._drop(self.self_attn.out_proj(y))
        inner = self.activate(self.fc1(self.final_layer_norm(x)))
        return x + self._drop(self.fc2(inner))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def blank_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without initial values.

    ``nn.Embedding`` draws them from a normal distribution, which on the meta device imports PyTorch's compiler: a
    second of start-up for nothing.
    """
    blank = torch.empty(rows, width)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(blank, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


def inverse_frequencies(head_width: int, base: float) -> Tensor:
    """Rotary frequencies ``[K/2]`` in float32: base^(-2i/K); on the CPU even where a model is built on meta."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    return 1.0 / (base**exponents)


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T, 1, K/2]`` of position times frequency, in float32 as in the published code."""
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[T, H, K]``: the first half of each head's width pairs with the second (GPT-NeoX's layout)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def token_dropout(x: Tensor, batch: PackedBatch, mask_id: int) -> Tensor:
    """Zero the embeddings of mask tokens and rescale the sequence, as Meta's models were trained.

    x · (1 - 0.12) / (1 - n_mask/L), where L counts BOS and EOS: a sequence without masks is scaled by 0.88.
    A sequence of nothing but masks stays zero; the published code divides zero by zero there.
    """
    masked = batch.input_ids == mask_id
    sequence = batch.sequence_index()
    lengths = batch.cu_seqlens.lengths
    counts = torch.zeros(len(batch), dtype=torch.float32, device=x.device).index_add_(0, sequence, masked.float())
    kept = 1 - counts / lengths
    kept = torch.where(kept > 0, kept, 1.0)
    scaled = x.masked_fill(masked[:, None], 0.0) * (1 - MASK_TRAIN) / kept[sequence, None]
    return scaled.to(x.dtype)


def initial_parameter(
    name: str, shape: tuple[int, ...], generator: np.random.Generator, *, std: float, zero_row: int | None = None
) -> Tensor:
    """BERT's initialisation of one parameter, float32 on the CPU.

    | parameter          | value                           |
    |--------------------|---------------------------------|
    | norm weights       | 1                               |
    | biases             | 0                               |
    | other weights      | normal(0, std), ``zero_row`` 0  |
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "layer_norm" in name:
        return torch.ones(shape)
    values = np.empty(shape, dtype=np.float32)
    # Drawn in float64, whose last bits may depend on the machine's logarithm, and rounded, which takes them off.
    for row in values:
        row[:] = std * generator.standard_normal(row.shape)
    if zero_row is not None:
        values[zero_row] = 0.0
    return torch.from_numpy(values)
