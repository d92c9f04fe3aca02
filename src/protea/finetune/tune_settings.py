"""How an encoder and a head are trained together.

The learning rates are those of Schmirler et al. 2024 (Nat Commun 15:7407). Few examples need more epochs, since it is
updates that teach (Mosbach et al. 2021; Zhang et al. 2021). The rate falls to 0 over all updates, and a model gets
better until then, so the default patience is long; the best weights are kept in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Final, Literal

from protea.errors import ArgumentError
from protea.train.model import TYPES

RATES: Final = {"lora": 3e-4, "full": 2e-5}
HEAD_RATE: Final = 1e-3
EPOCHS: Final = 10
ENOUGH: Final = 400
MOST_EPOCHS: Final = 50
"""Epochs by default: so many, or more until so many updates are reached, but not more than that."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How an encoder and a head are trained.

    Attributes:
        method: ``lora`` trains adapters of all matrices of the layers, ``full`` all weights.
        lr: highest learning rate of the encoder; None is 3e-4 for LoRA and 2e-5 for all weights.
        head_lr: highest learning rate of the head; None is 1e-3.
        weight_decay: of AdamW, for matrices.
        rank: of LoRA.
        alpha: LoRA's products are scaled by alpha / rank.
        dora: whether adapters are DoRA's.
        lora_dropout: share of the adapters' inputs that are dropped in training; the encoder has no dropout.
        layer_decay: with ``full``, the learning rate of a layer that is n layers below the top is lr * layer_decay^n;
            the embedding is below all layers.
        epochs: most passes over the training part; None is 10, and of few examples as many as give 400 updates, at most
            50.
        steps: most updates, in place of ``epochs``.
        batch: examples of an update.
        token_budget: tokens of a pack; None is what the free memory allows, at most 8,192. It bounds memory alone.
        warmup: share of the updates after which the learning rate is highest; from there it falls to 0 linearly.
        clip: largest norm of a gradient; None for no limit.
        validations: validations of an epoch, if it has updates enough.
        apart: updates from one validation to the next, at least.
        patience: epochs in which neither the number of the validation part nor its loss got better, after which
            training stops; None is a third of all epochs, and at least one.
        precision: ``float32``, ``bf16-mixed``, ``fp16-mixed``, or ``auto``: ``bf16-mixed`` if the device multiplies
            bfloat16 natively, else ``float32``.
        recompute: keep only the inputs of layers for the backward pass; saves memory, costs a third more time.
        class_weights: weigh classes by the inverse of their number.
    """

    method: Literal["lora", "full"] = "lora"
    lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.01
    rank: int = 8
    alpha: int = 16
    dora: bool = False
    lora_dropout: float = 0.0
    layer_decay: float = 1.0
    epochs: float | None = None
    steps: int | None = None
    batch: int = 8
    token_budget: int | None = None
    warmup: float = 0.05
    clip: float | None = 1.0
    validations: int = 4
    apart: int = 10
    patience: float | None = None
    precision: str = "auto"
    recompute: bool = False
    class_weights: bool = False

    def __post_init__(self) -> None:
        names = ("lr", "head_lr", "rank", "alpha", "epochs", "steps", "batch", "token_budget", "clip", "validations")
        for name in (*names, "apart", "patience", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ArgumentError(f"{name}={value}: must be above 0")
        for name, most in (("layer_decay", 1), ("warmup", 1), ("lora_dropout", 0.99), ("weight_decay", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ArgumentError(f"{name}={getattr(self, name)}: must be from 0 to {most}")
        for name, choices in (("method", tuple(RATES)), ("precision", ("auto", *TYPES))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")

    def updates(self, of_epoch: int) -> int:
        """The most updates, of which an epoch has ``of_epoch``."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * of_epoch))
        return max(EPOCHS * of_epoch, min(ENOUGH, MOST_EPOCHS * of_epoch))

    def waits(self, of_epoch: int) -> int:
        """Updates that ``patience`` stands for."""
        if self.patience is None:
            return max(of_epoch, -(-self.updates(of_epoch) // 3))
        return max(1, round(self.patience * of_epoch))

    @property
    def rate(self) -> float:
        """The highest learning rate of the encoder."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def highest_head_rate(self) -> float:
        """The highest learning rate of the head."""
        return HEAD_RATE if self.head_lr is None else self.head_lr
