"""The model families. Build one on the meta device, then give it its weights."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from protea.models.encoder import Encoder, EncoderConfig
from protea.models.esm1b import ESM1b, ESM1bConfig
from protea.models.esm1nv import ESM1nv, ESM1nvConfig
from protea.models.esm2 import ESM2, ESM2Config

__all__ = ["build", "initial_value"]


def build(config: EncoderConfig) -> Encoder:
    """A model without weights, on the meta device, in evaluation mode."""
    with torch.device("meta"):
        match config:
            case ESM2Config():
                return ESM2(config).eval()
            case ESM1bConfig():
                return ESM1b(config).eval()
            case ESM1nvConfig():
                return ESM1nv(config).eval()
    raise TypeError(f"no model family for {type(config).__name__}")


def initial_value(model: Encoder, name: str, seed: int) -> Tensor:
    """The published random initialisation of one parameter, float32 on the CPU.

    A function of the seed and the parameter's name alone, so that order, sharding, the number of parameters held at
    once and the machine change nothing. ``model`` may be on the meta device.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # NumPy's generator, since PyTorch's gives other values on processors with other vector instructions.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return model.initial_parameter(name, tuple(model.get_parameter(name).shape), generator)
