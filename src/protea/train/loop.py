"""Pre-training: from a recipe to a trained model, and the step that it repeats.

A step's loss is the summed loss of all its packs divided by the number of tokens predicted in them, never a mean of
means; that number is known before the first pack is computed. Nothing is read back from a GPU except where metrics are
logged, weights are validated, or a checkpoint is taken.

All random numbers are functions of the seed and the step. A run that continues from a checkpoint therefore repeats what
an undisturbed run does, bit for bit on the same CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from protea.data.draws import key
from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.device import resolve_device, return_freed_memory
from protea.errors import DeviceError, FinishedError, MissingExtraError, OutputError, ResumeError, UsageError
from protea.journal import complete
from protea.limits import limit_threads
from protea.models.encoder import Encoder
from protea.optional import install
from protea.text import counted
from protea.train.estimate import check_memory, estimate, mean_length, told_lines
from protea.train.metrics import Logbook, TrainingProgress, open_sinks, peak_flops
from protea.train.model import (
    Trainable,
    architecture,
    explaining_memory,
    memory_of,
    prepare,
)
from protea.train.objective import DivergenceGuard, Validation, make_loader, masked_loss
from protea.train.optim import learning_rate
from protea.train.parallel import ALONE, Parallel, join_layout
from protea.train.recipe import Recipe, flatten
from protea.train.run_checkpoints import CHECKPOINTS, RunCheckpoints
from protea.train.run_folder import RunFolder, open_run_folder, write_recipe
from protea.train.run_state import TrainingState, resume, save, versions
from protea.train.run_store import open_store
from protea.train.world import World

_DROPOUT: Final = 6
"""Seeds of dropout, besides the purposes that ``protea.data.draws`` numbers."""

_REPACKING: Final = {"batch.pack", "data.max_tokens", "data.max_length", "data.crop", "run.seed"}
"""Keys of a recipe that decide which sequences share a pack."""


class Outcome(NamedTuple):
    """How a run ended: the number of updates, and whether all are done, the last validation included."""

    step: int
    finished: bool


def pretrain(
    recipe: Recipe,
    output: Path,
    progress: TrainingProgress,
    *,
    accept_changes: bool = False,
    world: World = ALONE.world,
) -> Outcome:
    """Train, from the beginning or from the newest intact checkpoint in the output folder.

    With ``accept_changes`` the run continues although its recipe changed. All processes of a ``world`` call this,
    inside ``world.together()``.
    """
    limit_threads()
    device = world.connect(resolve_device(recipe.run.device), recipe.parallel.timeout)
    if device.type == "cuda":
        # Events and synchronisation belong to the current device, not to that of the tensors.
        torch.cuda.set_device(device)
    world.check_same("a recipe", flatten(recipe.shown()))
    world.check_same("versions", versions())
    parallel = join_layout(world, recipe, device)
    if recipe.log.wandb is not None and find_spec("wandb") is None:
        raise MissingExtraError(f"log.wandb needs Weights & Biases: {install('wandb')}")
    model = architecture(recipe)
    if model.max_tokens is not None and recipe.data.max_tokens > model.max_tokens:
        raise UsageError(
            f"data.max_tokens {recipe.data.max_tokens:,} exceeds the {model.max_tokens:,} positions of "
            f"{model.config.family}; lower it"
        )
    parallel.check(model)
    opened = open_run_folder(output, recipe, device, accept_changes=accept_changes)
    with _explaining_failures(recipe, output, device), ExitStack() as stack:
        folder = world.first(lambda: stack.enter_context(opened))
        return _Trainer(folder, model, device, progress, parallel).run()


class _Trainer:
    """A run in progress: its step, and the work that is due between two steps."""

    def __init__(
        self,
        folder: RunFolder,
        model: Encoder,
        device: torch.device,
        progress: TrainingProgress,
        parallel: Parallel,
    ) -> None:
        self.recipe = recipe = folder.recipe
        self.folder, self.device, self.progress = folder, device, progress
        self.world = world = parallel.world
        for note in folder.notes:
            progress.note(note)
        made = world.first(lambda: open_store(recipe, folder.path, model.alphabet, progress).folder)
        store = TrainingStore(made, model.alphabet)
        run, self.data, pin = recipe.run, store.fingerprint, device.type == "cuda"
        world.check_same("training data", {"store": self.data})
        share, shares = parallel.share, parallel.layout.data
        self.loader = make_loader(
            *(store, "train", recipe),
            seed=run.seed,
            workers=run.workers,
            pin=pin,
            fill=parallel.fixed,
            rank=share,
            world=shares,
        )
        self.validation = None if recipe.validation.every is None else Validation(store, recipe, parallel)
        costs = estimate(model, recipe, mean_length(self.loader.sampler), parallel.layout)
        check_memory(costs, device, world.neighbours)
        self.guard = DivergenceGuard(run, folder.path, self.loader.sampler, world)
        self.trainable = prepare(model, recipe, device, progress, parallel)
        self.checkpoints = RunCheckpoints(folder.path / CHECKPOINTS, recipe.save, world)
        self.state = resume(self.checkpoints, self.trainable, progress, data=self.data)
        self._accept_changes()
        if self._validation_due():
            # The run was stopped during validation; write the checkpoint again, with the result.
            self.checkpoints.last = None
        elif self.state.step == run.steps and not folder.changed:
            raise FinishedError(complete(folder.path))
        peak = peak_flops(recipe.log, device, self.trainable.precision.dtype)
        peak = None if peak is None else peak * world.size
        progress.start(list(told_lines(model, recipe, costs, device, peak)), run.steps, self.state.step)
        sinks = open_sinks(folder.path, recipe, self.state) if world.is_first else []
        self.logbook = Logbook(sinks, recipe, self.trainable, progress, peak)

    def run(self) -> Outcome:
        """Train to the last step, or until asked to stop."""
        try:
            self._repeat()
        finally:
            if not isinstance(sys.exception(), KeyboardInterrupt):
                # After Ctrl-C nobody waits for a checkpoint; the next run removes a half-written one.
                self.checkpoints.close()
            self.logbook.close()
        step = self.state.step
        return Outcome(step, step == self.recipe.run.steps and not self._validation_due())

    def _accept_changes(self) -> None:
        """Write the changed recipe to the folder, if the run can continue with it."""
        folder, state, steps, blocks = self.folder, self.state, self.recipe.run.steps, self.loader.blocks
        if state.step > steps:
            raise ResumeError(
                f"{folder.path}: has {counted(state.step, 'step')} already, more than run.steps {steps:,}; raise "
                "run.steps, or name a new folder"
            )
        if state.position.block >= blocks:
            raise ResumeError(
                f"{folder.path}: is in block {state.position.block + 1:,} of an epoch, which now has "
                f"{counted(blocks, 'block')}; use the earlier data.max_length, or name a new folder"
            )
        if state.position.pack and folder.changed & _REPACKING:
            state.position = state.position._replace(pack=0)  # the old number counts packs of the earlier recipe
            self.progress.note("the changes affect packing: the current block of the epoch begins again")
        if folder.changed and self.world.is_first:
            write_recipe(folder.path, self.recipe)

    def _repeat(self) -> None:
        parallel = self.trainable.parallel
        with closing(self.loader.batches(self.state.position)) as batches:
            while True:
                if self._validation_due():
                    self._validate()
                if self.state.step == self.recipe.run.steps or self._stop():
                    break
                self._save_if_due()
                packs = [next(batches) for _ in range(self.recipe.batch.packs // parallel.layout.data)]
                if not self._step(packs):
                    break
            self._save_last()

    def _stop(self) -> bool:
        """Whether any process was asked to stop; all of them ask at the same places of a run."""
        return self.world.any(self.progress.stop())

    def _step(self, packs: Sequence[TrainingBatch]) -> bool:
        """Train for one step and log it; false if the run was asked to stop during the step."""
        step, run, optimizer = self.state.step + 1, self.recipe.run, self.recipe.optimizer
        rate = learning_rate(self.recipe.schedule, step, highest=optimizer.lr, steps=run.steps)
        self.world.at(f"step {step:,}")
        stop = self._stop
        result = train_step(self.trainable, packs, step=step, rate=rate, seed=run.seed, clip=optimizer.clip, stop=stop)
        if result is None:
            return False
        (tokens,) = self.trainable.parallel.total(sum(pack.tokens for pack in packs))
        self.state = TrainingState(step, packs[-1].position, self.state.tokens + tokens)
        self.guard.add(step, packs, *result)
        self.logbook.count(packs)
        if self.device.type == "cpu" or self.logbook.due(step):
            self.guard.check()
        if self.logbook.due(step):
            self.logbook.step(self.state, *result, rate)
            # Packs vary in length and fragment the heap; return freed memory.
            return_freed_memory()
        return True

    def _validation_due(self) -> bool:
        every, step = self.recipe.validation.every, self.state.step
        if every is None or step == 0 or self.state.validation_loss is not None:
            return False
        return step % every == 0 or step == self.recipe.run.steps

    def _validate(self) -> None:
        assert self.validation is not None
        self.guard.settle(self.trainable)
        began = time.perf_counter()
        loss = self.validation.loss(self.trainable.model, self.trainable.precision, self._stop)
        if loss is not None:
            self.state.validation_loss = loss
            self.logbook.validated(self.state.step, loss, time.perf_counter() - began)

    def _save(self) -> None:
        self.guard.settle(self.trainable)
        save(self.checkpoints, self.trainable, self.state, recipe=self.recipe, data=self.data)

    def _save_if_due(self) -> None:
        step = self.state.step
        if self.checkpoints.due(step):
            self.checkpoints.wait()
        if reason := self.checkpoints.failure(step):
            self.progress.note(f"a checkpoint could not be written: {reason}; training continues and tries again later")
        if self.checkpoints.due(step):
            self._save()

    def _save_last(self) -> None:
        checkpoints, step = self.checkpoints, self.state.step
        checkpoints.wait()
        checkpoints.failure(step)  # if writing the checkpoint failed, this resets ``last``, so that it is written again
        if step and checkpoints.last != step:
            self._save()
            checkpoints.wait()
        if reason := checkpoints.failure(step):
            raise OutputError(
                f"{checkpoints.folder}: the checkpoint of step {step:,} could not be written: {reason}; free some "
                "space and give the same command again: it continues from the checkpoint before"
            )


def train_step(
    trainable: Trainable,
    packs: Sequence[TrainingBatch],
    *,
    step: int,
    rate: float,
    seed: int,
    clip: float | None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor] | None:
    """One update of the weights, from a loss that is the mean of all masked tokens.

    The run's ``seed``, the ``step`` (from 1) and the pack's number in the step seed dropout. Gradients are scaled down
    to the norm ``clip``. ``stop`` is asked between packs. If it returns true, weights and optimizers stay as they were,
    and the result is ``None``; else the loss and the norm of its gradient before clipping, on the device.

    Of many processes, each has ``packs`` of its own; the loss and the norm are those of all.
    """
    model, optimizers, parallel = trainable.model, trainable.optimizers, trainable.parallel
    scaler, autocast = trainable.precision.scaler, trainable.precision.autocast
    seeds = [key(seed, step, _DROPOUT, parallel.number(place)) >> 1 for place in range(len(packs))]
    (masked,) = parallel.total(sum(len(pack.rows) for pack in packs))
    optimizers.zero_grad()

    def share(hidden: Tensor, pack: TrainingBatch) -> Tensor:
        return masked_loss(model, hidden, pack) / max(1, masked)

    loss = parallel.compute(model, packs, share, seeds=seeds, autocast=autocast, scale=scaler.scale, stop=stop)
    if loss is None:
        optimizers.zero_grad()
        return None
    loss = parallel.reduce(model, loss)
    norm = optimizers.clip(scaler, clip)
    optimizers.step(scaler, rate)
    return loss, norm


@contextmanager
def _explaining_failures(recipe: Recipe, output: Path, device: torch.device) -> Iterator[None]:
    """Turn what PyTorch and the operating system raise during training into errors with advice."""
    too_large = DeviceError(
        f"out of {memory_of(device)} with packs of {recipe.batch.pack:,} tokens: lower batch.pack, or set "
        "run.recompute=true; the checkpoints stay, and the same command with that change and --accept-changes continues"
    )
    try:
        with explaining_memory(too_large):
            yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise DeviceError(f"run.compile: PyTorch's compiler failed: {reason}; set run.compile=false") from error
        raise
    except OSError as error:
        raise OutputError(f"{error.filename or output}: {error.strerror or error}") from error
