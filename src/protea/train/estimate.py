"""What a recipe costs, before its first step.

Floating-point operations of a token, forwards and backwards, are three times those of the family's forward pass. It is
what the model needs: what is computed again to save memory does not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12; frozen ones 4), copies of
weights and moments in main memory while they are written, weights in the narrow type, and what the family's layers keep
for the backward pass of a pack. The last is within a tenth of what PyTorch keeps, compiled or not; in bfloat16 on a CPU
without compiled attention it keeps a quarter more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from protea.device import available_memory
from protea.errors import TrainingError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.train.optim import is_matrix_of_layer, parameters_to_train
from protea.train.recipe import Recipe

_MASKED: Final = 0.15


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        parameters: that are trained.
        tokens: of a step.
        packs: of a step.
        flops: of a token at the given mean length, forwards and backwards.
        state: bytes of weights, gradients and moments.
        copies: bytes of main memory for saving.
        activations: bytes kept for the backward pass of a pack.
    """

    parameters: int
    tokens: int
    packs: int
    flops: float
    state: int
    copies: int
    activations: int


def flops_per_token(config: EncoderConfig, length: float, masked: float = _MASKED) -> float:
    """Of a training step; ``length`` is the mean length of the sequence that a token is in, in tokens."""
    return 3 * config.forward_flops(length, masked)


def estimate(model: Encoder, recipe: Recipe, length: float) -> Estimate:
    """What a recipe takes; the model may be on the meta device."""
    parameters = parameters_to_train(model)
    weights = sum(each.numel() for each in model.parameters())
    count = sum(each.numel() for each in parameters.values())
    matrices = sum(each.numel() for name, each in parameters.items() if is_matrix_of_layer(name, each))
    moments = 8 * count - (4 * matrices if recipe.optimizer.name == "muon" else 0)
    run, pack = recipe.run, recipe.batch.pack
    mixed, on_cpu = run.precision != "float32", _on_cpu(run.device)
    kept = model.config.activation_bytes(length, mixed=mixed, recompute=run.recompute, on_cpu=on_cpu)
    return Estimate(
        parameters=count,
        tokens=recipe.batch.packs * pack,
        packs=recipe.batch.packs,
        flops=flops_per_token(model.config, length),
        state=4 * weights + 4 * count + moments + (2 * weights if mixed else 0),
        copies=4 * weights + moments,
        activations=pack * kept,
    )


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def check_memory(needs: Estimate, device: torch.device) -> None:
    """See that a run fits.

    Raises:
        TrainingError: it cannot, by any reckoning; says what would help.
    """
    if device.type == "cuda":
        _compare(needs.state, needs.activations, torch.cuda.mem_get_info(device)[0], f"on {device}")
        _compare(needs.copies, 0, available_memory(), "of main memory, for checkpoints,")
    else:
        _compare(needs.state + needs.copies, needs.activations, available_memory(), "of main memory")


def _compare(model: int, activations: int, available: int, where: str) -> None:
    if model + activations <= available:
        return
    remedy = "lower batch.pack, or set run.recompute=true"
    if model > available:
        remedy = f"{model / 1e9:,.1f} GB are for the model alone: train a smaller one, or find more memory"
    raise TrainingError(
        f"this recipe needs about {(model + activations) / 1e9:,.1f} GB {where}, and {available / 1e9:,.1f} GB are "
        f"free: {remedy}"
    )
