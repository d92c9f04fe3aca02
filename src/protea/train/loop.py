"""Pre-training: one straight function from a recipe to a trained model, and the step that it repeats.

A step's loss is the summed loss of all its packs over the number of tokens predicted in them, which is known before the
first of them is computed; it is never a mean of means. Nothing is read back from an accelerator except where metrics
are logged, weights validated, or a checkpoint taken: losses are looked at when they have arrived.

Everything random is a function of the seed and the step, so that a run that goes on from a checkpoint repeats what an
undisturbed one does, bit for bit on the same CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from protea.allocator import return_freed_memory
from protea.data.draws import key
from protea.data.loader import Loader, Packing, TrainingBatch
from protea.data.sampler import Sampler
from protea.device import resolve_device
from protea.errors import DeviceError, OutputError, ResumeError, UsageError
from protea.train.estimate import Estimate, check_memory, estimate
from protea.train.metrics import Logbook
from protea.train.model import architecture, initialise
from protea.train.objective import MaskedTokens, Objective
from protea.train.recipe import Recipe
from protea.train.resume import TrainingState, resume, save
from protea.train.run_folder import RunFolder
from protea.train.schedule import learning_rate
from protea.train.sinks import check_log, open_sinks
from protea.train.sources import open_store
from protea.train.state import Checkpoints, checkpoint_folder
from protea.train.suspects import Suspects
from protea.train.trained import Trained, prepare
from protea.train.validate import Validation
from protea.train.watcher import Watcher

_DROPOUT: Final = 6
"""What a draw is for, beside those of ``protea.data.draws``."""

_REPACKING: Final = ("batch.pack:", "data.max_tokens:", "data.max_length:", "data.crop:", "run.seed:")
"""Changes of a recipe that change which sequences share a pack."""

_SAMPLE: Final = 4096
"""Places of an epoch that the mean length is taken from."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: updates done.
        finished: all of them, and the last one's validation.
    """

    step: int
    finished: bool


def pretrain(recipe: Recipe, output: Path, watcher: Watcher, *, accept_changes: bool = False) -> Outcome:
    """Train, from the beginning or from the newest intact checkpoint in the output folder.

    Args:
        recipe: what to do.
        output: the run's folder.
        watcher: told of progress, and asked whether to stop.
        accept_changes: go on although the recipe is not the one that the run began with.

    Raises:
        ProteaError: ``docs/pretraining.md`` lists what can be wrong.
    """
    device = resolve_device(recipe.run.device)
    if device.type == "cuda":
        # Events and synchronisation are those of the current device, not of the one whose tensors they wait for.
        torch.cuda.set_device(device)
    check_log(recipe.log)
    blank = architecture(recipe)
    if blank.max_tokens is not None and recipe.data.max_tokens > blank.max_tokens:
        raise UsageError(
            f"data.max_tokens {recipe.data.max_tokens:,} exceeds the {blank.max_tokens:,} positions of "
            f"{blank.config.family}; lower it"
        )
    with RunFolder(output, recipe, accept_changes=accept_changes) as folder:
        for change in folder.changes:
            watcher.note(f"the recipe changed: {change}")
        store = open_store(recipe, output, blank.alphabet, watcher)
        loader = Loader(
            Sampler(
                store.split("train"),
                seed=recipe.run.seed,
                max_tokens=recipe.data.max_tokens,
                crop=recipe.data.crop,
                max_length=recipe.data.max_length,
            ),
            masking=recipe.data.masking,
            packing=Packing(tokens=recipe.batch.pack),
            workers=recipe.run.workers,
            pin=device.type == "cuda",
        )
        validation = None if recipe.validation.every is None else Validation(store, recipe)
        needs = estimate(blank, recipe, mean_length(loader.sampler))
        check_memory(needs, device)
        del blank
        try:
            return _train(recipe, folder, store.fingerprint, device, loader, validation, needs, watcher)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _too_large(recipe, device) from error
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                why = " ".join(str(error).split("\n\n")[0].split())
                message = f"run.compile: PyTorch's compiler failed: {why}; run.compile=false does without"
                raise DeviceError(message) from error
            # PyTorch's allocator of main memory has no error of its own, nor has that of page-locked memory.
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            raise _too_large(recipe, device) from error
        except OSError as error:
            raise OutputError(f"{error.filename or output}: {error.strerror or error}") from error


def _train(
    recipe: Recipe,
    folder: RunFolder,
    data: str,
    device: torch.device,
    loader: Loader,
    validation: Validation | None,
    needs: Estimate,
    watcher: Watcher,
) -> Outcome:
    """Set up what a recipe asks for, take over what the run has done so far, and go on."""
    run = recipe.run
    trained = prepare(initialise(recipe, device), run, recipe.optimizer, recipe.batch, watcher)
    checkpoints = Checkpoints(checkpoint_folder(folder.path), recipe.save)
    write = partial(save, checkpoints, trained, recipe=recipe, data=data)
    progress = resume(checkpoints, trained, watcher, data=data)
    _check_change(recipe, folder, loader, progress, watcher)
    watcher.begin(needs, recipe, progress.step)
    sinks = open_sinks(folder.path, recipe.log, recipe.shown(), progress)
    logbook = Logbook(sinks, recipe.log, trained, steps=run.steps, pack=recipe.batch.pack, watcher=watcher)
    suspects = Suspects(run, folder.path, loader.sampler)
    if validation is not None and validation.due(progress):
        # The run was stopped in its midst; the checkpoint is written again with the result.
        checkpoints.last = None
    return _repeat(
        trained,
        MaskedTokens(),
        loader,
        progress,
        steps=run.steps,
        packs=recipe.batch.packs,
        rate=partial(learning_rate, recipe.schedule, highest=recipe.optimizer.lr, steps=run.steps),
        seed=run.seed,
        clip=recipe.optimizer.clip,
        validation=validation,
        checkpoints=checkpoints,
        write=write,
        suspects=suspects,
        logbook=logbook,
        watcher=watcher,
    )


def _repeat(
    trained: Trained,
    objective: Objective,
    loader: Loader,
    progress: TrainingState,
    *,
    steps: int,
    packs: int,
    rate: Callable[[int], float],
    seed: int,
    clip: float | None,
    validation: Validation | None,
    checkpoints: Checkpoints,
    write: Callable[[TrainingState], None],
    suspects: Suspects,
    logbook: Logbook,
    watcher: Watcher,
) -> Outcome:
    """The step, again and again, with what is due between two steps.

    Args:
        trained: the model, its optimizers, the precision.
        objective: what the model learns.
        loader: of the packs.
        progress: how far the run is.
        steps: after which the run is finished.
        packs: in a step.
        rate: learning rate of a step, by its number.
        seed: of the run.
        clip: gradients are scaled down to this norm, if given.
        validation: if the run has one.
        checkpoints: of the run.
        write: writes one.
        suspects: looks for losses that are no numbers.
        logbook: of the metrics.
        watcher: told of progress, and asked whether to stop.
    """
    batches = loader.batches(progress.position)
    try:
        while True:
            if validation is not None and validation.due(progress):
                suspects.settle(trained)
                _validate(validation, trained, objective, progress, logbook, watcher)
            if progress.step == steps or watcher.stop():
                break
            if (failure := checkpoints.failed()) is not None:
                again = checkpoints.try_again(progress.step)
                watcher.note(f"a checkpoint could not be written: {failure}; tried again after step {again:,}")
            if checkpoints.due(progress.step):
                suspects.settle(trained)
                write(progress)

            taken = [next(batches) for _ in range(packs)]
            step = progress.step + 1
            predicted = sum(map(objective.count, taken))
            now = rate(step)
            result = train_step(
                trained, objective, taken, predicted, step=step, rate=now, seed=seed, clip=clip, watcher=watcher
            )
            if result is None:
                break
            progress = progress.after(taken)
            suspects.add(step, taken, *result)
            logbook.count(taken, predicted)
            suspects.check(wait=logbook.due(step))
            if logbook.due(step):
                logbook.step(progress, *result, now)
                # Packs of ever other lengths leave holes in the heap, which would grow to several times what is used.
                return_freed_memory()
        suspects.settle(trained)
        _write_last(checkpoints, progress, write)
    finally:
        batches.close()
        if not isinstance(sys.exception(), KeyboardInterrupt):
            # After Ctrl-C nobody waits for a checkpoint; the next run removes one that is half written.
            checkpoints.wait()
        logbook.close()
    validated = validation is None or not validation.due(progress)
    return Outcome(progress.step, progress.step == steps and validated)


def _check_change(recipe: Recipe, folder: RunFolder, loader: Loader, progress: TrainingState, watcher: Watcher) -> None:
    """See that a run can go on from where it is by a recipe that may have changed, which is then its own.

    Raises:
        ResumeError: it cannot.
    """
    steps, blocks = recipe.run.steps, loader.blocks
    if progress.step > steps:
        raise ResumeError(
            f"{folder.path}: is after step {progress.step:,} already, past run.steps {steps:,}; raise that, or name a "
            "new folder"
        )
    if progress.position.block >= blocks:
        raise ResumeError(
            f"{folder.path}: is in block {progress.position.block + 1:,} of an epoch, which now has {blocks:,}; leave "
            "data.max_length as it was, or name a new folder"
        )
    if progress.position.pack and any(change.startswith(_REPACKING) for change in folder.changes):
        # Packs were numbered as they were then.
        progress.position = progress.position._replace(pack=0)
        watcher.note("packs are others now: the block of the epoch that the run is in begins again")
    if folder.changes:
        folder.accept()


def _validate(
    validation: Validation,
    trained: Trained,
    objective: Objective,
    progress: TrainingState,
    logbook: Logbook,
    watcher: Watcher,
) -> None:
    began = time.perf_counter()
    loss = validation.loss(trained.model, trained.precision, objective, watcher.stop)
    if loss is not None:
        progress.validation_loss = loss
        logbook.validated(progress.step, loss, time.perf_counter() - began)


def _write_last(checkpoints: Checkpoints, progress: TrainingState, write: Callable[[TrainingState], None]) -> None:
    checkpoints.wait()
    failure = checkpoints.failed()
    if progress.step and checkpoints.last != progress.step:
        write(progress)
        checkpoints.wait()
        failure = checkpoints.failed()
    if failure is not None:
        raise OutputError(
            f"{checkpoints.folder}: the checkpoint of step {progress.step:,} could not be written: {failure}; make "
            "room and give the same command again: it goes on from the one before"
        )


def train_step(
    trained: Trained,
    objective: Objective,
    packs: Sequence[TrainingBatch],
    predicted: int,
    *,
    step: int,
    rate: float,
    seed: int,
    clip: float | None,
    rank: int = 0,
    world: int = 1,
    watcher: Watcher | None = None,
) -> tuple[Tensor, Tensor] | None:
    """One update of the weights.

    Args:
        trained: the model, its optimizers, the precision.
        objective: what the model learns.
        packs: what this process learns from in the step.
        predicted: tokens that are predicted in the whole step, whose mean loss is the step's.
        step: its number, from 1.
        rate: its learning rate.
        seed: of the run; seeds dropout together with the step and a pack's number among all packs of the step.
        clip: gradients are scaled down to this norm, if given.
        rank: of this process.
        world: how many processes share the packs of the step, as ``Loader`` deals them.
        watcher: asked after every pack whether to stop.

    Returns:
        The loss and the norm of its gradient before clipping, on the device; nothing if it was stopped, which leaves
        weights and optimizers as they were.
    """
    model, optimizers, scaler = trained.model, trained.optimizers, trained.precision.scaler
    loss = torch.zeros((), device=model.device)
    optimizers.zero_grad()
    for number, pack in enumerate(packs):
        if watcher is not None and number and watcher.stop():
            optimizers.zero_grad()
            return None
        here = pack.to(model.device, non_blocking=True)
        torch.manual_seed(key(seed, step, _DROPOUT, rank + number * world) >> 1)
        with trained.precision.autocast():
            total = objective.loss(model, here)
        share = total / max(1, predicted)
        scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    norm = optimizers.clip(scaler, clip)
    optimizers.step(scaler, rate)
    return loss, norm


def mean_length(sampler: Sampler) -> float:
    """Mean over tokens of the length of the sequence that each is in, as the first epoch begins."""
    lengths = sampler.draw(0, np.arange(min(_SAMPLE, len(sampler)))).tokens.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def _too_large(recipe: Recipe, device: torch.device) -> DeviceError:
    where = "GPU memory" if device.type == "cuda" else "main memory"
    return DeviceError(
        f"out of {where} with packs of {recipe.batch.pack:,} tokens: lower batch.pack, or set run.recompute=true; "
        "checkpoints written so far stay, and the same command with that change and --accept-changes goes on"
    )
