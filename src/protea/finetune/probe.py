"""Heads on frozen features: trained by AdamW with early stopping, or solved if they are linear; and their predictions.

Shapes: R rows to predict, C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, nan
from typing import Final

import numpy as np
import torch
from torch import Tensor

from protea.finetune.examples import Batch, Examples
from protea.finetune.heads import Head, HeadConfig, combined
from protea.finetune.linear import LabelledRows, known, scale_targets, solve, standardise
from protea.finetune.measures import SELECTED, Meter
from protea.finetune.tasks import Floats, Ints, Targets
from protea.progress import SILENT, Progress

MOST_ROWS: Final = 400_000
"""LabelledRows that a linear head is solved on, at most; of more, so many are drawn at random."""

_ROWS: Final = 16_384  # of hidden states that are computed at once


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How a head is trained on frozen features.

    Attributes:
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        batch: examples of a batch.
        epochs: most passes over the training part.
        patience: epochs without a better validation, after which training stops, at the end of an epoch.
        most_steps: steps between two validations, at most; an epoch ends with one.
        class_weights: weigh classes by the inverse of their number.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 32
    epochs: int = 60
    patience: float = 8
    most_steps: int = 150
    class_weights: bool = False


@dataclass
class Trained:
    """A trained head, its number on the validation part (``SELECTED``), and the learning curve.

    ``curve`` has a row for each validation: step, mean training loss since the last, validation loss, and the number.
    """

    head: Head
    selected: float
    loss: float
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def train_head(
    config: HeadConfig,
    train: Examples,
    validation: Examples,
    settings: ProbeSettings,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Trained:
    """Train or solve a head on features; the validation part chooses penalty or epoch."""
    if config.kind == "linear":
        return _solved(config, train, validation, settings, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(config, train, validation, settings, np.random.default_rng(seed), progress)


def predict(head: Head, examples: Examples) -> Floats:
    """Probabilities ``[R, C]``, or values ``[R]``, of all rows of the examples, in float64."""
    head.eval()
    with torch.inference_mode():
        parts = [head.outcome(head(batch.x, batch.lengths)).numpy() for batch in examples.batches(_ROWS)]
    width = () if head.task.kind == "value" else (head.config.outputs,)
    return np.concatenate([np.empty((0, *width)), *parts])


def class_weights(targets: Tensor, kind: str, outputs: int) -> Tensor:
    """Weights ``[C]``: of classes, rows / (classes * rows of the class); of labels, absent / present rows."""
    if kind == "class":
        counts = torch.bincount(targets[targets >= 0], minlength=outputs).float()
        return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)
    present = (targets == 1).sum(0).clamp_min(1)
    return ((targets == 0).sum(0).clamp_min(1) / present).float()


def score(head: Head, examples: Examples) -> tuple[float, float]:
    """The number that chooses between models (``SELECTED``) and the mean loss, on some examples."""
    with torch.inference_mode():
        return score_batches(head, examples.batches(_ROWS))


def score_batches(head: Head, batches: Iterable[Batch]) -> tuple[float, float]:
    """The same from batches, on the head's device, in any order."""
    outputs, targets, total, count = [], [], 0.0, 0.0
    head.eval()
    for batch in batches:
        rows = head(batch.x, batch.lengths)
        loss, rated = head.loss(rows, batch.targets)
        total, count = total + float(loss), count + float(rated)
        outputs.append(head.outcome(rows).cpu().numpy())
        targets.append(batch.targets.cpu().numpy())
    if not count:
        return nan, inf
    values = np.concatenate(targets)
    # Each row by itself: the number needs no examples.
    rated_targets = Targets(values, np.arange(len(values) + 1))
    name, _ = SELECTED[head.config.task]
    classes = tuple(map(str, range(head.config.outputs)))
    meter = Meter(head.task, np.concatenate(outputs), rated_targets, classes, (name,))
    return meter(np.ones(len(values)))[name], total / count


def _sample(examples: Examples, most: int, generator: np.random.Generator) -> Examples:
    """Examples with about ``most`` rows of hidden states, drawn at random."""
    sizes = np.diff(examples.features.offsets)[examples.which].sum(1)
    if sizes.sum() <= most:
        return examples
    order = generator.permutation(len(examples))
    count = max(1, int(np.searchsorted(np.cumsum(sizes[order]), most)))
    return examples.chosen(np.sort(order[:count]))


def linear_rows(examples: Examples, config: HeadConfig) -> LabelledRows:
    """All labelled rows of the examples as a linear head sees them."""
    batch = examples.batch(np.arange(len(examples)))
    return known(combined(batch.x) if Head(config).task.unit == "pair" else batch.x, batch.targets)


def _solved(config: HeadConfig, train: Examples, validation: Examples, settings: ProbeSettings, seed: int) -> Trained:
    generator = np.random.default_rng(seed)
    sampled = _sample(train, MOST_ROWS, generator)
    rows = linear_rows(sampled, config)
    of_validation = linear_rows(_sample(validation, MOST_ROWS // 2, generator), config)
    kind = Head(config).task.kind
    weights = class_weights(rows.targets, kind, config.outputs) if settings.class_weights and kind != "value" else None
    solved = solve(config, rows, of_validation, weights)
    selected, loss = score(solved.head, validation)
    notes = [f"the linear head's penalty is {solved.penalty:g}"]
    if len(sampled) < len(train):
        notes.append(f"the linear head was solved on {len(sampled):,} of {len(train):,} training examples, at random")
    return Trained(solved.head, selected, loss, notes=notes)


def _trained(
    config: HeadConfig,
    train: Examples,
    validation: Examples,
    settings: ProbeSettings,
    generator: np.random.Generator,
    progress: Progress,
) -> Trained:
    head = Head(config)
    sample = _sample(train, MOST_ROWS, generator)
    first = sample.batch(np.arange(len(sample)))
    standardise(head, combined(first.x) if head.task.unit == "pair" else first.x)
    all_targets = torch.cat(train.targets)
    if head.task.kind == "value":
        scale_targets(head, all_targets)
    weights = None
    if settings.class_weights and head.task.kind != "value":
        weights = class_weights(all_targets, head.task.kind, config.outputs)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best = Trained(copy.deepcopy(head), -inf, inf)
    curve: list[tuple[int, float, float, float]] = []
    step = best_step = 0
    total = count = 0.0
    progress.begin("training the head", settings.epochs * len(train))
    for _ in range(settings.epochs):
        order = generator.permutation(len(train))
        groups = np.array_split(order, max(1, -(-len(order) // settings.batch)))
        for number, group in enumerate(groups):
            loss, rated = _step(head, optimizer, train, group, weights)
            total, count, step = total + loss, count + rated, step + 1
            progress.advance(len(group))
            if (number + 1) % settings.most_steps and number + 1 < len(groups):
                continue
            selected, validation_loss = score(head, validation)
            curve.append((step, total / max(count, 1e-12), validation_loss, selected))
            total = count = 0.0
            if rank(selected, validation_loss) > rank(best.selected, best.loss):
                best, best_step = Trained(copy.deepcopy(head), selected, validation_loss), step
        if step - best_step >= settings.patience * len(groups):
            break
    best.curve = curve
    return best


def rank(selected: float, loss: float) -> tuple[float, float]:
    """What is higher for a better head. Where the number is not defined, as for constant values, the loss decides."""
    return -inf if np.isnan(selected) else selected, -loss


def _step(
    head: Head, optimizer: torch.optim.Optimizer, train: Examples, group: Ints, weights: Tensor | None
) -> tuple[float, float]:
    head.train()
    batch = train.batch(np.sort(group))
    loss, count = head.loss(head(batch.x, batch.lengths), batch.targets, weights)
    if not count:
        return 0.0, 0.0
    optimizer.zero_grad()
    (loss / count).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach()), float(count)
