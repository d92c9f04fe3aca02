"""What a training run is told: a YAML file of sections, complete, strict, and kept with every checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from protea.checkpoints.hub import published
from protea.data.masking import VARIANTS
from protea.data.sampler import Crop
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import EncoderConfig

RECIPES: Final = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""

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


class Batch(Section):
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
        floor: the share of the highest rate at which ``linear`` and ``anneal-hold`` stop falling.
        decay: the share of the steps by which ``linear`` has reached it.
        constant: steps at the end that ``cosine`` stays at ``min_lr``.
    """

    name: Literal["linear", "anneal-hold", "cosine", "constant"] = "linear"
    warmup: Annotated[int, Field(ge=0)] = 2000
    steps: Count | None = None
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    constant: Annotated[int, Field(ge=0)] = 0


class Run(Section):
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


class Validation(Section):
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
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: Run = Run()
    validation: Validation = Validation()
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
                raise UsageError(f"model: unknown key {name!r}{_near(name, [_ARCHITECTURE, *known])}")
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

    def shown(self) -> dict[str, Any]:
        """As plain values that YAML and JSON hold."""
        return self.model_dump(mode="json")


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or by the name of one that comes with the package.

    Args:
        source: a path, or a name.
        overrides: ``section.key=value`` each, values as YAML spells them.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """
    path = _found(source)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected sections as `name:` lines with keys under them")
    for override in overrides:
        _override(values, override)
    return parse(values, str(path))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def list_recipes() -> Iterator[tuple[str, str]]:
    """Name and title of each recipe that comes with the package."""
    for name in recipe_names():
        yield name, str(yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["name"])


def parse(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from values.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(_explain(error, origin)) from error
    try:
        _check(recipe)
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error
    return recipe


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two recipes as shown: ``run.steps: 100, now 200``."""
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}: {_typed(a)}, now {_typed(b)}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads 1e-5 as a number, which YAML 1.1 wants spelled 1.0e-5."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _typed(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _check(recipe: Recipe) -> None:
    """What no section can see by itself."""
    if recipe.init is None and _ARCHITECTURE not in recipe.model:
        raise UsageError(
            "names no model: give model.architecture (`protea info --list`), or init, a model to go on from"
        )
    if recipe.init is not None and recipe.model:
        raise UsageError(
            f"init brings its architecture; leave out model ({', '.join(recipe.model)}), or set model={{}}"
        )
    if recipe.init is None:
        _ = recipe.config
    if recipe.data.store is not None and recipe.data.fasta is not None:
        raise UsageError("data.store and data.fasta exclude each other")
    if recipe.data.masking not in VARIANTS:
        raise UsageError(f"data.masking {recipe.data.masking!r} should be one of {', '.join(VARIANTS)}")
    if recipe.batch.pack < recipe.data.max_tokens:
        raise UsageError(
            f"batch.pack {recipe.batch.pack:,} is smaller than a sequence, data.max_tokens {recipe.data.max_tokens:,}: "
            "raise the one or lower the other"
        )
    if recipe.batch.tokens < recipe.batch.pack:
        raise UsageError(
            f"batch.tokens {recipe.batch.tokens:,} is smaller than batch.pack {recipe.batch.pack:,}: a step is at "
            "least one pack"
        )
    schedule, steps = recipe.schedule, recipe.schedule.steps or recipe.run.steps
    if schedule.warmup + schedule.constant > steps:
        raise UsageError(
            f"schedule.warmup {schedule.warmup:,} and schedule.constant {schedule.constant:,} are together more than "
            f"its {steps:,} steps"
        )
    if schedule.min_lr > recipe.optimizer.lr:
        raise UsageError(f"schedule.min_lr {schedule.min_lr:g} is above optimizer.lr {recipe.optimizer.lr:g}")


def _found(source: str) -> Path:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise UsageError(f"{source}: no such file; the recipes that come along are {', '.join(recipe_names())}")
        return path
    if source not in recipe_names():
        raise UsageError(
            f"{source}: neither a recipe's file nor its name{_near(source, recipe_names())}; "
            f"the names are {', '.join(recipe_names())}"
        )
    return RECIPES / f"{source}.yaml"


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{text!r}: expected key=value, as in optimizer.lr=1e-3")
    try:
        parsed = yaml.load(value, _Loader) if value.strip() else None
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    *sections, key = name.strip().split(".")
    place = values
    for section in sections:
        inner = place.get(section)
        place[section] = place = dict(inner) if isinstance(inner, dict) else {}
    place[key] = parsed


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation or section  # type: ignore[assignment]
        names = list(section.model_fields)
        return f"{origin}: unknown key {where!r}{_near(str(first['loc'][-1]), names)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
    return f"{origin}: {where} {first['input']!r} {message}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
