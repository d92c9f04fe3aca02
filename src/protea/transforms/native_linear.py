"""Lets a model train in float32 with the products of Protea's native library, which are exact and fast on every CPU.

PyTorch's products are as fast as the processor only where Intel's library recognises it.

Shapes: T tokens, D inputs, N outputs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from protea.models.convolution import Convolution
from protea.models.encoder import Encoder
from protea.native.products import Packed, Unpacked, linear, supports

_LEAST: Final = 64
"""Fewest inputs and outputs of a layer that is worth it."""


def multiply_natively(model: Encoder) -> None:
    """Give the linear layers of a model's blocks the library's products, in place, if there is a library.

    The model is on a CPU, or will be: on meta it has no weights yet.
    """
    if not supports(torch.float32):
        return
    for part in model.layers.modules():
        if type(part) is nn.Linear and min(part.in_features, part.out_features) >= _LEAST:
            part.__class__ = NativeLinear
        elif type(part) is Convolution and part.in_channels >= _LEAST:
            part.__class__ = NativeConvolution


class NativeLinear(nn.Linear):
    """``nn.Linear`` whose products, forward and backward, are the library's where they are in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, N]``."""
        return _product(x, self.weight, self.bias)


class NativeConvolution(Convolution):
    """``Convolution`` with such products."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weights of one place, ``[T, I]``."""
        return _product(x, weight, bias)


def is_native(x: Tensor, weight: Tensor) -> bool:
    """Whether the library computes the product of a tensor with a weight."""
    there = x.dim() == 2 and x.device.type == "cpu" and {x.dtype, weight.dtype} == {torch.float32}
    return there and supports(torch.float32) and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not is_native(x, weight):
        return F.linear(x, weight, bias)
    y = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x.detach().contiguous(), Packed.of(weight), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        wanted = ctx.needs_input_grad
        return (
            linear(dy, Unpacked.of(weight.T)) if wanted[0] else None,
            linear(dy.T, Unpacked.of(x.contiguous().T)) if wanted[1] else None,
            dy.sum(0) if wanted[2] else None,
        )
