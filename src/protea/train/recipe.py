"""Recipes: the settings of a training run, from YAML files and from what users type.

``docs/pretraining.md`` explains every key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from protea.checkpoints.hub import published
from protea.data.masking import VARIANTS
from protea.data.sampler import Crop
from protea.errors import CheckpointError, UnknownModelError, UsageError
from protea.models.family import EncoderConfig
from protea.settings_errors import Section, parse_yaml, read_yaml, suggestion, validate

RECIPES: Final = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""

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


class DataSettings(Section):
    """The training data: a store, or FASTA files of which the run makes a store."""

    store: Path | None = None
    fasta: Paths | None = None
    cluster: bool = True  # the sequences of ``fasta``, with MMseqs2
    masking: str = "standard"
    crop: Crop = "random"
    max_tokens: Annotated[int, Field(ge=3)] = 1024  # of a sequence, BOS and EOS included
    max_length: Count | None = None  # residues; longer sequences are left out


class BatchSettings(Section):
    """How many tokens a step and a pack have."""

    tokens: Count = 2_097_152  # tokens of a step, rounded to whole packs
    pack: Count = 16_384  # tokens computed at a time; this bounds memory

    @property
    def packs(self) -> int:
        """Packs of one step."""
        return max(1, round(self.tokens / self.pack))


class OptimizerSettings(Section):
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the others."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 4e-4  # the highest rate of the schedule; Muon's updates are scaled to the size of AdamW's
    betas: tuple[Share, Share] = (0.9, 0.98)  # of AdamW
    eps: Positive = 1e-8  # of AdamW
    momentum: Share = 0.95  # of Muon
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # decoupled; applies to matrices, not to norms and biases
    clip: Positive | None = 1.0  # largest norm of the gradient


class ScheduleSettings(Section):
    """The learning rate of each step; ``protea.train.optim`` has the formulas."""

    name: Literal["linear", "anneal-hold", "cosine", "constant", "trapezoid"] = "linear"
    warmup: NonNegative = 2000  # steps
    steps: Count | None = None  # last step of the curve; by default the last step of the run
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the highest rate
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of the steps
    constant: NonNegative = 0  # steps at the end of ``cosine``


class RunSettings(Section):
    """How long to train, and how to compute."""

    steps: Count = 500_000
    seed: Seed = 0  # of weights, order, crops, masks and dropout
    precision: Literal["auto", "bf16-mixed", "fp16-mixed", "float32"] = "auto"
    device: str = "auto"
    compile: bool = False
    recompute: bool = False
    max_loss: Positive = 20.0  # nats; a higher loss stops the run
    workers: NonNegative = 1  # threads that prepare batches


def _shards(value: object) -> object:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise ValueError("must be auto, or a whole number from 1")


class ParallelSettings(Section):
    """How many processes share the model and the packs; ``protea.train.parallel`` explains the layout."""

    replicate: Count = 1  # copies of the model
    shard: Annotated[Literal["auto"] | int, PlainValidator(_shards)] = (
        "auto"  # parts of a copy; auto: all processes that remain
    )
    tensor: Count = 1  # parts of each matrix
    pipeline: Count = 1  # stages of layers
    schedule: Literal["1f1b", "interleaved"] = "1f1b"  # order of packs in a pipeline
    timeout: Positive = 1800.0  # seconds that a process may take for a pack, or wait for the others


class ValidationSettings(Section):
    """How often to validate, and on how much of the validation split."""

    every: Count | None = 2000  # steps
    tokens: Count | None = 2_097_152
    seed: Seed = 42  # seeds order, crops and masks


class SaveSettings(Section):
    """When to save a checkpoint, and which checkpoints to keep; the last step's is always saved."""

    every: Count = 1000  # steps
    newest: Count = 2
    best: NonNegative = 1  # number of checkpoints with the lowest validation loss
    keep_every: Count | None = None  # checkpoints of steps divisible by this are never removed


class LogSettings(Section):
    """How often to log metrics, and where to."""

    every: Count = 10  # steps
    tensorboard: bool = True
    wandb: str | None = None  # name of a project
    peak_tflops: Positive | None = None  # peak of the device, to compute its utilisation


class Recipe(Section):
    """A complete recipe."""

    name: str = ""  # a title for people
    init: str | None = None  # a checkpoint of any format or a published name, whose architecture is taken too
    model: dict[str, Any] = Field(default_factory=dict)  # else an architecture's name, and what to change in it
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    parallel: ParallelSettings = ParallelSettings()
    validation: ValidationSettings = ValidationSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()

    @property
    def config(self) -> EncoderConfig:
        """The architecture, if it does not come with ``init``."""
        changes = dict(self.model)
        try:
            base = published(str(changes.pop(_ARCHITECTURE))).config
        except UnknownModelError as error:
            raise UsageError(f"model.{_ARCHITECTURE}: {error}") from error
        known = {field.name for field in fields(base)}
        for name, value in changes.items():
            if name not in known:
                raise UsageError(f"unknown key 'model.{name}'{suggestion(name, [_ARCHITECTURE, *known])}")
            kind = type(getattr(base, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(f"model.{name} {value!r} must be of type {kind.__name__}")
        try:
            config = replace(base, **changes)
        except CheckpointError as error:
            message = re.sub(rf"\b({'|'.join(known)})\b", r"model.\1", str(error))
            raise UsageError(message) from error
        if config.vocab_size < (tokens := len(config.alphabet)):
            raise UsageError(f"model.vocab_size {config.vocab_size} must be at least {tokens}, as the alphabet needs")
        return config

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        data, batch, schedule = self.data, self.batch, self.schedule
        highest = self.optimizer.lr
        end, steps = ("run", self.run.steps) if schedule.steps is None else ("schedule", schedule.steps)
        rules = {
            "no model: give model.architecture (`protea info --list`), or init": (
                self.init is not None or _ARCHITECTURE in self.model
            ),
            f"init brings its architecture: remove model ({', '.join(self.model)}), or set model={{}}": (
                self.init is None or not self.model
            ),
            "data.store and data.fasta exclude each other; give one of them": not (data.store and data.fasta),
            f"data.masking {data.masking!r} must be one of {', '.join(VARIANTS)}": data.masking in VARIANTS,
            f"batch.pack {batch.pack:,} must be at least data.max_tokens {data.max_tokens:,}; raise batch.pack, or "
            "lower data.max_tokens": batch.pack >= data.max_tokens,
            f"batch.tokens {batch.tokens:,} must be at least batch.pack {batch.pack:,}; raise batch.tokens, or lower "
            "batch.pack": batch.tokens >= batch.pack,
            f"schedule.warmup {schedule.warmup:,} plus schedule.constant {schedule.constant:,} must be at most "
            f"{end}.steps {steps:,}; lower schedule.warmup, as in schedule.warmup=0, or raise {end}.steps": (
                schedule.warmup + schedule.constant <= steps
            ),
            f"schedule.min_lr {schedule.min_lr:g} must be at most optimizer.lr {highest:g}; lower schedule.min_lr, or "
            "raise optimizer.lr": schedule.min_lr <= highest,
        }
        for message, holds in rules.items():
            if not holds:
                raise UsageError(message)
        if self.init is None:
            _ = self.config
        return self

    def shown(self) -> dict[str, Any]:
        """The recipe as plain values that YAML and JSON can hold."""
        return self.model_dump(mode="json")


def flatten(shown: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values by dotted key; null counts as absent."""
    values: dict[str, Any] = {}
    for name, value in shown.items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {key: value for key, value in values.items() if value is not None}


def read_recipe(source: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or by the name of one that comes with the package, with some values changed.

    Each change is ``section.key=value``, with the value as in YAML.
    """
    values = read_yaml(_recipe_path(source))
    for change in changes:
        _apply(change, values)
    return validate(Recipe, values, source, changes=changes)


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_path(source: str) -> Path:
    path, names = Path(source), recipe_names()
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise UsageError(f"{source}: there is no such file; recipes that come with Protea: {', '.join(names)}")
        return path
    if source not in names:
        raise UsageError(f"{source}: is neither a file nor the name of a recipe{suggestion(source, names)}")
    return RECIPES / f"{source}.yaml"


def _apply(change: str, values: dict[str, Any]) -> None:
    name, equals, value = change.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{change!r}: expected key=value, as in optimizer.lr=1e-3")
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[key] = parse_yaml(value, repr(change))
