"""The parts of transformer layers that train in one piece each on CPUs.

They are the product for queries, keys and values with the rotation, and both products of the feed-forward network with
GELU. Layers that are adapted, replaced or observed by hooks are called one by one, as elsewhere.

Shapes: T tokens, D model width, H heads, K head width, F width of fc1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from protea.models.layers import Rotary
from protea.models.transformer import SelfAttention, TransformerLayer
from protea.native.rotation import HEAD_WIDTHS, rotate
from protea.transforms.native_products import (
    NativeLinear,
    gradient_of_inputs,
    gradients_of_weights,
    multiply,
    product_type,
)


class NativeAttention(SelfAttention):
    """``SelfAttention`` with one product for queries, keys and values."""

    faster_form_of = SelfAttention

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, D]`` to queries, keys and values ``[T, H, K]``, scaled and rotated."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        kind = _common_type(x, *parts)
        if kind is None or rotary is None or self.head_width not in HEAD_WIDTHS:
            return super().project(x, rotary)
        parameters = (*(part.weight for part in parts), *(part.bias for part in parts))
        q, k, v = _Projection.apply(x, *rotary, self.head_width, self.scale, kind, *parameters)  # type: ignore[no-untyped-call]
        return q, k, v


class NativeLayer(TransformerLayer):
    """``TransformerLayer`` whose feed-forward network is computed in one piece if its activation is GELU."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """Two linear layers with GELU between them, ``[T, D]`` to ``[T, D]``."""
        kind = _common_type(x, self.fc1, self.fc2)
        if kind is None or self.activation != "gelu":
            return super().feed_forward(x)
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        y = _FeedForward.apply(x, kind, *parameters)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y


def _common_type(x: Tensor, *parts: nn.Linear) -> torch.dtype | None:
    """The type in which the library multiplies all of these layers; ``None`` if one is replaced or observed."""
    if any(type(part) is not NativeLinear or "forward" in vars(part) or _is_observed(part) for part in parts):
        return None
    kinds = {(product_type(x, part.weight), part.bias is None) for part in parts}
    return kinds.pop()[0] if len(kinds) == 1 else None


def _is_observed(part: nn.Module) -> bool:
    """Whether hooks see the calls of a module: its own, or those of all modules."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(part, f"_{kind}") or getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        head_width: int,
        scale: float,
        kind: torch.dtype,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.of, ctx.scale = x.dtype, scale
        x = x.detach().to(kind).contiguous()
        *weights, q_bias, k_bias, v_bias = parameters
        bias = None if q_bias is None else torch.cat((q_bias, k_bias, v_bias))  # type: ignore[arg-type]
        y = multiply(x, torch.cat(weights), bias)  # type: ignore[arg-type]
        q, k, v = y.view(len(x), 3, -1, head_width).unbind(1)
        rotate(q, cosine, sine, scale, out=q)
        rotate(k, cosine, sine, out=k)
        ctx.save_for_backward(x, cosine, sine, *weights)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, cosine, sine, *weights = ctx.saved_tensors
        wanted, weight = ctx.needs_input_grad, torch.cat(weights)
        dy = torch.empty(len(x), 3, *dq.shape[1:], dtype=x.dtype)
        rotate(dq.contiguous(), cosine, sine, ctx.scale, back=True, out=dy[:, 0])
        rotate(dk.contiguous(), cosine, sine, back=True, out=dy[:, 1])
        dy[:, 2] = dv
        dy = dy.view(len(x), -1)
        dx = gradient_of_inputs(dy, weight, ctx.of) if wanted[0] else None
        found = gradients_of_weights(dy, x, weight, any(wanted[6:9]), any(wanted[9:]))
        parts = [part for whole in found for part in ([None] * 3 if whole is None else whole.chunk(3))]
        given = [part if needed else None for part, needed in zip(parts, wanted[6:], strict=True)]
        return dx, None, None, None, None, None, *given


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kind: torch.dtype,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        ctx.of = x.dtype
        x = x.detach().to(kind).contiguous()
        inner = torch.empty(len(x), len(weight1), dtype=kind)
        outer = multiply(x, weight1, bias1, activation="gelu", before=inner)
        ctx.save_for_backward(x, inner, outer, weight1, weight2)
        return multiply(outer, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, outer, weight1, weight2 = ctx.saved_tensors
        dy, wanted = dy.contiguous(), ctx.needs_input_grad
        of_second = gradients_of_weights(dy, outer, weight2, *wanted[4:])
        slopes = gradient_of_inputs(dy, weight2, dy.dtype, activation="gelu_slope", before=inner)
        dx = gradient_of_inputs(slopes, weight1, ctx.of) if wanted[0] else None
        return dx, None, *gradients_of_weights(slopes, x, weight1, *wanted[2:4]), *of_second
