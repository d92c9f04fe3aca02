"""Optimizers over a model's parameters, and their state by the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from protea.errors import CheckpointError, UsageError
from protea.train.recipe import Optimizer

PREFIX: Final = "optimizer."
_KINDS: Final = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""What an optimizer keeps of a parameter."""


def parameters_to_train(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require gradients; the others are frozen."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def is_matrix_of_layer(name: str, parameter: Tensor) -> bool:
    """Whether Muon would update it."""
    return parameter.ndim == 2 and name.startswith("layers.")


class Optimizers:
    """One or two optimizers that step together.

    AdamW keeps its moments in float32 and updates everything in one fused kernel. With Muon (Jordan et al. 2024), the
    layers' matrices are updated by it, scaled so that AdamW's learning rates fit (Liu et al. 2025); embeddings, norms,
    biases and the head stay with AdamW.

    Args:
        parameters: by name; all are trained.
        settings: which, and how.

    Raises:
        UsageError: there are none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> None:
        if not parameters:
            raise UsageError("there is nothing to train: no parameter of the model requires gradients")
        self.parameters = dict(parameters)
        matrices = {
            name for name, each in parameters.items() if settings.name == "muon" and is_matrix_of_layer(name, each)
        }
        rest = [(name, each) for name, each in parameters.items() if name not in matrices]
        groups: list[dict[str, Any]] = [
            {"params": [each for _, each in rest if each.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [each for _, each in rest if each.ndim <= 1], "weight_decay": 0.0},
        ]
        self.each: list[torch.optim.Optimizer] = []
        if rest:
            self.each.append(
                torch.optim.AdamW(
                    [group for group in groups if group["params"]],
                    lr=settings.lr,
                    betas=settings.betas,
                    eps=settings.eps,
                    fused=True,
                )
            )
        if matrices:
            self.each.append(
                torch.optim.Muon(
                    [parameters[name] for name in parameters if name in matrices],
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    momentum=settings.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def clip(self, scaler: torch.amp.GradScaler, limit: float | None) -> Tensor:
        """The norm of all gradients together, which are scaled down to a limit if there is one."""
        gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
        if scaler.is_enabled() and len(self.each) > 1:
            # The scaler judges each optimizer by itself; what overflows for one has to be left out by both.
            overflow = 0 * nn.utils.get_total_norm(gradients)
            for optimizer in self.each:
                optimizer.param_groups[0]["params"][0].grad.add_(overflow)
        for optimizer in self.each:
            scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        return norm

    def step(self, scaler: torch.amp.GradScaler, rate: float) -> None:
        """Update the weights, at a learning rate."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
        scaler.update()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that the next step depends on: ``optimizer.NAME.KIND`` and its tensor."""
        names = {id(each): name for name, each in self.parameters.items()}
        for optimizer in self.each:
            for parameter, kinds in optimizer.state.items():
                for kind, value in kinds.items():
                    yield f"{PREFIX}{names[id(parameter)]}.{kind}", value

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            CheckpointError: it is of other parameters, or of another optimizer.
        """
        owners = {
            id(each): optimizer for optimizer in self.each for g in optimizer.param_groups for each in g["params"]
        }
        for key, value in stored.items():
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            parameter = self.parameters.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(f"{key} belongs to no parameter of this model")
            # AdamW's step counts stay where they are read: fused kernels want them beside the parameter.
            owners[id(parameter)].state[parameter][kind] = value.to(parameter.device, copy=True)
        for name, each in self.parameters.items():
            optimizer = owners[id(each)]
            found, known = set(optimizer.state.get(each, ())), _KINDS[type(optimizer)]
            # Overflows may have kept an optimizer from its first step.
            if found and found != known:
                raise CheckpointError(
                    f"{PREFIX}{name} has {', '.join(sorted(found))}, and {type(optimizer).__name__} keeps "
                    f"{', '.join(sorted(known))}: optimizer.name was another; give that one again, or export the "
                    "model and begin a run with it as init"
                )
