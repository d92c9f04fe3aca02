"""Which options belong to which method, head and task. One that is given where it can do nothing is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from protea.finetune.heads import DEFAULTS, HEADS, HF
from protea.finetune.tasks import Task


class _Setup(NamedTuple):
    """The method, the head and the task of a training."""

    method: str
    head: str
    task: Task

    @property
    def solved(self) -> bool:
        """Whether nothing is trained: the head has a solution."""
        return self.method == "frozen" and self.head == "linear"


@dataclass(frozen=True)
class _Scope:
    """Where some options can do something, and what is said elsewhere; ``harmless`` values are right everywhere."""

    options: tuple[str, ...]
    applies: Callable[[_Setup], bool]
    elsewhere: str
    harmless: tuple[Any, ...] = ()


_SCOPES: Final = (
    _Scope(
        ("lr",),
        lambda setup: setup.method != "frozen",
        "trains the encoder (lora, full); the head of a frozen model has --head-lr",
    ),
    _Scope(
        ("precision", "recompute"),
        lambda setup: setup.method != "frozen",
        "is for --method lora and full; leave it out, a frozen model computes in --dtype",
    ),
    _Scope(
        ("rank", "lora_alpha", "dora"),
        lambda setup: setup.method == "lora",
        "is for --method lora; leave it out, or choose that method",
    ),
    _Scope(
        ("layer_decay",),
        lambda setup: setup.method == "full",
        "is for --method full; leave it out, or choose that method",
    ),
    _Scope(
        ("layer",),
        lambda setup: setup.method == "frozen",
        "is for --method frozen; lora and full train the states of the last layer",
        harmless=(-1,),
    ),
    _Scope(
        ("layer",),
        lambda setup: setup.head != HF,
        f"--head {HF} reads the last layer, as transformers does; leave it out",
        harmless=(-1,),
    ),
    _Scope(
        ("long",),
        lambda setup: setup.method == "frozen",
        "is for --method frozen; use truncate, full or error",
        harmless=("truncate", "full", "error"),
    ),
    _Scope(
        ("hidden",),
        lambda setup: setup.head not in ("linear", HF),
        "--head {head} has no hidden layer whose width can be chosen; leave it out, or choose --head mlp",
    ),
    _Scope(
        ("dropout",),
        lambda setup: setup.head != "linear",
        "--head linear has no dropout; leave it out, or choose --head mlp",
    ),
    _Scope(
        ("head_lr", "weight_decay", "epochs", "batch", "patience", "seeds"),
        lambda setup: not setup.solved,
        "a linear head on a frozen model is solved, not trained; leave it out, or choose --head mlp or --method lora",
    ),
    _Scope(
        ("pool",),
        lambda setup: setup.task.unit != "residue" and setup.head != "light-attention",
        "this head reads every residue, not the vector of a sequence; leave it out",
    ),
    _Scope(
        ("class_weights",),
        lambda setup: setup.task.kind != "value",
        "a {task} task has no classes; leave it out",
    ),
    _Scope(
        ("coverage",),
        lambda setup: setup.task.kind != "labels",
        "a {task} task has no sets and no intervals; leave it out",
    ),
)


def misplaced(given: Mapping[str, Any], method: str, head: str | None, tasks: Iterable[Task]) -> dict[str, str]:
    """Messages about ``given`` options that can do nothing for any of the ``tasks``; ``head`` None is the default."""
    heads = ((head or DEFAULTS[task.unit], task) for task in tasks)
    setups = [_Setup(method, kind, task) for kind, task in heads if kind in HEADS[task.unit]]
    return {
        name: f"{_flag(name, given[name])}: {scope.elsewhere.format(head=setups[0].head, task=setups[0].task.name)}"
        for scope in (_SCOPES if setups else ())
        if not any(map(scope.applies, setups))
        for name in scope.options
        if name in given and given[name] not in scope.harmless
    }


def _flag(name: str, value: Any) -> str:
    """An option with its value, as on a command line."""
    values = value if isinstance(value, tuple) else (value,)
    text = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in values)
    return f"--{name.replace('_', '-')}{'' if value is True else f' {text}'}"
