"""Lets the layers of a finished model multiply in bfloat16; all else, such as the residual stream, stays in float32.

The linear layers and convolutions of the blocks keep weights and biases in bfloat16, which halves a model's memory, and
round their inputs to it; processors sum in float32. Like autocast, most return bfloat16: the next product would round
its input anyway, and what is added to the residual stream is small. Queries and keys come in float32: the softmax
magnifies their errors: on published weights, rounding them costs more than all else together. On a CPU their products
are in float32 too, weights included, which halves what is left of the error. On a GPU float32 products would be slow;
products in bfloat16 return float32 there, and attention takes queries and keys rounded once, after their rotation.

Shapes: T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protea.device import MIXED
from protea.errors import UsageError
from protea.models.convolution import Convolution
from protea.models.encoder import Encoder
from protea.models.layers import Rotary, is_replaceable, kind_of
from protea.models.transformer import SelfAttention, TransformerLayer

PRODUCTS: Final = torch.bfloat16
"""The type that the layers multiply in."""


class NarrowLinear(nn.Linear):
    """A linear layer from any type to that of its weights, in which it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D']``."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class WideLinear(nn.Linear):
    """A linear layer that multiplies in the type of its weights, and returns float32: on a GPU the sums themselves."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D']`` float32."""
        return _wide(x, self.weight, self.bias)


class WideConvolution(Convolution):
    """``Convolution`` that multiplies in the type of its weights, and adds up its products in float32."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weights of one place, ``[T, I]`` float32."""
        return _wide(x, weight, bias)


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.to(weight.dtype)
    if not x.is_cuda:
        return F.linear(x, weight, bias).float()
    y = torch.mm(x, weight.T, out_dtype=torch.float32)
    return y if bias is None else y + bias


class _NarrowOnGPU:
    """Makes the attention of ``SelfAttention``, or of a class derived from it, narrow on a GPU."""

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated, in the type of the attention."""
        q, k, v = super().project(x, rotary)  # type: ignore[misc]
        return (q.to(PRODUCTS), k.to(PRODUCTS), v.to(PRODUCTS)) if x.is_cuda else (q, k, v)


@cache
def mixed_attention(kind: Any) -> type[SelfAttention]:
    """A class of attention whose queries, keys and values come from products that return float32."""
    return cast("type[SelfAttention]", type(f"Mixed{kind.__name__}", (_NarrowOnGPU, kind), {}))


def narrow_weights(model: Encoder, device: torch.device) -> dict[str, torch.dtype]:
    """The parameters that ``mix`` keeps in bfloat16 on a device, by name; ``UsageError`` if the layers have none."""
    parts = _narrow_parts(model, device)
    names = {f"{name}.{kind}": PRODUCTS for name, part in parts for kind, _ in part.named_parameters()}
    if not names:
        raise UsageError(f"{model.config.family} models cannot compute in {MIXED}; use bfloat16, or float32")
    return names


def mix(model: Encoder) -> None:
    """Let the layers of a model in float32 multiply in bfloat16, in place."""
    device = model.device
    narrow_weights(model, device)
    for name, part in _narrow_parts(model, device):
        wide = name.endswith(("q_proj", "k_proj", "v_proj"))
        kind: Any = WideConvolution if isinstance(part, Convolution) else WideLinear if wide else NarrowLinear
        part.to(PRODUCTS).__class__ = kind
    for module in model.layers.modules():
        if isinstance(module, SelfAttention) and not isinstance(module, _NarrowOnGPU):
            kind = kind_of(module)
            module.__class__ = mixed_attention(kind)
    model.mixed = True


def _narrow_parts(model: Encoder, device: torch.device) -> Iterator[tuple[str, nn.Linear | Convolution]]:
    """The parts of the blocks that multiply in bfloat16 on a device, and their names."""
    for number, layer in enumerate(model.layers):
        if not (isinstance(layer, TransformerLayer) or is_replaceable(layer)):
            continue
        for name, part in layer.named_modules(prefix=f"layers.{number}"):
            exact = device.type == "cpu" and name.endswith(("q_proj", "k_proj"))
            if isinstance(part, (nn.Linear, Convolution)) and not exact:
                yield name, part
