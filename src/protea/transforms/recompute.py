"""Activation checkpointing: memory saved in training at the price of a second forward pass."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from protea.models.encoder import Encoder


def recompute_layers(model: Encoder) -> None:
    """Keep of each layer only its input for the backward pass, which computes the rest again."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
