"""Encoders that are trained together with a head: LoRA, or all weights; with early stopping and exact continuation.

The loss of an update is the summed loss of all its packs, divided by the number of labels in them, never a mean of
means. Gradients pass through the hidden states after the last layer. All random numbers are functions of the seed and
the step: a run that is killed and given again ends with the same bits, on the same CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.data.draws import key
from protea.errors import DeviceError, TrainingError, UsageError
from protea.finetune import tunable as parts
from protea.finetune.adapters import Adapter
from protea.finetune.examples import EncodedExamples
from protea.finetune.heads import Head, HeadConfig
from protea.finetune.probe import rank, score_batches
from protea.finetune.tunable import ENCODER, HEAD
from protea.finetune.tune_settings import TuneSettings
from protea.finetune.tuning_state import TuningCheckpoints, TuningState, settle_plan
from protea.finetune.updates import Packer, Updates
from protea.models.encoder import Encoder
from protea.progress import SILENT, Progress
from protea.text import counted
from protea.train.model import automatic_precision, explaining_memory, memory_of
from protea.train.optim import learning_rate
from protea.train.recipe import ScheduleSettings

__all__ = ["TuneSettings", "Tuned", "tune"]

_PURPOSE: Final = 7  # seeds dropout, besides the purposes that ``protea.data.draws`` numbers
_OVERFLOWS: Final = 50  # updates in a row that may be skipped because float16 gradients overflow
_SHOWN: Final = 8  # ids in a message


@dataclass
class Tuned:
    """A trained encoder and its head, as they were at the best validation.

    Attributes:
        head: on the model's device, in evaluation mode.
        model: plain and in float32, in evaluation mode; adapters are merged into its weights.
        adapter: LoRA's.
        selected: the number on the validation part (``SELECTED``).
        loss: the mean validation loss.
        curve: a row for each validation: step, mean training loss since the last, validation loss, and the number.
        notes: sentences that a user must see.
    """

    head: Head
    model: Encoder
    adapter: Adapter | None
    selected: float
    loss: float
    curve: list[tuple[int, float, float, float]]
    notes: list[str] = field(default_factory=list)


def tune(
    load: Callable[[], Encoder],
    prepared: EncodedExamples,
    config: HeadConfig,
    settings: TuneSettings,
    work: Path,
    *,
    identity: dict[str, Any],
    seed: int,
    progress: Progress = SILENT,
) -> Tuned:
    """Train an encoder and a head on the training part; the validation part chooses the weights.

    Args:
        load: gives the plain encoder with gradients, in float32; called twice.
        prepared: the examples, each sequence in one window.
        config: the head's.
        settings: the method and its numbers.
        work: a folder for checkpoints; it may hold an earlier part of the same run, or its end. It stays.
        identity: what the numbers depend on besides; a folder of another identity is an error.
        seed: of the head, the adapters, the order of examples, and dropout.
        progress: counts updates.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("fine-tuning runs in one process, and WORLD_SIZE asks for more; start it without torchrun")
    model = load()
    devices = [model.device] if model.device.type == "cuda" else []
    with _explaining_memory(model.device, settings), torch.random.fork_rng(devices):
        tuning = _Tuning(model, prepared, config, settings, work, identity, seed, progress)
        del model
        return tuning.run(load)


@contextmanager
def _explaining_memory(device: torch.device, settings: TuneSettings) -> Iterator[None]:
    recompute = "" if settings.recompute else ", or pass --recompute"
    too_large = DeviceError(
        f"out of {memory_of(device)}: pass a lower --token-budget{recompute}; the same command with that change "
        "continues"
    )
    with explaining_memory(too_large):
        yield


class _Tuning:
    """A run in progress."""

    def __init__(
        self,
        model: Encoder,
        prepared: EncodedExamples,
        config: HeadConfig,
        settings: TuneSettings,
        work: Path,
        identity: dict[str, Any],
        seed: int,
        progress: Progress,
    ) -> None:
        self.settings, self.prepared, self.work, self.seed, self.progress = settings, prepared, work, seed, progress
        self.train, self.validation = (parts.labelled(prepared, part) for part in ("train", "validation"))
        adapted = parts.choose_parameters(model, settings, seed)
        frame = model.alphabet.frame
        precision = automatic_precision(model.device) if settings.precision == "auto" else settings.precision
        budget = settings.token_budget or parts.default_token_budget(
            model, Packer(prepared, frame, 1), self.train, settings, precision
        )
        plan = {"identity": identity, "settings": asdict(settings), "head": config.numbers(), "seed": seed}
        plan["data"] = parts.digest(prepared)
        precision, budget = settle_plan(work, plan, precision, budget, progress)
        self.packer = Packer(prepared, frame, budget)
        self.notes = parts.prepare_device(model, settings, precision)
        self.tunable = parts.make_tunable(model, config, settings, seed=seed, precision=precision, adapted=adapted)
        per_epoch = -(-len(self.train) // settings.batch)
        steps, self.waits = settings.updates(per_epoch), settings.waits(per_epoch)
        self.updates = Updates(len(self.train), settings.batch, steps, settings.validations, settings.apart, seed)
        self.checkpoints = TuningCheckpoints(work, self.tunable.trainable, self.tunable.tensors, progress)
        self.state, self.best = self.checkpoints.restore() or (TuningState(), {})
        if not self.state.step:
            parts.scale_head(self.tunable, self.packer, self.train, self.updates)
        weighted = settings.class_weights
        self.weights = parts.weights_of_classes(self.tunable.head, prepared, self.train) if weighted else None

    def run(self, load: Callable[[], Encoder]) -> Tuned:
        """Train to the end, or until validation stops getting better."""
        state, steps = self.state, self.updates.steps
        self.progress.begin("training", steps, done=state.step)
        try:
            while not state.ended:
                self._step(state.step + 1)
                state.step += 1
                if self.updates.validates(state.step):
                    self._validate()
                    state.ended = state.step == steps or state.step - state.better >= self.waits
                self.checkpoints.save(state, self.best, now=state.ended)
                self.progress.advance()
        except KeyboardInterrupt:
            where = f"after step {saved:,}" if (saved := self.checkpoints.newest()) else "from the beginning"
            self.progress.note(f"{self.work}: stopped in step {state.step + 1:,}; the same command continues {where}")
            raise
        finally:
            self.checkpoints.close()  # the same call may follow in this process
        return self._result(load)

    def _step(self, step: int) -> None:
        """One update of the weights."""
        tunable, state = self.tunable, self.state
        examples = self.train[self.updates[step]]
        head, optimizers, scaler = tunable.head, tunable.trainable.optimizers, tunable.trainable.precision.scaler
        weights = None if self.weights is None else self.weights.cpu()
        count = float(head.rated(parts.all_targets(self.prepared, examples), weights))
        if not count:
            return
        tunable.mode(training=True)
        optimizers.zero_grad()
        loss = torch.zeros((), device=tunable.model.device)
        torch.manual_seed(key(self.seed, step, _PURPOSE) >> 1)
        for batch in tunable.batches(self.packer, examples):
            total, _ = head.loss(head(batch.x, batch.lengths), batch.targets, self.weights)
            scaler.scale(total / count).backward()  # type: ignore[no-untyped-call]
            loss += total.detach()
        norm = optimizers.clip(scaler, self.settings.clip)
        optimizers.step(scaler, self._rate(step))
        self._check(step, examples.tolist(), float(loss) / count, float(norm))
        state.total, state.count = state.total + float(loss), state.count + count

    def _rate(self, step: int) -> float:
        steps = self.updates.steps
        schedule = ScheduleSettings(name="linear", warmup=round(self.settings.warmup * steps), floor=0.0, decay=1.0)
        # The rate would be 0 one step after the last.
        return learning_rate(schedule, step, highest=self.settings.rate, steps=steps + 1)

    def _check(self, step: int, examples: list[int], loss: float, norm: float) -> None:
        """Stop at a loss or gradient that is not finite."""
        may_overflow = self.tunable.trainable.precision.scaler.is_enabled()
        self.state.overflows = 0 if isfinite(norm) else self.state.overflows + 1
        problem = ""
        if not isfinite(loss):
            problem = f"the loss is {loss:g}"
        elif self.state.overflows > (_OVERFLOWS if may_overflow else 0):
            problem = f"the norm of the gradient is {norm:g}"
        if problem:
            ids = [self.prepared.labelled.examples[example].id for example in examples]
            more = ", ..." if len(ids) > _SHOWN else ""
            raise TrainingError(
                f"step {step:,}: {problem}; its {counted(len(ids), 'record')}: {', '.join(ids[:_SHOWN])}{more}. "
                "Lower --lr, or correct these records, and start again with --overwrite"
            )

    def _validate(self) -> None:
        state, tunable = self.state, self.tunable
        tunable.mode(training=False)
        with torch.no_grad():
            selected, loss = score_batches(tunable.head, tunable.batches(self.packer, self.validation))
        if isnan(loss):
            raise TrainingError(
                f"step {state.step:,}: the validation loss is {loss:g}; start again with --overwrite and a lower --lr"
            )
        state.curve.append((state.step, state.total / max(state.count, 1e-12), loss, selected))
        state.total = state.count = 0.0
        if loss < state.least:
            state.least, state.better = loss, state.step
        if not self.best or rank(selected, loss) > rank(state.selected, state.loss):
            state.selected, state.loss = selected, loss
            state.best = state.better = state.step
            self.best = {name: value.detach().cpu().clone() for name, value in tunable.tensors.items()}

    def _result(self, load: Callable[[], Encoder]) -> Tuned:
        head, state, adapted, old = self.tunable.head, self.state, self.tunable.adapted, self.tunable.model
        head.load_state_dict(_part(self.best, HEAD))
        weights = _part(self.best, ENCODER)
        adapter = None if adapted is None else Adapter.of(old, weights, adapted)
        del old, self.tunable, self.checkpoints  # their memory, before another model is loaded
        model = load()
        if adapter is not None:
            adapter.merge_into(model)
        for name, value in weights.items() if adapter is None else ():
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter.device)
        if state.step < self.updates.steps:
            self.notes.append(
                f"training stopped after step {state.step:,} of {self.updates.steps:,}: the weights of step "
                f"{state.best:,} were the best on the validation part"
            )
        model.eval().requires_grad_(False)
        return Tuned(head.eval(), model, adapter, state.selected, state.loss, state.curve, self.notes)


def _part(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
