"""Lets LoRA adapters train in float32 through the native library, as a part of the weights that they adapt.

peft computes x Wᵀ + s (x Aᵀ) Bᵀ: two thin products and two passes over the outputs, which on a CPU take longer than
x Wᵀ itself. The sum W + s B A costs next to nothing for the tokens of a pack, and then one product does. Gradients of A
and B still come from thin products, as the gradient of a whole matrix would cost too much.

Shapes: T tokens, D inputs, N outputs, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from protea.models.encoder import Encoder
from protea.native.products import Packed, Unpacked, linear
from protea.transforms.native_products import NativeLinear, is_native


def multiply_adapters_natively(model: Encoder) -> None:
    """Let peft's plain LoRA adapters of linear layers that ``multiply_natively`` changed be parts of their weights.

    Adapters with dropout or of DoRA stay as they are.
    """
    for part in model.layers.modules():
        if not isinstance(getattr(part, "base_layer", None), NativeLinear) or len(getattr(part, "lora_A", ())) != 1:
            continue
        (dropout,) = cast("Any", part).lora_dropout.values()
        if type(dropout) is nn.Identity and not cast("Any", part).lora_magnitude_vector:
            part.__class__ = _native(cast("Any", type(part)))


@cache
def _native(kind: Any) -> type[nn.Module]:
    """A class of adapted layers whose product is one where everything is in float32."""
    return type(f"Native{kind.__name__}", (_NativeAdapter, kind), {})


class _NativeAdapter:
    """The part of such a class that computes; the rest is peft's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, N]``."""
        base = self.base_layer
        (a,), (b,), (scale,) = self.lora_A.values(), self.lora_B.values(), self.scaling.values()
        if self.disable_adapters or self.merged or not is_native(x, base.weight):
            return cast("Tensor", super().forward(x))  # type: ignore[misc]
        y = _Product.apply(x, base.weight, base.bias, a.weight, b.weight, scale)  # type: ignore[no-untyped-call]
        return cast("Tensor", y)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        adapted = torch.addmm(weight, b, a, alpha=scale)
        return linear(x.detach().contiguous(), Packed.of(adapted), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        x, dy = x.contiguous(), dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, Unpacked.of(torch.addmm(weight, b, a, alpha=ctx.scale).T))  # computed again: it is large
        # Both sums over tokens have R rows: [R, T] [T, D], and [R, T] [T, N] for the transpose of B's gradient.
        da = linear(linear(dy, Packed.of(b.T)).T, Unpacked.of(x.T))
        db = linear(linear(x, Packed.of(a)).T, Unpacked.of(dy.T)).T
        return dx, None, None, da * ctx.scale, db * ctx.scale, None
