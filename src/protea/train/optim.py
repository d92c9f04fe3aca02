"""Optimizers over a model's parameters, and their state by parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from protea.errors import CheckpointError, UsageError
from protea.train.recipe import OptimizerSettings

PREFIX: Final = "optimizer."
_STATE_OF: Final = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What each optimizer stores for a parameter."""


def parameters_to_train(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients; the others are frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_matrix_of_layer(name: str, parameter: Tensor) -> bool:
    """Whether Muon would update the parameter."""
    return parameter.ndim == 2 and name.startswith("layers.")


class Optimizers:
    """One or two optimizers that step together.

    AdamW keeps its moments in float32 and updates everything in one fused kernel. With Muon (Jordan et al. 2024), Muon
    updates the layers' matrices, scaled so that AdamW's learning rates fit (Liu et al. 2025); AdamW updates embeddings,
    norms, biases and the head.

    Args:
        parameters: by name; all of them are trained.
        settings: which optimizer, and its numbers.

    Raises:
        UsageError: there are no parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings) -> None:
        if not parameters:
            raise UsageError("there is nothing to train: no parameter of the model requires gradients")
        self.parameters = dict(parameters)
        matrices = {
            name: parameter
            for name, parameter in parameters.items()
            if settings.name == "muon" and is_matrix_of_layer(name, parameter)
        }
        rest = [parameter for name, parameter in parameters.items() if name not in matrices]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.members: list[torch.optim.Optimizer] = []
        if groups:
            self.members.append(
                torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
            )
        if matrices:
            self.members.append(
                torch.optim.Muon(
                    list(matrices.values()),
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    momentum=settings.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def clip(self, scaler: torch.amp.GradScaler, limit: float | None) -> Tensor:
        """Scale the gradients down to a norm, if a limit is given; returns their norm before that."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if scaler.is_enabled() and len(self.members) > 1:
            # The scaler judges each optimizer separately, but both must skip a step that overflows for one of them.
            overflow = 0 * nn.utils.get_total_norm(gradients)
            for optimizer in self.members:
                optimizer.param_groups[0]["params"][0].grad.add_(overflow)
        for optimizer in self.members:
            scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        return norm

    def step(self, scaler: torch.amp.GradScaler, rate: float) -> None:
        """Update the weights with a learning rate."""
        for optimizer in self.members:
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
        scaler.update()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that the next step depends on: ``optimizer.NAME.KIND`` and its tensor."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in self.members:
            for parameter, kinds in optimizer.state.items():
                for kind, value in kinds.items():
                    yield f"{PREFIX}{names[id(parameter)]}.{kind}", value

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Restore a state.

        Raises:
            CheckpointError: the state belongs to other parameters, or to another optimizer.
        """
        optimizer_of = {
            id(parameter): optimizer
            for optimizer in self.members
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in stored.items():
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            parameter = self.parameters.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(f"{key} belongs to no parameter of this model")
            # AdamW's fused kernels need its step counts on the parameter's device.
            optimizer_of[id(parameter)].state[parameter][kind] = value.to(parameter.device, copy=True)
        for name, parameter in self.parameters.items():
            optimizer = optimizer_of[id(parameter)]
            kinds, expected = set(optimizer.state.get(parameter, ())), _STATE_OF[type(optimizer)]
            # No state at all is correct if float16 gradients have overflowed in every step so far.
            if kinds and kinds != expected:
                raise CheckpointError(
                    f"{PREFIX}{name} has {', '.join(sorted(kinds))}, but {type(optimizer).__name__} needs "
                    f"{', '.join(sorted(expected))}: the checkpoint was written with another optimizer.name; use that "
                    "one, or export the model and start a run with it as init"
                )
