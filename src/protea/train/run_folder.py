"""The folder of a run, which one process at a time works in: its recipe, its training data, and how far it is.

recipe.yaml       the complete recipe
metrics.jsonl     one line for each logged step; docs/pretraining.md defines the metrics
tensorboard/      the same for TensorBoard
checkpoints/      step-000001000/ and so on
store/            training data made from FASTA files; store.sources.json names these files
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import yaml

from protea.errors import OutputError, ResumeError, UsageError
from protea.journal import differences, lock
from protea.output import write_durably
from protea.settings_errors import read_yaml
from protea.train.model import TYPES, settle_precision
from protea.train.recipe import Recipe, flatten
from protea.train.run_checkpoints import CHECKPOINTS, step_folders

RECIPE: Final = "recipe.yaml"
_LOCK: Final = ".lock"
_UNFINISHED: Final = f".{RECIPE}.unfinished"
_PRECISION: Final = "run.precision"
_REASONS: Final = {
    "bf16-mixed": "which this device multiplies natively",
    "float32": "since this device does not multiply bfloat16 natively",
}


class RunFolder(NamedTuple):
    """A run's folder, its recipe with the precision settled, and what differs from how the run began."""

    path: Path
    recipe: Recipe
    notes: list[str]  # on the precision and the differences, in words
    changed: set[str]  # keys


@contextmanager
def open_run_folder(
    path: Path, recipe: Recipe, device: torch.device, *, accept_changes: bool = False
) -> Iterator[RunFolder]:
    """Lock a run's folder, which is new, empty, or belongs to this run; anything else is an error.

    ``run.precision=auto`` becomes what the run began with, or what the device computes natively.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; name a folder")
    begun = bool(step_folders(path / CHECKPOINTS))
    present = {entry.name for entry in path.iterdir()} if path.exists() else set()
    # A recipe.yaml alone may be the user's own file; beside a lock or checkpoints it belongs to a run.
    is_run = RECIPE in present and (_LOCK in present or begun)
    if not is_run and (strangers := sorted(present - {_LOCK, _UNFINISHED})):
        raise OutputError(f"{path}: holds something else ({strangers[0]}); name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    with lock(path / _LOCK, path):
        recorded = _without_layout(_recorded(path / RECIPE)) if is_run else {}
        recipe, notes = _settle(recipe, device, recorded.get(_PRECISION) if begun else None)
        now = _without_layout(flatten(recipe.shown()))
        before = recorded if is_run else now
        changes = differences(before, now)
        if changes and begun and not accept_changes:
            raise ResumeError(
                f"{path}: the run began with another recipe: {changes}; use that recipe again, name a new folder, or "
                "continue with the changes: --accept-changes"
            )
        if not begun:
            write_recipe(path, recipe)
        if changes:
            notes.append(f"the recipe changed: {changes}")
        yield RunFolder(path, recipe, notes, {key for key in before | now if before.get(key) != now.get(key)})


def _without_layout(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe on which a run depends: it may continue with any number of processes."""
    return {key: value for key, value in values.items() if not key.startswith("parallel.")}


def _settle(recipe: Recipe, device: torch.device, recorded: object) -> tuple[Recipe, list[str]]:
    """The recipe with its precision settled, and what to say of it; ``recorded`` is that of a run that continues."""
    settled = settle_precision(recipe, device)
    chosen = settled.run.precision
    if settled == recipe:
        return recipe, []
    if recorded == chosen or recorded not in TYPES:
        return settled, [f"run.precision=auto: computes in {chosen}, {_REASONS[chosen]}"]
    kept = recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": recorded})})
    note = f"run.precision=auto: continues in {recorded}, as the run began"
    return kept, [f"{note}; for a new run on this device it would choose {chosen}, {_REASONS[chosen]}"]


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe to a run's folder; a changed one only when the run can continue with it."""
    write_durably(folder / RECIPE, yaml.safe_dump(recipe.shown(), sort_keys=False))


def _recorded(path: Path) -> dict[str, Any]:
    """The values of a run's recipe by dotted key; a key that an earlier version did not know has its default."""
    try:
        values = read_yaml(path)
    except UsageError as error:
        raise ResumeError(f"{error}; correct it, or name a new folder") from error
    for name, default in Recipe.model_construct().shown().items():
        given = values.setdefault(name, default)
        if isinstance(default, dict) and isinstance(given, dict):
            values[name] = default | given
    return flatten(values)
