"""What scripts use of fair-esm's ``esm.modules`` outside its models: two functions for contacts, heads and norms.

Shapes: L residues.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor
from torch.nn import LayerNorm as ESM1bLayerNorm
from torch.nn.functional import gelu

from protea.compat.esm.absent import refuse
from protea.compat.esm.head_modules import ContactPredictionHead, RobertaLMHead

__all__ = ["ContactPredictionHead", "ESM1bLayerNorm", "RobertaLMHead", "apc", "gelu", "symmetrize"]


def symmetrize(x: Tensor) -> Tensor:
    """``x + xᵀ`` over the last two axes, ``[..., L, L]``."""
    return x + x.mT


def apc(x: Tensor) -> Tensor:
    """Average product correction: ``x - r c / t``, with row sums r, column sums c and their sum t, ``[..., L, L]``."""
    return x - x.sum(-1, keepdim=True) * x.sum(-2, keepdim=True) / x.sum((-1, -2), keepdim=True)


def __getattr__(name: str) -> NoReturn:
    if name[:1].isupper():
        refuse(f"esm.modules.{name}", "layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
