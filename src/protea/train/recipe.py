"""What a training run is told: sections of settings, strict, and stored with every checkpoint.

``docs/pretraining.md`` explains every key.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from protea.checkpoints.hub import published
from protea.data.masking import VARIANTS
from protea.data.sampler import Crop
from protea.errors import CheckpointError, UsageError
from protea.models.config import EncoderConfig
from protea.settings_errors import suggestion

_ARCHITECTURE: Final = "architecture"

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Paths = Annotated[
    tuple[Path, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str | Path) else value),
]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Python would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class DataSettings(Section):
    """The training data: a store, or FASTA files of which the run makes a store."""

    store: Path | None = None
    fasta: Paths | None = None
    masking: str = "standard"
    crop: Crop = "random"
    max_tokens: Annotated[int, Field(ge=3)] = 1024  # of a sequence, BOS and EOS included
    max_length: Count | None = None  # residues; longer sequences are left out


class BatchSettings(Section):
    """How many tokens a step and a pack have."""

    tokens: Count = 2_097_152  # of a step, rounded to whole packs
    pack: Count = 16_384  # computed at a time; bounds memory

    @property
    def packs(self) -> int:
        """Packs of one step."""
        return max(1, round(self.tokens / self.pack))


class OptimizerSettings(Section):
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the others."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 4e-4  # the highest of the schedule; Muon's updates are scaled to the size of AdamW's
    betas: tuple[Share, Share] = (0.9, 0.98)  # of AdamW
    eps: Positive = 1e-8  # of AdamW
    momentum: Share = 0.95  # of Muon
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # decoupled; for matrices, not for norms and biases
    clip: Positive | None = 1.0  # largest norm of the gradient


class ScheduleSettings(Section):
    """The learning rate of each step; ``protea.train.schedule`` has the formulas."""

    name: Literal["linear", "anneal-hold", "cosine", "constant", "trapezoid"] = "linear"
    warmup: NonNegative = 2000  # steps
    steps: Count | None = None  # last step of the curve; by default that of the run
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the highest rate
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of the steps
    constant: NonNegative = 0  # steps at the end of ``cosine``


class RunSettings(Section):
    """How long to train, and how to compute."""

    steps: Count = 500_000
    seed: Seed = 0  # of weights, order, crops, masks and dropout
    precision: Literal["bf16-mixed", "fp16-mixed", "float32"] = "bf16-mixed"
    device: str = "auto"
    compile: bool = False
    recompute: bool = False
    max_loss: Positive = 20.0  # nats; a higher loss stops the run
    workers: NonNegative = 1  # threads that prepare batches


class ValidationSettings(Section):
    """How often to validate, and on how much of the validation split."""

    every: Count | None = 2000  # steps
    tokens: Count | None = 2_097_152
    seed: Seed = 42  # of order, crops and masks


class SaveSettings(Section):
    """When to save a checkpoint, and which checkpoints to keep; the last step's is always saved."""

    every: Count = 1000  # steps
    newest: Count = 2
    best: NonNegative = 1  # by validation loss
    keep_every: Count | None = None  # those of steps divisible by this stay for good


class LogSettings(Section):
    """How often to log metrics, and where to."""

    every: Count = 10  # steps
    tensorboard: bool = True
    wandb: str | None = None  # a project
    peak_tflops: Positive | None = None  # of the device, for utilisation


class Recipe(Section):
    """A complete recipe.

    Attributes:
        name: a title for people.
        init: a checkpoint of any format, or a published name, to start from; it brings its architecture.
        model: without ``init``: an ``architecture`` by published name, and keys of its configuration to change.
    """

    name: str = ""
    init: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    validation: ValidationSettings = ValidationSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()

    @property
    def config(self) -> EncoderConfig:
        """The architecture, if it does not come with ``init``.

        Raises:
            UsageError: a name is unknown, or a value does not fit.
        """
        changes = dict(self.model)
        base = published(str(changes.pop(_ARCHITECTURE))).config
        known = {field.name for field in fields(base)}
        for name, value in changes.items():
            if name not in known:
                raise UsageError(f"model: unknown key {name!r}{suggestion(name, [_ARCHITECTURE, *known])}")
            kind = type(getattr(base, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(f"model.{name} {value!r} must be of type {kind.__name__}")
        try:
            config = replace(base, **changes)
        except CheckpointError as error:
            raise UsageError(f"model: {error}") from error
        if config.vocab_size < len(config.alphabet):
            tokens = f"the {len(config.alphabet)} tokens of the {config.alphabet.name} alphabet"
            raise UsageError(f"model.vocab_size {config.vocab_size} is smaller than {tokens}")
        return config

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        data, batch, schedule = self.data, self.batch, self.schedule
        if self.init is None:
            if _ARCHITECTURE not in self.model:
                raise UsageError("no model: give model.architecture (`protea info --list`), or init, a model to train")
            _ = self.config
        elif self.model:
            keys = ", ".join(self.model)
            raise UsageError(f"init brings its architecture: remove model ({keys}), or set model={{}}")
        if data.store is not None and data.fasta is not None:
            raise UsageError("data.store and data.fasta exclude each other; give one of them")
        if data.masking not in VARIANTS:
            raise UsageError(f"data.masking {data.masking!r} must be one of {', '.join(VARIANTS)}")
        if batch.pack < data.max_tokens:
            raise UsageError(
                f"batch.pack {batch.pack:,} is smaller than data.max_tokens {data.max_tokens:,}, but a pack must hold "
                "a whole sequence: raise batch.pack or lower data.max_tokens"
            )
        if batch.tokens < batch.pack:
            raise UsageError(
                f"batch.tokens {batch.tokens:,} is smaller than batch.pack {batch.pack:,}, but a step has at least one "
                "pack: raise batch.tokens or lower batch.pack"
            )
        steps = schedule.steps or self.run.steps
        if schedule.warmup + schedule.constant > steps:
            raise UsageError(
                f"schedule.warmup {schedule.warmup:,} plus schedule.constant {schedule.constant:,} exceeds the "
                f"schedule's {steps:,} steps; lower one of them"
            )
        if schedule.min_lr > self.optimizer.lr:
            raise UsageError(f"schedule.min_lr {schedule.min_lr:g} exceeds optimizer.lr {self.optimizer.lr:g}")
        return self

    def shown(self) -> dict[str, Any]:
        """The recipe as plain values that YAML and JSON can hold."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """The values by dotted key, as in ``run.steps``."""
        return flatten(self.shown())


def flatten(shown: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values by dotted key; null counts as absent."""
    values: dict[str, Any] = {}
    for name, value in shown.items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {key: value for key, value in values.items() if value is not None}
