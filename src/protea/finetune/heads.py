"""Heads: from hidden states of an encoder to predictions, for examples of any length side by side, without padding.

``linear``           one linear layer, on each residue or on the vector of a sequence or pair.
``mlp``              a hidden layer, ReLU and dropout before it.
``cnn``              two convolutions of width 7 along the residues: the ConvNet of BioNeMo (Heinzinger et al. 2019).
``light-attention``  a mean over the residues with learned weights, and their maximum (Stärk et al. 2021).
``hf``               transformers' own: ``EsmForSequenceClassification``'s of the BOS state, or the linear layer of
                     ``EsmForTokenClassification``.

What lies beyond the ends of a sequence is zero, whatever lies beside it in a batch.

Shapes: X rows of hidden states (residues, or vectors of sequences), D their width, R rows to predict, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from protea.errors import UsageError
from protea.finetune.tasks import MISSING, TASKS, Task

RESIDUES: Final = "residues"
"""What a head reads if it needs the vectors of all residues; else the name of a pooling."""

HF: Final = "hf"
"""The kind of head that transformers has too. It reads the last layer as it is, without scales."""

_OF_RESIDUES: Final = ("linear", "mlp", "cnn", HF)
_OF_SEQUENCES: Final = ("linear", "mlp", "light-attention", HF)
_OF_PAIRS: Final = ("linear", "mlp")
HEADS: Final = {"residue": _OF_RESIDUES, "sequence": _OF_SEQUENCES, "pair": _OF_PAIRS}
"""The heads for each unit of a task."""

DEFAULTS: Final = {"residue": "cnn", "sequence": "linear", "pair": "linear"}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head is made of.

    Attributes:
        kind: one of ``HEADS``.
        task: name of the task.
        width: of the hidden states.
        outputs: classes or labels; 1 for values.
        pool: the pooling whose vector stands for a sequence; always bos for ``HF``.
        hidden: width of the hidden layer.
        dropout: share of hidden values that are dropped in training.
    """

    kind: str
    task: str
    width: int
    outputs: int
    pool: str = "mean"
    hidden: int = 32
    dropout: float = 0.25

    def __post_init__(self) -> None:
        heads = HEADS[TASKS[self.task].unit]
        if self.kind not in heads:
            raise UsageError(f"--head {self.kind}: a {self.task} task takes {', '.join(heads)}")
        if self.kind == HF:
            object.__setattr__(self, "pool", "bos")

    @property
    def reads(self) -> str:
        """``RESIDUES``, or the pooling of the vectors that the head reads."""
        residues = TASKS[self.task].unit == "residue" or self.kind == "light-attention"
        return RESIDUES if residues else self.pool

    def numbers(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


class Head(nn.Module):
    """A head with the scales of its data.

    Inputs are centred by ``centre`` and divided by ``spread``, ``[F]``; F is D, or 3 D for pairs. Values are predicted
    in units of their spread: ``target`` holds mean and spread of the training targets. All are buffers, so that a head
    is complete in its ``state_dict``. The inputs of ``HF`` keep centre 0 and spread 1.
    """

    centre: Tensor
    spread: Tensor
    target: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = 3 * config.width if self.task.unit == "pair" else config.width
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("target", torch.tensor([0.0, 1.0]))
        self.body = _BODIES[config.kind](width, config)

    @property
    def task(self) -> Task:
        """What the head predicts."""
        return TASKS[self.config.task]

    def inputs(self, x: Tensor) -> Tensor:
        """``[X, F]``: the scaled inputs of the body from hidden states ``[X, D]``."""
        x = combined(x) if self.task.unit == "pair" else x
        return (x - self.centre) / self.spread

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Outputs ``[R, C]``: logits, or values in units of ``target``.

        Args:
            x: hidden states ``[X, D]`` float32: all residues of the sequences in a row, or their vectors; the two
                sequences of a pair follow each other.
            lengths: ``[n]`` residues of each sequence, on the device of ``x``; heads that read vectors ignore it.
        """
        outputs: Tensor = self.body(self.inputs(x), lengths)
        return outputs

    def outcome(self, outputs: Tensor) -> Tensor:
        """Probabilities ``[R, C]`` of classes or labels, or values ``[R]`` in the unit of the data, in float64."""
        outputs = outputs.double()
        if self.task.kind == "class":
            return outputs.softmax(-1)
        if self.task.kind == "labels":
            return outputs.sigmoid()
        return outputs[:, 0] * self.target[1] + self.target[0]

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss summed over labelled rows, and what to divide it by to have its mean.

        Cross-entropy of classes, weighted by ``weights`` ``[C]`` if given; squared error of values in units of
        ``target``; binary cross-entropy of every label that is not missing.

        Args:
            outputs: ``[R, C]``.
            targets: ``[R]`` int64 classes with ``MISSING``; ``[R]`` values or ``[R, C]`` labels with NaN.
            weights: of classes or labels.
        """
        count = self.rated(targets, weights)
        if self.task.kind == "class":
            total = functional.cross_entropy(outputs, targets, weights, ignore_index=MISSING, reduction="sum")
            return total, count
        known = ~targets.isnan()
        truth = torch.where(known, targets, 0).to(outputs.dtype)
        if self.task.kind == "labels":
            losses = functional.binary_cross_entropy_with_logits(outputs, truth, reduction="none", pos_weight=weights)
        else:
            losses = (outputs[:, 0] - (truth - self.target[0]) / self.target[1]) ** 2
        return (losses * known).sum(), count

    def rated(self, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """What to divide the summed loss of some targets by."""
        if self.task.kind != "class":
            return (~targets.isnan()).sum()
        known = targets != MISSING
        return known.sum() if weights is None else weights[targets[known]].sum()


def combined(x: Tensor) -> Tensor:
    """``[n, 3 D]`` from vectors ``[2 n, D]`` of pairs: product, distance and sum, so that the order does not matter."""
    a, b = x[0::2], x[1::2]
    return torch.cat((a * b, (a - b).abs(), a + b), -1)


class _Linear(nn.Linear):
    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__(width, config.outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class _MLP(nn.Module):
    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, config.outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.dropout(self.hidden(x).relu()))
        return outputs


class PackedConv(nn.Module):
    """A convolution of odd ``width`` along the residues of each sequence, with zeros beyond its ends.

    The weight is ``nn.Conv1d``'s, ``[out, in, width]``.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        like = nn.Conv1d(inputs, outputs, width)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``[X, in]`` to ``[X, out]``."""
        outputs, inputs, width = self.weight.shape
        # One product for all places of the window; then each place is moved to the residue that it serves.
        parts = (x @ self.weight.permute(2, 0, 1).reshape(width * outputs, inputs).T).view(len(x), width, outputs)
        index = torch.repeat_interleave(lengths, output_size=len(x))
        assert self.bias is not None
        y = self.bias + parts[:, width // 2]
        for place in range(width):
            shift = place - width // 2  # residue t reads residue t + shift
            if shift and abs(shift) < len(x):
                to, source = (
                    (slice(None, -shift), slice(shift, None))
                    if shift > 0
                    else (slice(-shift, None), slice(None, shift))
                )
                same = (index[to] == index[source])[:, None]
                moved = torch.where(same, parts[source, place], 0)
                y = y + functional.pad(moved, (0, 0, 0, shift) if shift > 0 else (0, 0, -shift, 0))
        return y


class _CNN(nn.Module):
    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.first = PackedConv(width, config.hidden, 7)
        self.dropout = nn.Dropout(config.dropout)
        self.second = PackedConv(config.hidden, config.outputs, 7)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.dropout(self.first(x, lengths).relu()), lengths)
        return outputs


class _LightAttention(nn.Module):
    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.values, self.attention = PackedConv(width, width, 9), PackedConv(width, width, 9)
        self.hidden = nn.Linear(2 * width, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, config.outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        values, scores = self.dropout(self.values(x, lengths)), self.attention(x, lengths)
        parts = zip(values.split(lengths.tolist()), scores.split(lengths.tolist()), strict=True)
        pooled = torch.stack([torch.cat(((v * s.softmax(0)).sum(0), v.amax(0))) for v, s in parts])
        outputs: Tensor = self.out(self.dropout(self.hidden(pooled).relu()))
        return outputs


class _HF(nn.Module):
    """With transformers' names, order of dropout, and initialisation."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width) if TASKS[config.task].unit == "sequence" else None
        self.dropout = nn.Dropout(config.dropout)
        self.out_proj = nn.Linear(width, config.outputs)
        for layer in (self.out_proj, *([] if self.dense is None else [self.dense])):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.dropout(x)
        x = x if self.dense is None else self.dropout(self.dense(x).tanh())
        outputs: Tensor = self.out_proj(x)
        return outputs


_BODIES: Final[dict[str, Callable[[int, HeadConfig], nn.Module]]] = {
    "linear": _Linear,
    "mlp": _MLP,
    "cnn": _CNN,
    "light-attention": _LightAttention,
    HF: _HF,
}
