"""What a recipe costs, before its first step.

Floating-point operations of a token, forwards and backwards (three times forwards):

    3 · (2 · layers · (4·D² + 2·D·F) + 4 · layers · L · D + 2 · (D² + V·D) · masked share)

with D the width, F the feed-forward width, V the vocabulary and L the mean length of the sequence a token is in. It is
what the model needs: what is computed again to save memory does not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12), their copies in main
memory while they are written, weights in the narrow type, and what the layers keep for the backward pass of a pack.
The last is within a tenth of what PyTorch keeps, compiled or not; in bfloat16 on a CPU without compiled attention it
keeps a quarter more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from protea.device import available_memory
from protea.errors import TrainingError
from protea.models.encoder import Encoder, EncoderConfig
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
        activations=recipe.batch.pack * _activations(model.config, recipe, length),
    )


def _activations(config: EncoderConfig, recipe: Recipe, length: float) -> int:
    """Bytes kept for a token.

    A layer keeps the residual stream before both norms; what its products take, which is cast for each of them where
    they are narrow: the norms' outputs and attention's; queries, keys and values, and attention's output once more;
    the feed-forward width before and after its activation. Dropout keeps what it multiplied with, and on a CPU
    attention then keeps its probabilities, three times.
    """
    width, ffn, mixed = config.hidden_size, config.intermediate_size, recipe.run.precision != "float32"
    products = (9 if mixed else 7) * width + 2 * ffn + (2 * width if config.hidden_dropout_prob else 0)
    layer = 4 * 2 * width + (2 if mixed else 4) * products
    if config.attention_probs_dropout_prob and _on_cpu(recipe.run.device):
        layer += 4 * 3 * config.num_attention_heads * round(length)
    layers = config.num_hidden_layers
    return 4 * width * layers + layer if recipe.run.recompute else layer * layers


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
