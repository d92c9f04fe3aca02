"""PyTorch's compiler for the token-wise parts of layers; parameters and their names stay."""

from __future__ import annotations

import torch

from protea.errors import DeviceError
from protea.models.encoder import Encoder


def compile_layers(model: Encoder) -> None:
    """Compile the methods that layers list as ``tokenwise``; ``DeviceError`` on a CPU without a C++ compiler."""
    if model.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError) as error:
            raise DeviceError("no C++ compiler was found; install one (g++)") from error
    for layer in model.layers:
        for name in getattr(layer, "tokenwise", ()):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))
