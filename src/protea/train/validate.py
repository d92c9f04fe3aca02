"""Perplexity of the validation split: the same sequences, crops and masks every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Final

import torch

from protea.data.loader import Loader, Packing, TrainingBatch
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.errors import NonFiniteError, TrainingError, UsageError
from protea.infer.runner import Runner
from protea.models.encoder import Encoder
from protea.train.objective import Objective
from protea.train.recipe import Recipe
from protea.train.resume import TrainingState
from protea.train.trained import Precision

SPLIT: Final = "valid"


class Validation:
    """What validation looks at.

    Args:
        store: with a validation split.
        recipe: says how much of it.

    Raises:
        UsageError: the store has no such split.
    """

    def __init__(self, store: TrainingStore, recipe: Recipe) -> None:
        if SPLIT not in store.splits:
            raise UsageError(
                f"{store.folder}: has no {SPLIT} split; build it with --valid, or set validation.every=null"
            )
        data, self._tokens = recipe.data, recipe.validation.tokens
        self._every, self._last, self._pack = recipe.validation.every, recipe.run.steps, recipe.batch.pack
        sampler = Sampler(
            store.split(SPLIT),
            seed=recipe.validation.seed,
            max_tokens=data.max_tokens,
            crop=data.crop,
            max_length=data.max_length,
        )
        self._loader = Loader(
            sampler,
            masking=data.masking,
            packing=Packing(tokens=self._pack),
            workers=min(1, recipe.run.workers),
            pin=False,  # the runner makes its own packs
        )

    def due(self, progress: TrainingState) -> bool:
        """Whether a step is to be validated: after it, or first thing where a run was stopped before that."""
        due = self._every is not None and (progress.step % self._every == 0 or progress.step == self._last)
        return due and progress.step > 0 and progress.validation_loss is None

    def batches(self) -> Iterator[TrainingBatch]:
        """One epoch, up to the number of tokens asked for; at least one pack."""
        seen = 0
        batches = self._loader.batches(epochs=1)
        for batch in batches:
            seen += batch.inputs.input_ids.numel()
            yield batch
            if self._tokens is not None and seen >= self._tokens:
                batches.close()
                return

    def loss(
        self, model: Encoder, precision: Precision, objective: Objective, stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Mean loss of all tokens to be predicted, in nats; perplexity is its exponential.

        The model is left in training mode.

        Args:
            model: to be validated.
            precision: of products.
            objective: what the model learns.
            stop: asked after every pack; nothing is returned if it says so.

        Raises:
            UsageError: the split is so small that no token of it is masked.
            TrainingError: the loss is no number.
        """
        runner = Runner(model, self._pack, partial(_evaluating, precision))
        packs = ((pack, objective.jobs(pack)) for pack in self.batches())
        total = torch.zeros((), dtype=torch.float64)
        predicted = 0
        model.eval()
        try:
            with closing(runner.each(packs, apart=True)) as validated:
                for pack, results in validated:
                    if stop():
                        return None
                    predicted += objective.count(pack)
                    total += objective.loss_of(pack, results).double()
        except NonFiniteError:
            total.fill_(math.nan)
            predicted += 1
        finally:
            model.train()
        if not predicted:
            raise UsageError("validation masks no token, so few there are; add sequences, or set validation.every=null")
        mean = total.item() / predicted
        if not math.isfinite(mean):
            raise TrainingError(
                f"the validation loss is {mean:g}; go on from the newest checkpoint with a lower optimizer.lr"
            )
        return mean


@contextmanager
def _evaluating(precision: Precision) -> Iterator[None]:
    """Without gradients, in the products' type; not in inference mode, for which compiled layers would be made anew."""
    with torch.no_grad(), precision.autocast():
        yield
