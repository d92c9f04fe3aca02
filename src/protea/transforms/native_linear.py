"""Lets a model train with the products of Protea's native library, which are exact and fast on every CPU.

PyTorch's float32 products are as fast as the processor only where Intel's library recognises it. Under autocast to
bfloat16 the products read and write what the layers around them hold, without passes that only convert.

Shapes: T tokens, I inputs and outputs of a convolution.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from protea.models.convolution import Convolution
from protea.models.encoder import Encoder
from protea.models.transformer import SelfAttention, TransformerLayer
from protea.native.products import supports
from protea.transforms.native_layers import NativeAttention, NativeLayer
from protea.transforms.native_products import NativeLinear, product

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
        elif type(part) is SelfAttention:
            part.__class__ = NativeAttention
        elif type(part) is TransformerLayer:
            part.__class__ = NativeLayer


class NativeConvolution(Convolution):
    """``Convolution`` with such products."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weights of one place, ``[T, I]``."""
        return product(x, weight, bias)
