"""Changes to a model for training; parameters and their names stay."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.models.layers import chooses_rows


def compile_layers(model: Encoder, device: torch.device, *, fixed: bool = False) -> None:
    """Compile the methods that layers list as ``tokenwise``; ``DeviceError`` on a CPU without a C++ compiler.

    The weights may still be on the meta device; ``device`` is where they will be. ``fixed`` says that all packs have
    the same number of tokens; of those, the last layer computes another number of rows in each pack.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError) as error:
            raise DeviceError("no C++ compiler was found; install one (g++)") from error
    *_, last = model.layers
    for layer in model.layers:
        varies = layer is last and chooses_rows(layer)
        for name in getattr(layer, "tokenwise", ()):
            dynamic = not fixed or (varies and name == "after")
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=dynamic))


def recompute_layers(model: Encoder) -> None:
    """Keep only the input of each layer for the backward pass, which computes the rest again."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
