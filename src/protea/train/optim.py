"""Optimizers over a model's parameters, their state by parameter names, and the learning rate of each step.

Schedules; the first update is step 1:

    linear       max·s/w up to step w, then straight down to floor·max at step decay·S, and constant after it
    anneal-hold  min + (max - min)·s/w up to step w, then max·(1 - (s - w)/(S - w)), but at least floor·max
    cosine       max·s/w up to step w, then min + (max - min)·(1 + cos(π·(s - w)/(S - c - w)))/2, and min for the
                 last c steps
    constant     max·s/w up to step w, then max
    trapezoid    max·s/w up to step w, then max up to step decay·S, then straight down to floor·max at the last step

Here s is the step, w the warm-up, S the schedule's steps and c its constant steps. ``linear`` is the schedule of Meta's
and NVIDIA's recipes for ESM-2, ``anneal-hold`` is BioNeMo's ``WarmupAnnealDecayHold``, and ``cosine`` is NeMo's
``CosineAnnealing`` with ``constant_steps``, which ESM-1nv used. With ``trapezoid`` (Zhai et al. 2022; Hu et al. 2024) a
run can be extended while the rate is still at its maximum: the steps so far do not depend on where the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from protea.errors import CheckpointError, UsageError
from protea.train.recipe import OptimizerSettings, ScheduleSettings
from protea.train.world import local

PREFIX: Final = "optimizer."
_SHARE: Final = "share"  # of the learning rate, in a group of parameters
_STATE_OF: Final = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}
"""The kinds of state that each optimizer stores for a parameter."""


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

    ``shares`` are what the learning rate of some parameters is multiplied by. ``norm`` computes the norm of all values
    of gradients, those of other processes included.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        shares: Mapping[str, float] = MappingProxyType({}),
        norm: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
    ) -> None:
        if not parameters:
            raise UsageError("there is nothing to train: no parameter of the model requires gradients")
        self.parameters, self._norm = dict(parameters), norm
        names = {name for name in parameters if settings.name == "muon" and is_matrix_of_layer(name, parameters[name])}
        matrices = [parameters[name] for name in parameters if name in names]
        by_kind: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if name not in names:
                # A fused kernel takes either whole tensors or divided ones.
                kind = (parameter.ndim > 1, shares.get(name, 1.0), local(parameter) is parameter)
                by_kind.setdefault(kind, []).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": members, "weight_decay": settings.weight_decay if is_matrix else 0.0, _SHARE: share}
            for (is_matrix, share, _), members in sorted(by_kind.items(), key=lambda item: item[0], reverse=True)
        ]
        self.members: list[torch.optim.Optimizer] = []
        if groups:
            self.members.append(
                torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
            )
        if matrices:
            self.members.append(
                torch.optim.Muon(
                    matrices,
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
            overflow = 0 * self._norm(gradients)
            for optimizer in self.members:
                optimizer.param_groups[0]["params"][0].grad.add_(overflow)
        for optimizer in self.members:
            scaler.unscale_(optimizer)
        norm = self._norm(gradients)
        if limit is not None:
            factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm

    def step(self, scaler: torch.amp.GradScaler, rate: float) -> None:
        """Update the weights with a learning rate."""
        for optimizer in self.members:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get(_SHARE, 1.0)
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
        """Restore a state."""
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
            # It is correct that there is no state if float16 gradients overflowed in every step so far.
            if kinds and kinds != expected:
                raise CheckpointError(
                    f"{PREFIX}{name} has {', '.join(sorted(kinds))}, but {type(optimizer).__name__} needs "
                    f"{', '.join(sorted(expected))}: the checkpoint was written with another optimizer.name; use that "
                    "one, or export the model and start a run with it as init"
                )


def learning_rate(schedule: ScheduleSettings, step: int, *, highest: float, steps: int) -> float:
    """The learning rate of a step, from 1; steps after the curve's last have its last value.

    ``highest`` is the rate at the end of the warm-up; ``steps``, those of the run, count if the schedule has none.
    """
    total = schedule.steps or steps
    step = min(step, total)
    warmup = schedule.warmup
    if step <= warmup:
        start = schedule.min_lr if schedule.name == "anneal-hold" else 0.0
        return start + (highest - start) * step / warmup
    match schedule.name:
        case "linear":
            end = max(warmup, round(schedule.decay * total))
            done = 1.0 if step >= end else (step - warmup) / (end - warmup)
            return highest * (1 - (1 - schedule.floor) * done)
        case "anneal-hold":
            return highest * max(schedule.floor, 1 - (step - warmup) / (total - warmup))
        case "cosine":
            end = total - schedule.constant
            done = 1.0 if step >= end else (step - warmup) / (end - warmup)
            return schedule.min_lr + (highest - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
        case "trapezoid":
            begin = max(warmup, round(schedule.decay * total))
            done = 0.0 if step <= begin else (step - begin) / (total - begin)
            return highest * (1 - (1 - schedule.floor) * done)
        case "constant":
            return highest
