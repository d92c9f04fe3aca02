"""What a training run is told: sections of settings, strict, and kept with every checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from protea.checkpoints.hub import published
from protea.data.masking import VARIANTS
from protea.data.sampler import Crop
from protea.errors import CheckpointError, UsageError
from protea.models.config import EncoderConfig

_ARCHITECTURE: Final = "architecture"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


def _listed(value: Any) -> Any:
    """A single file may be given as such."""
    return [value] if isinstance(value, str | Path) else value


class Section(BaseModel):
    """What all sections are: strict, and fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should be no truth value")
        return value


class Data(Section):
    """What is trained on.

    Attributes:
        store: a folder that ``protea data`` made.
        fasta: files to make one of, in the run's folder, with the defaults of ``protea data fasta``.
        masking: a variant's name; ``docs/data.md`` has them.
        crop: what becomes of a sequence that is too long.
        max_tokens: tokens of a sequence at most, BOS and EOS included.
        max_length: leave out sequences of more residues.
    """

    store: Path | None = None
    fasta: Annotated[tuple[Path, ...], Field(min_length=1), BeforeValidator(_listed)] | None = None
    masking: str = "standard"
    crop: Crop = "random"
    max_tokens: Annotated[int, Field(ge=3)] = 1024
    max_length: Count | None = None


class BatchSettings(Section):
    """How much is learned from at a time.

    Attributes:
        tokens: of one step, rounded to whole packs.
        pack: computed at a time; bounds memory.
    """

    tokens: Count = 2_097_152
    pack: Count = 16_384

    @property
    def packs(self) -> int:
        """Packs of one step."""
        return max(1, round(self.tokens / self.pack))


class Optimizer(Section):
    """How weights follow gradients.

    Attributes:
        name: ``adamw``; or ``muon`` for the matrices of the layers, beside AdamW for everything else.
        lr: the highest learning rate of the schedule. Muon's updates are scaled to the size of AdamW's.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
        weight_decay: decoupled; of matrices alone, not of norms and biases.
        clip: gradients are scaled down to this norm; ``null`` never.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 4e-4
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-8
    momentum: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive | None = 1.0


class Schedule(Section):
    """The learning rate of each step; ``protea.train.schedule`` has the formulas.

    Attributes:
        name: of the curve.
        warmup: steps until the highest rate.
        steps: the last step of the curve; by default that of the run.
        min_lr: where ``anneal-hold`` begins and ``cosine`` ends.
        floor: the share of the highest rate at which ``linear``, ``anneal-hold`` and ``trapezoid`` stop falling.
        decay: the share of the steps by which ``linear`` has reached it, or ``trapezoid`` begins to fall.
        constant: steps at the end that ``cosine`` stays at ``min_lr``.
    """

    name: Literal["linear", "anneal-hold", "cosine", "constant", "trapezoid"] = "linear"
    warmup: Annotated[int, Field(ge=0)] = 2000
    steps: Count | None = None
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    constant: Annotated[int, Field(ge=0)] = 0


class RunSettings(Section):
    """How it is computed.

    Attributes:
        steps: updates of the weights.
        seed: of weights, order, crops, masks and dropout.
        precision: ``bf16-mixed`` and ``fp16-mixed`` multiply in the narrow type and keep weights in float32.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        compile: have PyTorch's compiler fuse what lies between products.
        recompute: keep only the layers' inputs for the backward pass, and compute the rest again.
        max_loss: a step's loss above this, in nats, stops the run.
        workers: threads that prepare batches.
    """

    steps: Count = 500_000
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    precision: Literal["bf16-mixed", "fp16-mixed", "float32"] = "bf16-mixed"
    device: str = "auto"
    compile: bool = False
    recompute: bool = False
    max_loss: Positive = 20.0
    workers: Annotated[int, Field(ge=0)] = 1


class ValidationSettings(Section):
    """Perplexity of the validation split, on the same masks every time.

    Attributes:
        every: steps; ``null`` never.
        tokens: of the split, in its seeded order, at most; ``null`` all.
        seed: of order, crops and masks.
    """

    every: Count | None = 2000
    tokens: Count | None = 2_097_152
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42


class Save(Section):
    """Which checkpoints there are.

    Attributes:
        every: steps; the last step's is always written.
        newest: so many are kept.
        best: so many of the lowest validation loss are kept besides.
        keep_every: those of steps divisible by this stay for good.
    """

    every: Count = 1000
    newest: Count = 2
    best: Annotated[int, Field(ge=0)] = 1
    keep_every: Count | None = None


class Log(Section):
    """What is told.

    Attributes:
        every: steps.
        tensorboard: also write event files for TensorBoard.
        wandb: also log to this project of Weights & Biases.
        peak_tflops: of the device, for utilisation; by default known for common GPUs, and measured on a CPU.
    """

    every: Count = 10
    tensorboard: bool = True
    wandb: str | None = None
    peak_tflops: Positive | None = None


class Recipe(Section):
    """A whole recipe.

    Attributes:
        name: what it is.
        init: a checkpoint of any format, or a published name, to begin from; its architecture is taken, too.
        model: without ``init``: an ``architecture`` by published name, and any number of its configuration to change.
    """

    name: str = ""
    init: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    data: Data = Data()
    batch: BatchSettings = BatchSettings()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: RunSettings = RunSettings()
    validation: ValidationSettings = ValidationSettings()
    save: Save = Save()
    log: Log = Log()

    @property
    def config(self) -> EncoderConfig:
        """The architecture, where it does not come with ``init``.

        Raises:
            UsageError: a name or number is unknown or does not fit.
        """
        values = dict(self.model)
        base = published(str(values.pop(_ARCHITECTURE))).config
        known = {field.name for field in fields(base)}
        for name in values:
            if name not in known:
                raise UsageError(f"model: unknown key {name!r}{near(name, [_ARCHITECTURE, *known])}")
        for name, value in values.items():
            kind = type(getattr(base, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(f"model.{name}: should be of type {kind.__name__}, got {value!r}")
        try:
            config = replace(base, **values)
        except CheckpointError as error:
            raise UsageError(f"model: {error}") from error
        if config.vocab_size < len(config.alphabet):
            raise UsageError(
                f"model.vocab_size {config.vocab_size} is smaller than the {len(config.alphabet)} tokens of the "
                f"{config.alphabet.name} alphabet"
            )
        return config

    def check(self) -> None:
        """See what no section can see by itself.

        Raises:
            UsageError: settings contradict each other.
        """
        if self.init is None and _ARCHITECTURE not in self.model:
            raise UsageError(
                "names no model: give model.architecture (`protea info --list`), or init, a model to go on from"
            )
        if self.init is not None and self.model:
            raise UsageError(
                f"init brings its architecture; leave out model ({', '.join(self.model)}), or set model={{}}"
            )
        if self.init is None:
            _ = self.config
        if self.data.store is not None and self.data.fasta is not None:
            raise UsageError("data.store and data.fasta exclude each other")
        if self.data.masking not in VARIANTS:
            raise UsageError(f"data.masking {self.data.masking!r} should be one of {', '.join(VARIANTS)}")
        if self.batch.pack < self.data.max_tokens:
            raise UsageError(
                f"batch.pack {self.batch.pack:,} is smaller than a sequence, data.max_tokens {self.data.max_tokens:,}: "
                "raise the one or lower the other"
            )
        if self.batch.tokens < self.batch.pack:
            raise UsageError(
                f"batch.tokens {self.batch.tokens:,} is smaller than batch.pack {self.batch.pack:,}: a step is at "
                "least one pack"
            )
        schedule, steps = self.schedule, self.schedule.steps or self.run.steps
        if schedule.warmup + schedule.constant > steps:
            raise UsageError(
                f"schedule.warmup {schedule.warmup:,} and schedule.constant {schedule.constant:,} are together more "
                f"than its {steps:,} steps"
            )
        if schedule.min_lr > self.optimizer.lr:
            raise UsageError(f"schedule.min_lr {schedule.min_lr:g} is above optimizer.lr {self.optimizer.lr:g}")

    def shown(self) -> dict[str, Any]:
        """As plain values that YAML and JSON hold."""
        return self.model_dump(mode="json")


def near(name: str, known: Sequence[str]) -> str:
    """What an error says after an unknown name: the nearest known one, or all."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(known)}"
