"""The folder of a run: which recipe it belongs to, and that one process at a time works in it.

recipe.yaml       the complete recipe
metrics.jsonl     one line for each logged step; docs/pretraining.md defines the metrics
tensorboard/      the same for TensorBoard
checkpoints/      step-000001000/ and so on
store/            training data made from FASTA files; store.sources.json names these files
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

import yaml

from protea.errors import OutputError, ResumeError, UsageError
from protea.journal import differences, lock
from protea.output import write_durably, write_failure
from protea.settings_errors import read_yaml
from protea.train.recipe import Recipe, flatten
from protea.train.run_checkpoints import CHECKPOINTS, step_folders

RECIPE: Final = "recipe.yaml"
_LOCK: Final = ".lock"
_UNFINISHED: Final = f".{RECIPE}.unfinished"


class RunFolder:
    """A run's folder, locked against other processes; it is new, empty, or this run's.

    ``changes`` says what differs from the recipe that the run began with, ``changed`` holds the keys that differ.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        ResumeError: the folder belongs to another recipe, or another process works in it.
    """

    def __init__(self, path: Path, recipe: Recipe, *, accept_changes: bool = False) -> None:
        self.path, self._recipe = path, recipe
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; name a folder")
        begun = bool(step_folders(path / CHECKPOINTS))
        present = {entry.name for entry in path.iterdir()} if path.exists() else set()
        # A recipe.yaml alone may be the user's own file; beside a lock or checkpoints it belongs to a run.
        is_run = RECIPE in present and (_LOCK in present or begun)
        if not is_run and (strangers := sorted(present - {_LOCK, _UNFINISHED})):
            raise OutputError(f"{path}: holds something else ({strangers[0]}); name a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(error, path) from error
        self._lock = lock(path / _LOCK, path)
        try:
            now = flatten(recipe.shown())
            before = self._recorded() if is_run else now
            self.changes = differences(before, now)
            self.changed = {key for key in before | now if before.get(key) != now.get(key)}
            if self.changes and begun and not accept_changes:
                raise ResumeError(
                    f"{path}: the run began with another recipe: {self.changes}; use that recipe again, name a new "
                    "folder, or continue with the changes: --accept-changes"
                )
            if not begun:
                self.accept()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def accept(self) -> None:
        """Write the recipe to the folder; a changed one only when the run can continue with it.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.path / RECIPE
        try:
            write_durably(path, yaml.safe_dump(self._recipe.shown(), sort_keys=False))
        except OSError as error:
            raise write_failure(error, path) from error

    def _recorded(self) -> dict[str, object]:
        path = self.path / RECIPE
        try:
            return flatten(read_yaml(path, str(path)))
        except UsageError as error:
            raise ResumeError(f"{error}; correct it, or name a new folder") from error
