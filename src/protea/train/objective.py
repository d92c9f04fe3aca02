"""Masked language modelling: the packs of a split, the losses, and the check that losses and weights are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from protea.data.loader import Loader, Packing, TrainingBatch
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.errors import NonFiniteError, TrainingError, UsageError
from protea.infer.runner import Job, Result, Runner, Wanted
from protea.models.encoder import Encoder
from protea.text import counted
from protea.train.model import Precision, Trainable
from protea.train.parallel import ALONE, Parallel
from protea.train.pipeline import Pipeline
from protea.train.recipe import Recipe, RunSettings
from protea.train.world import World

SPLIT: Final = "valid"
_IDS_SHOWN: Final = 3
_MAX_OVERFLOWS: Final = 50
"""Steps in a row whose float16 gradients may overflow; lowering the loss scale further would not help."""


def make_loader(
    store: TrainingStore, split: str, recipe: Recipe, *, seed: int, workers: int, pin: bool, **options: Any
) -> Loader:
    """Masked packs of a split, as the recipe crops, masks and packs sequences; ``pin`` uses page-locked memory.

    Further options are those of ``Loader``.
    """
    data = recipe.data
    sampler = Sampler(
        store.split(split), seed=seed, max_tokens=data.max_tokens, crop=data.crop, max_length=data.max_length
    )
    packing = Packing(tokens=recipe.batch.pack)
    return Loader(sampler, masking=data.masking, packing=packing, workers=workers, pin=pin, **options)


def masked_loss(model: Encoder, hidden: Tensor, pack: TrainingBatch) -> Tensor:
    """Summed cross-entropy of the masked tokens in nats, float32, from their last hidden states, ``[M, D]``.

    The pack is on the model's device.
    """
    # The vocabulary may have padding rows at its end.
    logits = model.head(hidden)[:, : len(model.alphabet)].float()
    return F.cross_entropy(logits, pack.targets.index_select(0, pack.rows), reduction="sum")


class Validation:
    """The validation split of a store: the same sequences, crops and masks every time, shared by all processes."""

    def __init__(self, store: TrainingStore, recipe: Recipe, parallel: Parallel = ALONE) -> None:
        if SPLIT not in store.splits:
            raise UsageError(
                f"{store.folder}: has no {SPLIT} split: build a store with one (`protea data fasta --valid 10`) for "
                "data.store, or set validation.every=null"
            )
        self._tokens, self._pack, self._parallel = recipe.validation.tokens, recipe.batch.pack, parallel
        # The runner makes its own packs, so page-locked memory would gain nothing.
        workers = min(1, recipe.run.workers)
        self._loader = make_loader(
            store, SPLIT, recipe, seed=recipe.validation.seed, workers=workers, pin=False, fill=parallel.fixed
        )

    def batches(self) -> Generator[TrainingBatch]:
        """The packs of one epoch, up to the number of tokens in the recipe; at least one pack."""
        seen = 0
        with closing(self._loader.batches(epochs=1)) as batches:
            for batch in batches:
                seen += batch.tokens
                yield batch
                if self._tokens is not None and seen >= self._tokens:
                    return

    def _own(self) -> Iterator[tuple[TrainingBatch, bool]]:
        """The packs that this process computes, and whether each counts.

        Every process computes equally many, since they gather weights together: some repeat the last one.
        """
        own, ranks = self._parallel.share, self._parallel.layout.data
        with closing(self.batches()) as batches:
            while group := list(islice(batches, ranks)):
                yield group[min(own, len(group) - 1)], own < len(group)

    def loss(self, model: Encoder, precision: Precision, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss of all masked tokens in nats; ``None`` if ``stop``, asked after every pack, returns true.

        The model is left in training mode. All processes call this together, and ``stop`` says the same to all.

        Raises:
            UsageError: the split is so small that no token of it is masked.
            TrainingError: the loss is not finite.
        """
        if self._parallel.pipeline is not None:
            return self._staged(self._parallel.pipeline, model, precision, stop)
        runner = Runner(model, self._pack, partial(_evaluating, precision, self._parallel.layout.processes))
        packs = ((own, _jobs(own[0])) for own in self._own())
        total = torch.zeros((), dtype=torch.float64)
        masked = 0
        model.eval()
        try:
            with closing(runner.each(packs, apart=True)) as validated:
                for (pack, counts), results in validated:
                    if stop():
                        return None
                    if counts:
                        masked += len(pack.rows)
                        total += _loss_of(pack, results).double()
        finally:
            model.train()
            self._parallel.rest(model)
        return self._mean(total, masked)

    def _staged(
        self, pipeline: Pipeline, model: Encoder, precision: Precision, stop: Callable[[], bool]
    ) -> float | None:
        """The same of a pipeline, pack by pack."""
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        masked = 0
        model.eval()
        try:
            for pack, counts in self._own():
                with torch.no_grad():
                    loss = pipeline.run([pack], partial(masked_loss, model), autocast=precision.autocast)
                if stop():
                    return None
                if counts:
                    masked += len(pack.rows)
                    total += loss
        finally:
            model.train()
            self._parallel.rest(model)
        return self._mean(total, masked)

    def _mean(self, total: Tensor, masked: int) -> float:
        total, masked = self._parallel.sum(total), self._parallel.total(masked)[0]
        if not total.isfinite():
            raise TrainingError(
                f"the validation loss is {total:g}; continue from the newest checkpoint with a lower optimizer.lr"
            )
        if not masked:
            raise UsageError(
                "the validation split is so small that none of its tokens is masked; add sequences, or set "
                "validation.every=null"
            )
        return total.item() / masked


def _jobs(pack: TrainingBatch) -> Iterator[Job[None]]:
    """The masked sequences of a pack, as jobs that ask for logits of the masked tokens."""
    tokens, rows = pack.inputs.input_ids.numpy().astype(np.uint8), pack.rows.numpy()
    for start, end in pack.inputs.cu_seqlens.spans():
        first, last = np.searchsorted(rows, (start, end))
        yield Job(tokens[start:end], Wanted(places=rows[first:last] - start), None, "validation")


def _loss_of(pack: TrainingBatch, results: Sequence[Result[None]]) -> Tensor:
    if any(isinstance(result.error, NonFiniteError) for result in results):
        return torch.tensor(math.nan)
    logits = torch.cat([logits for result in results if (logits := result.checked().logits) is not None])
    return F.cross_entropy(logits, pack.targets.index_select(0, pack.rows), reduction="sum")


@contextmanager
def _evaluating(precision: Precision, processes: int) -> Iterator[None]:
    """No gradients, products in the narrow type; not inference mode, which would compile layers a second time.

    The runner halves packs that exceed the memory. Of many processes none may, since they gather weights together.
    """
    try:
        with torch.no_grad(), precision.autocast():
            yield
    except torch.OutOfMemoryError as error:
        if processes == 1:
            raise
        raise MemoryError(str(error)) from error


class _Step(NamedTuple):
    step: int
    packs: list[tuple[int, NDArray[np.int64]]]  # epoch, and places in it
    loss_and_norm: Tensor


class DivergenceGuard:
    """Stops a run at the first loss, gradient or weight that is not finite, and lists the records of that step.

    Nothing is saved before it is checked. ``folder`` is the run's folder; ``sampler`` gives the records of a pack. All
    processes check the same steps at the same time, and list their records together.
    """

    def __init__(self, run: RunSettings, folder: Path, sampler: Sampler, world: World) -> None:
        self._run, self._folder, self._sampler, self._world = run, folder, sampler, world
        self._waiting: list[_Step] = []
        self._last: _Step | None = None  # the last step with a checked loss; the weights after it are not checked yet
        self._overflows = 0

    def add(self, step: int, packs: Sequence[TrainingBatch], loss: Tensor, norm: Tensor) -> None:
        """Add a step to be checked; on a GPU its results may not be computed yet."""
        self._waiting.append(_Step(step, [(pack.epoch, pack.index) for pack in packs], torch.stack((loss, norm))))

    def check(self) -> None:
        """Check the steps added since the last call; waits for their results. The error names step and records."""
        for step in self._waiting:
            loss, norm = step.loss_and_norm.tolist()
            if not math.isfinite(loss) or loss > self._run.max_loss:
                raise self._error(step, f"the loss is {loss:g}")
            # Scaled float16 gradients overflow from time to time; the scaler then skips the step.
            self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
            if self._overflows > (_MAX_OVERFLOWS if self._run.precision == "fp16-mixed" else 0):
                raise self._error(step, f"the norm of the gradient is {norm:g}")
            self._last = step
        self._waiting.clear()

    def settle(self, trainable: Trainable) -> None:
        """Check all steps, and the weights and moments, before they are validated or saved."""
        self.check()
        if self._last is None:
            return
        tensors = [parameter.detach() for parameter in trainable.model.parameters()]
        tensors += [tensor for _, tensor in trainable.optimizers.state()]
        if not trainable.parallel.norm(tensors).isfinite():
            raise self._error(self._last, "weights or moments are not finite after it")
        self._last = None

    def _error(self, step: _Step, problem: str) -> TrainingError:
        path = self._folder / f"step-{step.step:09d}-records.tsv"
        records: list[tuple[str, int, int]] = []
        for epoch, index in step.packs:
            draws = self._sampler.draw(epoch, index)
            names = self._sampler.split.ids(draws.sequence)
            records += zip(names, (draws.offset + 1).tolist(), draws.residues.tolist(), strict=True)
        # Processes that compute the same pack list it once.
        records = list(dict.fromkeys(chain.from_iterable(self._world.gather(records))))
        ids = [name for name, _, _ in records]
        rows = ["id\tfirst\tresidues", *("\t".join(map(str, record)) for record in records), ""]
        try:
            if self._world.is_first:
                path.write_text("\n".join(rows), encoding="utf-8")
            listed = f"are listed in {path}"
        except OSError as error:
            listed = f"could not be listed in {path}: {error.strerror or error}"
        return TrainingError(
            f"step {step.step:,}: {problem}; its {counted(len(ids), 'record')} ({', '.join(ids[:_IDS_SHOWN])}, ...) "
            f"{listed}. Checkpoints of earlier steps are kept: continue from the newest with --accept-changes and a "
            f"lower optimizer.lr or optimizer.clip; run.max_loss is {self._run.max_loss:g}"
        )
