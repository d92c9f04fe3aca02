"""Activation checkpointing: less memory in training for a second forward pass."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from protea.models.encoder import Encoder


def recompute_layers(model: Encoder) -> None:
    """Keep only the input of each layer for the backward pass, which computes the rest again."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
