"""What a checkpoint computes for a few fixed sequences, with the weights of one layer in memory at a time."""

from __future__ import annotations

import re
from typing import Final

import torch
from torch import Tensor, nn

from protea.allocator import return_freed_memory
from protea.checkpoints.checkpoint import Checkpoint, like
from protea.models.encoder import Encoder
from protea.packing import PackedBatch, pack

PROBES: Final = (
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK",
    "ACDEFGHIKLMNPQRSTVWYXBUZO",
    "GSHMASMTGGQQMGRDP<mask>FRAEIAKRLG<mask>EWNHHHHHH",
)
"""A stretch of a protein, every letter, and one with masked positions."""


def logits(checkpoint: Checkpoint) -> list[Tensor]:
    """Logits in float32 of the probes, ``[T, V]`` each, V in the alphabet; last hidden states without a head.

    The weights of one layer at a time are in memory.
    """
    model = like(checkpoint.model)

    def fill(module: nn.Module, prefix: str, recurse: bool = True) -> None:
        names = [name for name, _ in module.named_parameters(recurse=recurse)]
        module.load_state_dict(
            {name: checkpoint.parameter(f"{prefix}{name}").float() for name in names}, assign=True, strict=False
        )

    fill(model, "", recurse=False)
    for name, module in model.named_children():
        if name != "layers":
            fill(module, f"{name}.")
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda module, _, number=number: fill(module, f"layers.{number}."))
        layer.register_forward_hook(lambda module, _, __: _empty(module))
    batch = probe_batch(model)
    with torch.inference_mode():
        x = model(batch)
        if model.lm_head is not None:
            x = model.head(x)[:, : len(model.alphabet)]
    return [x[start:end] for start, end in batch.cu_seqlens.spans()]


def _empty(module: nn.Module) -> None:
    module.to("meta")
    return_freed_memory()  # what was put together for a layer would else stay in holes too small for the next


def probe_batch(model: Encoder) -> PackedBatch:
    """The probes as a model's tokens, without letters that it does not know."""
    alphabet = model.alphabet
    probes = [re.sub(r"[A-Z]", lambda letter: letter[0] * (letter[0] in alphabet.tokens), probe) for probe in PROBES]
    return pack([alphabet.frame.around(alphabet.encode(probe)) for probe in probes])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of max(1, the largest of theirs)."""
    scale = max(1.0, *(float(one.abs().max()) for one in theirs))
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale
