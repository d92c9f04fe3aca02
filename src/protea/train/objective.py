"""Masked language modelling: the loss of a pack in training, and the loss of the validation split.

Shapes: T tokens, D model width, M masked tokens, V tokens of the alphabet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.errors import NonFiniteError, TrainingError, UsageError
from protea.infer.runner import Job, Result, Runner, Wanted
from protea.models.encoder import Encoder
from protea.train.model import Precision
from protea.train.recipe import Recipe
from protea.train.sources import make_loader

SPLIT: Final = "valid"


def count_masked(pack: TrainingBatch) -> int:
    """Number of masked tokens in a pack; needs no computation on a device."""
    return len(pack.rows)


def masked_loss(model: Encoder, pack: TrainingBatch) -> Tensor:
    """Summed cross-entropy of the masked tokens in nats, float32; the pack is on the model's device."""
    logits = masked_logits(model, model(pack.inputs), pack.rows)
    return F.cross_entropy(logits, pack.targets.index_select(0, pack.rows), reduction="sum")


def masked_logits(model: Encoder, hidden: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[M, V]`` of some rows of ``[T, D]``, float32, without the padding rows of the vocabulary."""
    logits = model.head(hidden.index_select(0, rows))
    return logits[:, : len(model.alphabet)].float()


class Validation:
    """The validation split of a store: the same sequences, crops and masks every time.

    Raises:
        UsageError: the store has no such split.
    """

    def __init__(self, store: TrainingStore, recipe: Recipe) -> None:
        if SPLIT not in store.splits:
            raise UsageError(
                f"{store.folder}: has no {SPLIT} split; build it with --valid, or set validation.every=null"
            )
        self._tokens, self._pack = recipe.validation.tokens, recipe.batch.pack
        # The runner makes its own packs, so page-locked memory would gain nothing.
        workers = min(1, recipe.run.workers)
        self._loader = make_loader(store, SPLIT, recipe, seed=recipe.validation.seed, workers=workers, pin=False)

    def batches(self) -> Iterator[TrainingBatch]:
        """The packs of one epoch, up to the number of tokens in the recipe; at least one pack."""
        seen = 0
        with closing(self._loader.batches(epochs=1)) as batches:
            for batch in batches:
                seen += batch.inputs.input_ids.numel()
                yield batch
                if self._tokens is not None and seen >= self._tokens:
                    return

    def loss(self, model: Encoder, precision: Precision, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss of all masked tokens in nats; ``None`` if ``stop``, asked after every pack, returns true.

        The model is left in training mode.

        Raises:
            UsageError: the split is so small that no token of it is masked.
            TrainingError: the loss is not finite.
        """
        runner = Runner(model, self._pack, partial(_evaluating, precision))
        packs = ((pack, _jobs(pack)) for pack in self.batches())
        total = torch.zeros((), dtype=torch.float64)
        predicted = 0
        model.eval()
        try:
            with closing(runner.each(packs, apart=True)) as validated:
                for pack, results in validated:
                    if stop():
                        return None
                    predicted += count_masked(pack)
                    total += _loss_of(pack, results).double()
        except NonFiniteError:
            total.fill_(math.nan)
            predicted += 1
        finally:
            model.train()
        if not predicted:
            raise UsageError(
                "the validation split is so small that none of its tokens is masked; add sequences, or set "
                "validation.every=null"
            )
        mean = total.item() / predicted
        if not math.isfinite(mean):
            raise TrainingError(
                f"the validation loss is {mean:g}; continue from the newest checkpoint with a lower optimizer.lr"
            )
        return mean


def _jobs(pack: TrainingBatch) -> Iterator[Job[None]]:
    """The masked sequences of a pack, as jobs that ask for logits of the masked tokens."""
    tokens, rows = pack.inputs.input_ids.numpy().astype(np.uint8), pack.rows.numpy()
    for start, end in pack.inputs.cu_seqlens.spans():
        first, last = np.searchsorted(rows, (start, end))
        yield Job(tokens[start:end], Wanted(places=rows[first:last] - start), None, "validation")


def _loss_of(pack: TrainingBatch, results: Sequence[Result[None]]) -> Tensor:
    logits = torch.cat([logits for result in results if (logits := result.checked().logits) is not None])
    return F.cross_entropy(logits, pack.targets.index_select(0, pack.rows), reduction="sum")


@contextmanager
def _evaluating(precision: Precision) -> Iterator[None]:
    """No gradients, products in the narrow type; not inference mode, which would compile layers a second time."""
    with torch.no_grad(), precision.autocast():
        yield
