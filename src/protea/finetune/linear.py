"""Linear heads, solved instead of trained: ridge regression and logistic regression over a row of penalties.

The objective is the mean loss over labelled rows plus penalty / 2 times the sum of squared weights, of standardised
inputs; the intercept is free. The penalty with the least loss on the validation part is taken. Ridge regression is
solved for all penalties from one decomposition of the covariance; logistic regression by L-BFGS, from strong to weak
penalties, each from the solution before.

Shapes: R rows, F inputs, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

import torch
from torch import Tensor

from protea.finetune.heads import HF, Head, HeadConfig
from protea.finetune.tasks import MISSING

RIDGE: Final = tuple(10.0**power for power in (3, 2, 1, 0, -1, -2, -3, -4, -5))
LOGISTIC: Final = tuple(10.0**power for power in (0, -1, -2, -3, -4, -5, -6))
"""Penalties, from strong to weak."""

_ITERATIONS: Final = 100
_WORSE: Final = 2  # penalties in a row without a better validation loss, after which weaker ones are not tried


@dataclass(frozen=True)
class LabelledRows:
    """Labelled rows: inputs ``[R, F]`` and targets ``[R]`` or ``[R, C]``."""

    x: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Solved:
    """A solved head, its penalty, and its mean loss on the validation part."""

    head: Head
    penalty: float
    loss: float


def known(x: Tensor, targets: Tensor) -> LabelledRows:
    """The rows that have a label."""
    if targets.dtype == torch.int64:
        present = targets != MISSING
    else:
        present = ~targets.isnan() if targets.ndim == 1 else ~targets.isnan().all(1)
    return LabelledRows(x[present], targets[present])


def solve(config: HeadConfig, train: LabelledRows, validation: LabelledRows, weights: Tensor | None = None) -> Solved:
    """The linear head with the best penalty; ``weights`` ``[C]`` of classes or labels.

    ``LabelledRows.x`` are the inputs of the head's body before scaling (``heads.combined`` for pairs).
    """
    head = Head(config)
    standardise(head, train.x)
    if head.task.kind == "value":
        scale_targets(head, train.targets)
        return _ridge(head, train, validation)
    return _logistic(head, train, validation, weights)


def standardise(head: Head, x: Tensor) -> None:
    """Centre and scale a head's inputs as the rows of ``x`` ask; constant inputs keep their scale, ``HF``'s all."""
    if head.config.kind == HF:
        return
    head.centre.copy_(x.mean(0, dtype=torch.float64))
    spread = torch.sqrt(((x - head.centre) ** 2).mean(0, dtype=torch.float64))
    head.spread.copy_(torch.where(spread > 1e-6, spread, 1.0))


def scale_targets(head: Head, targets: Tensor) -> None:
    """Set the mean and spread of the values that a head predicts."""
    present = targets[~targets.isnan()].double()
    spread = present.std(correction=0).item() if len(present) else 0.0
    head.target.copy_(torch.tensor([present.mean().item() if len(present) else 0.0, spread or 1.0]))


def _mean_loss(head: Head, x: Tensor, targets: Tensor, weights: Tensor | None) -> float:
    with torch.no_grad():
        total, count = head.loss(head.body(x, x), targets, weights)
    return float(total / count) if count else inf


def _ridge(head: Head, train: LabelledRows, validation: LabelledRows) -> Solved:
    x, x_validation = (((rows.x - head.centre) / head.spread).double() for rows in (train, validation))
    y = (train.targets.double() - head.target[0].double()) / head.target[1].double()
    # Of the smaller of the two matrices that have the same non-zero eigenvalues.
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    rotated = vectors.T @ (y if wide else x.T @ y)
    best: Solved | None = None
    layer = head.body
    chosen = None
    for penalty in RIDGE:
        weight = vectors @ (rotated / (values.clamp_min(0) + penalty * len(x)))
        weight = x.T @ weight if wide else weight
        truth = (validation.targets.double() - head.target[0].double()) / head.target[1].double()
        loss = float(((x_validation @ weight - truth) ** 2).mean()) if len(truth) else inf
        if best is None or loss < best.loss:
            best, chosen = Solved(head, penalty, loss), weight
    assert best is not None
    assert chosen is not None
    with torch.no_grad():
        layer.weight.copy_(chosen[None])  # type: ignore[operator]
        layer.bias.zero_()  # type: ignore[operator]
    return best


def _logistic(head: Head, train: LabelledRows, validation: LabelledRows, weights: Tensor | None) -> Solved:
    x, x_validation = ((rows.x - head.centre) / head.spread for rows in (train, validation))
    parameters = list(head.body.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    best: Solved | None = None
    state: list[Tensor] = []
    since = 0
    for penalty in LOGISTIC:
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=_ITERATIONS, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            total, count = head.loss(head.body(x, x), train.targets, weights)
            objective = total / count + penalty / 2 * (parameters[0] ** 2).sum()
            objective.backward()  # type: ignore[no-untyped-call]
            return objective

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        loss = _mean_loss(head, x_validation, validation.targets, weights)
        if best is None or loss < best.loss:
            best, state, since = Solved(head, penalty, loss), [p.detach().clone() for p in parameters], 0
        else:
            since += 1
            if since == _WORSE:
                break
    assert best is not None
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return best
