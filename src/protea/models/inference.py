"""A finished model made faster for inference on a CPU, at the price of everything else.

Applied from outside and in place: linear layers get weights in the order oneDNN multiplies fastest, GELU is computed
while products are still in registers, queries, keys and values come from one product, and rotary pairs lie side by
side, where one complex multiplication rotates them. The numbers stay those of the model to rounding; the model can
no longer be trained, moved or saved.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

import torch
from torch import Tensor, nn

from protea.device import native_bfloat16
from protea.models.encoder import Encoder
from protea.models.layers import SelfAttention, TransformerLayer

_POINTWISE: Final = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""oneDNN's names for what is applied to a product."""

_TYPICAL_ROWS: Final = 4096
"""The batch oneDNN lays weights out for; others run too."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def for_inference(model: Encoder) -> None:
    """Rebuild the layers of a model in place, if it is on a CPU that multiplies its type and has oneDNN."""
    weight = model.word_embeddings.weight
    if weight.device.type != "cpu":
        return
    _keep_freed_memory()
    multiplied = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native_bfloat16(weight.device))
    if not multiplied or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    with torch.inference_mode():
        for layer in model.layers:
            assert isinstance(layer, TransformerLayer)
            parts: dict[str, nn.Module] = {
                "self_attn": FusedSelfAttention(layer.self_attn),
                "fc1": PackedLinear(layer.fc1.weight, layer.fc1.bias, layer.activation),
                "fc2": PackedLinear(layer.fc2.weight, layer.fc2.bias),
            }
            for name, part in parts.items():
                setattr(layer, name, part)
            layer.activate = _as_it_is


class PackedLinear(nn.Module):
    """A linear layer, and perhaps GELU, over weights in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
        self.bias = bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D']``."""
        name, algorithm = _POINTWISE[self.activation]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y


class FusedSelfAttention(nn.Module):
    """``SelfAttention`` with one product for queries, keys and values, and rotary pairs side by side."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        order = _pairs_together(self.heads, q.out_features // self.heads)
        weight = torch.cat((q.weight[order], k.weight[order], v.weight))
        bias = torch.cat((q.bias[order], k.bias[order], v.bias))
        self.qkv = PackedLinear(weight, bias)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        scale = q.shape[-1] ** -0.5
        if rotary is None:
            return q * scale, k, v
        turn = torch.complex(*rotary)
        return _rotate_pairs(q, turn * scale), _rotate_pairs(k, turn), v


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _pairs_together(heads: int, width: int) -> Tensor:
    """``[D]``: row order that brings entry i of each head's width next to its partner i + K/2.

    Scores do not change if the widths of queries and keys are reordered alike. An odd width has no pairs.
    """
    within = torch.arange(width).view(2, -1).T.flatten() if width % 2 == 0 else torch.arange(width)
    return (torch.arange(heads)[:, None] * width + within).flatten()


def _rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate ``[T, H, K]`` by ``[T, 1, K/2]`` complex, in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def return_freed_memory() -> None:
    """Give the system what glibc keeps free, the holes that long-lived small blocks leave in the heap among it.

    Now and then: memory that is kept for good grows for hours, memory that is returned at once costs page faults.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next pack: giving megabytes back and forth costs a page fault every 4 kB.

    One arena for all threads, since only the main one may grow without bounds.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
