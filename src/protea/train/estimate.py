"""What a recipe costs, before its first step.

Floating-point operations of a token, forward and backward, are three times those of the family's forward pass. Products
that are computed again to save memory do not count.

Bytes: weights, gradients and AdamW's moments in float32 (16 a parameter; Muon's matrices 12; frozen ones 4), copies of
weights and moments in main memory while they are written, weights in the narrow type, and what the family's layers keep
for the backward pass of a pack. The last is within a tenth of what PyTorch keeps, compiled or not; in bfloat16 on a CPU
without compiled attention PyTorch keeps a quarter more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from protea.device import available_memory
from protea.errors import TrainingError
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder
from protea.train.model import architecture
from protea.train.optim import is_matrix_of_layer, parameters_to_train
from protea.train.recipe import Recipe


@dataclass(frozen=True)
class Costs:
    """What a run takes: numbers of trained parameters and operations, and bytes."""

    parameters: int
    flops: float  # for a token, forward and backward
    state: int  # weights, gradients and moments
    copies: int  # main memory for saving
    activations: int  # kept for the backward pass of a pack

    def lines(self, recipe: Recipe) -> Iterator[str]:
        """The costs in words."""
        steps, packs, pack = recipe.run.steps, recipe.batch.packs, recipe.batch.pack
        tokens = packs * pack
        yield (
            f"{self.parameters:,} parameters; {steps:,} steps of {tokens:,} tokens ({packs:,} packs of {pack:,}), "
            f"{steps * tokens:.3g} tokens in all"
        )
        total = self.flops * tokens * steps
        seconds = total / 4e14
        time = f"{seconds / 3600:,.1f} hours" if seconds >= 360 else f"{seconds:,.0f} seconds"
        yield f"{self.flops:.3g} FLOP per token, {total:.3g} in all: {time} at 400 TFLOP/s"
        yield (
            f"memory: {self.state / 1e9:,.1f} GB weights, gradients, moments; {self.activations / 1e9:,.1f} GB "
            f"activations of a pack; {self.copies / 1e9:,.1f} GB main memory for checkpoints"
        )


def flops_per_token(config: EncoderConfig, length: float, masked: float = 0.15) -> float:
    """Operations of a training step for each token.

    ``length`` is the mean over tokens of the length of each token's sequence; the language-model head is computed for
    the ``masked`` share of the tokens.
    """
    return 3 * config.forward_flops(length, masked)


def estimate(model: Encoder, recipe: Recipe, length: float) -> Costs:
    """What a recipe takes for sequences of a mean length; the model may be on the meta device."""
    trained = parameters_to_train(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in trained.values())
    matrices = sum(parameter.numel() for name, parameter in trained.items() if is_matrix_of_layer(name, parameter))
    moments = 8 * count - (4 * matrices if recipe.optimizer.name == "muon" else 0)
    run = recipe.run
    mixed = run.precision != "float32"
    on_cpu = run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available())
    kept = model.config.activation_bytes(length, mixed=mixed, recompute=run.recompute, on_cpu=on_cpu)
    return Costs(
        parameters=count,
        flops=flops_per_token(model.config, length),
        state=4 * weights + 4 * count + moments + (2 * weights if mixed else 0),
        copies=4 * weights + moments,
        activations=recipe.batch.pack * kept,
    )


def describe(recipe: Recipe) -> Iterator[str]:
    """What a recipe takes if every sequence has the full length, in words; the data are not needed."""
    return estimate(architecture(recipe), recipe, recipe.data.max_tokens).lines(recipe)


def check_memory(costs: Costs, device: torch.device) -> None:
    """Compare the memory that a run needs with the free memory.

    Raises:
        TrainingError: the run does not fit; says what would help.
    """
    if device.type == "cuda":
        _compare(costs.state, costs.activations, torch.cuda.mem_get_info(device)[0], f"on {device}")
        _compare(costs.copies, 0, available_memory(), "of main memory for checkpoints")
    else:
        _compare(costs.state + costs.copies, costs.activations, available_memory(), "of main memory")


def _compare(model: int, activations: int, available: int, place: str) -> None:
    if model + activations <= available:
        return
    fix = "lower batch.pack, or set run.recompute=true"
    if model > available:
        fix = f"the model alone needs {model / 1e9:,.1f} GB: train a smaller model, or use a machine with more memory"
    raise TrainingError(
        f"this recipe needs about {(model + activations) / 1e9:,.1f} GB {place}, but only {available / 1e9:,.1f} GB "
        f"are free: {fix}"
    )
