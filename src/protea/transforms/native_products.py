"""Linear layers that train with the products of Protea's native library.

Shapes: T tokens, D inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from protea.device import has_matrix_unit
from protea.native.products import Packed, Unpacked, linear, supports


class NativeLinear(nn.Linear):
    """``nn.Linear`` whose products, forward and backward, are the library's where it has their type."""

    faster_form_of = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, N]``."""
        return product(x, self.weight, self.bias)


def product_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which the library multiplies a tensor with a weight; ``None`` if PyTorch does."""
    given = {x.dtype, weight.dtype}
    if x.dim() != 2 or x.device.type != "cpu":
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if given == {torch.float32} and supports(torch.float32) else None
    narrow = torch.bfloat16
    fits = torch.get_autocast_dtype("cpu") == narrow and given <= {torch.float32, narrow}
    return narrow if fits and supports(narrow) and not has_matrix_unit() else None


def is_native(x: Tensor, weight: Tensor) -> bool:
    """Whether the library multiplies a tensor with a weight in float32."""
    return product_type(x, weight) == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a linear layer, ``[T, N]``: the library's, or PyTorch's."""
    kind = product_type(x, weight)
    if kind is None:
        return F.linear(x, weight, bias)
    y = _Product.apply(x, weight, bias, kind)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
        ctx.of = x.dtype
        x = x.detach().to(kind).contiguous()
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, wanted = dy.contiguous(), ctx.needs_input_grad
        dx = gradient_of_inputs(dy, weight, ctx.of) if wanted[0] else None
        return dx, *gradients_of_weights(dy, x, weight, *wanted[1:3]), None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The product ``[T, N]`` in the type of ``x``; the options are those of ``protea.native.products.linear``."""
    wide = None if bias is None else bias.detach().float()
    return linear(x, Packed.of(weight.detach().to(x.dtype)), wide, narrow=True, **options)


def gradient_of_inputs(dy: Tensor, weight: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """The gradient ``[T, D]`` in the type of the inputs, float32 or that of ``dy``."""
    turned = weight.detach().to(dy.dtype).T
    return linear(dy, Unpacked.of(turned), narrow=dtype == dy.dtype, **options)


def gradients_of_weights(
    dy: Tensor, x: Tensor, weight: Tensor, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a weight ``[N, D]`` and of a bias ``[N]``, as far as they are wanted."""
    dw = None
    if of_weight and x.dtype == torch.float32:
        dw = linear(dy.T, Unpacked.of(x.T))
    elif of_weight:
        dw = (dy.T @ x).to(weight.dtype)  # PyTorch's product is as fast, and needs no pairs of tokens side by side
    return dw, dy.sum(0).to(weight.dtype) if of_bias else None
