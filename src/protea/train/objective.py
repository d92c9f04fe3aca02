"""What a model learns: how many predictions a pack asks for, and the loss over them.

Training asks for the loss with its gradient, validation for jobs that the runner computes like any others.

Shapes: T tokens, D model width, M tokens to be predicted, V tokens of the alphabet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from protea.data.loader import TrainingBatch
from protea.infer.runner import Job, Result, Wanted
from protea.models.encoder import Encoder


class Objective(Protocol):
    """What the training step and validation ask for."""

    def count(self, pack: TrainingBatch) -> int:
        """Tokens that the model is to predict in a pack; known without computing anything on a device."""

    def loss(self, model: Encoder, batch: TrainingBatch) -> Tensor:
        """The summed loss over these tokens in nats, float32; computed under the caller's autocast.

        Args:
            model: on the batch's device.
            batch: a pack.
        """

    def jobs(self, pack: TrainingBatch) -> Iterator[Job[None]]:
        """The sequences of a pack, each with what its share of the loss is made of."""

    def loss_of(self, pack: TrainingBatch, results: Sequence[Result[None]]) -> Tensor:
        """The same sum from the results of these jobs, in main memory.

        Raises:
            NonFiniteError: the model gave infinities or NaN.
        """


class MaskedTokens:
    """Masked language modelling: cross-entropy of the tokens that masking selected."""

    def count(self, pack: TrainingBatch) -> int:
        """Tokens that were selected."""
        return len(pack.rows)

    def loss(self, model: Encoder, batch: TrainingBatch) -> Tensor:
        """Summed cross-entropy of the selected tokens as they were before masking."""
        logits = masked_logits(model, model(batch.inputs), batch.rows)
        return F.cross_entropy(logits, batch.targets.index_select(0, batch.rows), reduction="sum")

    def jobs(self, pack: TrainingBatch) -> Iterator[Job[None]]:
        """Masked sequences, asked for logits where tokens were selected."""
        tokens, rows = pack.inputs.input_ids.numpy().astype(np.uint8), pack.rows.numpy()
        for start, end in pack.inputs.cu_seqlens.spans():
            first, last = np.searchsorted(rows, (start, end))
            yield Job(tokens[start:end], Wanted(places=rows[first:last] - start), None, "validation")

    def loss_of(self, pack: TrainingBatch, results: Sequence[Result[None]]) -> Tensor:
        """Summed cross-entropy of the selected tokens as they were before masking."""
        logits = torch.cat([logits for result in results if (logits := result.checked().logits) is not None])
        return F.cross_entropy(logits, pack.targets.index_select(0, pack.rows), reduction="sum")


def masked_logits(model: Encoder, hidden: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[M, V]`` of some rows of ``[T, D]``, float32, without the rows of padding that a vocabulary may have."""
    logits = model.head(hidden.index_select(0, rows))
    return logits[:, : len(model.alphabet)].float()
