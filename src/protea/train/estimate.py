"""What a recipe costs, before its first step.

Floating-point operations of a token, forwards and backwards (three times forwards):

    3 · (2 · layers · (4·D² + 2·D·F) + 4 · layers · L · D + 2 · (D² + V·D) · masked share)

with D the width, F the feed-forward width, V the vocabulary and L the mean length of the sequence a token is in. It is
what the model needs: what is computed again to save memory does not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12), their copies in main
memory while they are written, weights in the narrow type, and what the layers keep for the backward pass of a pack.
The last is counted from the tensors that PyTorch keeps, and measured to be right within a fifth or so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protea.device import available_memory
from protea.errors import TrainingError
from protea.models.encoder import Encoder, EncoderConfig
from protea.train.optim import is_matrix_of_layer, parameters_to_train
from protea.train.recipe import Recipe

_MASKED = 0.15


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
    width, layers = config.hidden_size, config.num_hidden_layers
    matrices = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    head = width**2 + width * config.vocab_size
    return 3 * (2 * matrices + 4 * layers * length * width + 2 * head * masked)


def estimate(model: Encoder, recipe: Recipe, length: float) -> Estimate:
    """What a recipe takes; the model may be on the meta device."""
    parameters = parameters_to_train(model)
    count = sum(each.numel() for each in parameters.values())
    matrices = sum(each.numel() for name, each in parameters.items() if is_matrix_of_layer(name, each))
    moments = 8 * count - (4 * matrices if recipe.optimizer.name == "muon" else 0)
    mixed = recipe.run.precision != "float32"
    return Estimate(
        parameters=count,
        tokens=recipe.batch.packs * recipe.batch.pack,
        packs=recipe.batch.packs,
        flops=flops_per_token(model.config, length),
        state=8 * count + moments + (2 * count if mixed else 0),
        copies=4 * count + moments,
        activations=_activations(model.config, recipe),
    )


def _activations(config: EncoderConfig, recipe: Recipe) -> int:
    """Bytes kept for a pack.

    Per token and layer: the residual stream before both norms, their outputs, queries, keys and values before and
    after rotation, attention's output, and the feed-forward width before and after its activation.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    narrow = 4 if recipe.run.precision == "float32" else 2
    layer = 2 * 4 * width + narrow * (10 * width + 2 * ffn)
    if recipe.run.recompute:
        return recipe.batch.pack * (4 * width * config.num_hidden_layers + layer)
    return recipe.batch.pack * layer * config.num_hidden_layers


def check_memory(needs: Estimate, device: torch.device) -> None:
    """See that a run fits.

    Raises:
        TrainingError: it cannot, by any reckoning; says what would help.
    """
    if device.type == "cuda":
        _compare(needs.state + needs.activations, torch.cuda.mem_get_info(device)[0], f"on {device}")
        _compare(needs.copies, available_memory(), "of main memory, for checkpoints,")
    else:
        _compare(needs.state + needs.activations + needs.copies, available_memory(), "of main memory")


def _compare(needed: int, available: int, where: str) -> None:
    if needed > available:
        raise TrainingError(
            f"this recipe needs about {needed / 1e9:,.1f} GB {where}, and {available / 1e9:,.1f} GB are free: lower "
            "batch.pack, set run.recompute=true, or train a smaller model"
        )
