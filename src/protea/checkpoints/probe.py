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
"""Part of a protein, all letters, and a sequence with masked positions."""


def logits(checkpoint: Checkpoint) -> list[Tensor]:
    """Logits of the probes in float32, ``[T, V]`` each, V the alphabet; last hidden states without a head."""
    model = like(checkpoint.model)

    def fill(module: nn.Module, prefix: str, recurse: bool = True) -> None:
        names = [name for name, _ in module.named_parameters(recurse=recurse)]
        values = {name: checkpoint.parameter(f"{prefix}{name}").float() for name in names}
        module.load_state_dict(values, assign=True, strict=False)

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
    return_freed_memory()  # else the memory of this layer stays reserved in pieces that do not fit the next


def probe_batch(model: Encoder) -> PackedBatch:
    """The probes as a model's tokens, without letters that are not in its alphabet."""
    alphabet = model.alphabet
    probes = [re.sub(r"[A-Z]", lambda letter: letter[0] * (letter[0] in alphabet.tokens), probe) for probe in PROBES]
    return pack([alphabet.frame.around(alphabet.encode(probe)) for probe in probes])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of max(1, the largest of theirs)."""
    scale = max(1.0, *(float(values.abs().max()) for values in theirs))
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale
