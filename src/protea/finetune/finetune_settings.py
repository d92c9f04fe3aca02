"""The options of ``protea finetune``, from flags and from YAML files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from protea import bundled
from protea.embed.prepare import Long
from protea.errors import UsageError
from protea.finetune.applicable import misplaced
from protea.finetune.frozen import AUTO
from protea.finetune.heads import HEADS
from protea.finetune.tasks import TASKS, Task
from protea.letters import Gaps, Unknown
from protea.settings_errors import Section, validate

Method = Literal["frozen", "lora", "full"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    """Accept ``1e-4,3e-4`` for a list, and one number without brackets."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list | tuple) else [value]


def _layer(value: Any) -> Any:
    if isinstance(value, int) or value == AUTO:
        return value
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"use {AUTO} or a number") from None


class FinetuneSettings(Section):
    """The options of ``protea finetune``, with the names, defaults and meanings of the flags."""

    data: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
    output: Path
    model: str = bundled.NAME
    labels: Path | None = None
    mask: Path | None = None
    id_column: str | None = None
    sequence_column: str | None = None
    target_column: str | None = None
    set_column: str | None = None
    task: str = AUTO
    split: str = "given"
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Annotated[int, Field(ge=1)] = 1
    method: Method = "frozen"
    head: str | None = None
    hidden: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    layer: Annotated[int | Literal["auto"], BeforeValidator(_layer)] = -1
    pool: Literal["mean", "max", "std", "bos"] = "mean"
    lr: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...] | None, BeforeValidator(lambda v: v if v is None else _numbers(v))
    ] = None
    head_lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[float, Field(gt=0)] | None = None
    rank: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    dora: bool = False
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    recompute: bool = False
    class_weights: bool = False
    calibration: Annotated[float, Field(ge=0, lt=1)] | None = None
    coverage: Annotated[float, Field(ge=1e-6, le=1 - 1e-6)] = 0.9
    baselines: bool = True
    unknown: Unknown = "x"
    gaps: Gaps = "keep"
    long: Long = "truncate"
    dtype: Literal["float32", "bfloat16", "float16", "bf16-mixed", "int8"] = "float32"
    fast: bool = False
    precision: Literal["auto", "float32", "bf16-mixed"] = "auto"
    device: str = "auto"
    token_budget: Annotated[int, Field(ge=1)] | None = None

    _meant: frozenset[str] = frozenset()

    def check(self, *tasks: Task) -> None:
        """Refuse options that somebody means, and that can do nothing for any of the tasks."""
        for message in self._misplaced(self._meant, tasks).values():
            raise UsageError(message)

    def _misplaced(self, names: Iterable[str], tasks: Iterable[Task]) -> dict[str, str]:
        return misplaced({name: getattr(self, name) for name in names}, self.method, self.head, tasks)

    def shown(self) -> dict[str, Any]:
        """The settings as plain values for YAML."""
        return self.model_dump(mode="json")


def parse(values: Mapping[str, Any], origin: str, given: Collection[str] = ()) -> FinetuneSettings:
    """Make settings of values by option name; ``origin`` says in messages where the values come from.

    An option that can do nothing is an error if it is among ``given``, the names on a command line, or if its value is
    not the default. But where the command line chooses the method, the head or the task, a file's options for its own
    are no mistake, and are left out.
    """
    settings = validate(FinetuneSettings, values, origin, noun="option")
    if settings.task not in (AUTO, *TASKS):
        raise UsageError(f"{origin}: task {settings.task!r} is unknown; use {AUTO}, {', '.join(TASKS)}")
    heads = sorted({head for heads in HEADS.values() for head in heads})
    if settings.head not in (None, *heads):
        raise UsageError(f"{origin}: head {settings.head!r} is unknown; use {', '.join(heads)}")
    if settings.method == "frozen" and settings.epochs is not None and settings.epochs % 1:
        raise UsageError(f"{origin}: --epochs {settings.epochs:g}: the head of a frozen model takes a whole number")
    if settings.fast and settings.dtype != "float32":
        raise UsageError(f"{origin}: --fast chooses the type; leave out --dtype {settings.dtype}")
    defaults = {name: FinetuneSettings.model_fields[name].default for name in values if name not in given}
    tasks = list(TASKS.values()) if settings.task == AUTO else [TASKS[settings.task]]
    settings._meant = frozenset(given)
    if {"method", "head", "task"} & settings._meant:
        idle = settings._misplaced(defaults, tasks).keys() - {"long"}  # training says what it would cut
        settings = settings.model_copy(update={name: defaults[name] for name in idle})
    else:
        settings._meant |= {name for name, default in defaults.items() if getattr(settings, name) != default}
    try:
        settings.check(*tasks)
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error
    return settings
