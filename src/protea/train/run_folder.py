"""The folder of a run: whose it is, and that one process at a time works on it.

recipe.yaml       the recipe as it is run, complete
metrics.jsonl     what docs/pretraining.md defines, a line a logged step
tensorboard/      the same for TensorBoard
checkpoints/      step-000001000/ and so on
store/            training data, where the recipe names FASTA files; store.sources.json says which they were
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Self

import yaml

from protea.disk import lock, unfinished, write_durably
from protea.errors import OutputError, ResumeError
from protea.train.reading import differences
from protea.train.recipe import Recipe
from protea.train.state import Checkpoints, checkpoint_folder

RECIPE: Final = "recipe.yaml"
_LOCK: Final = ".lock"


class RunFolder:
    """A run's folder, locked against other processes.

    Args:
        path: a folder that is new, empty, or this run's.
        recipe: of the run.
        accept_changes: go on although the recipe is not the one that the run began with.

    Raises:
        OutputError: it holds something else, or cannot be written.
        ResumeError: it is another recipe's, or another process is at work on it.

    Attributes:
        path: the folder.
        changes: that were accepted.
    """

    def __init__(self, path: Path, recipe: Recipe, *, accept_changes: bool = False) -> None:
        self.path, self._recipe = path, recipe
        known = path / RECIPE
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; name a folder")
        found = {one.name for one in path.iterdir()} if path.exists() else set()
        # A recipe.yaml alone may be the user's own: with a lock or checkpoints beside it, it is a run's.
        if RECIPE in found and (_LOCK in found or self._begun):
            found.clear()
        if strangers := sorted(found - {_LOCK, unfinished(path / RECIPE).name}):
            raise OutputError(f"{path}: holds something else ({strangers[0]}); name a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path / _LOCK)
        except BlockingIOError as error:
            raise ResumeError(f"{path}: another process trains in it; wait for that one, or name another") from error
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        try:
            self.changes = self._changes(known, accept_changes=accept_changes)
            if not known.exists() or not self._begun:
                self.accept()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def accept(self) -> None:
        """Make the recipe the folder's; a changed one when it is known that the run goes on with it.

        Raises:
            OutputError: it cannot be written.
        """
        known = self.path / RECIPE
        try:
            write_durably(known, yaml.safe_dump(self._recipe.shown(), sort_keys=False))
        except OSError as error:
            raise OutputError(f"{known}: cannot be written: {error.strerror or error}") from error

    @property
    def _begun(self) -> bool:
        return bool(Checkpoints(checkpoint_folder(self.path), self._recipe.save).folders())

    def _changes(self, known: Path, *, accept_changes: bool) -> list[str]:
        changes = list(differences(read_shown(known), self._recipe.shown())) if known.exists() else []
        if changes and not accept_changes and self._begun:
            raise ResumeError(
                f"{self.path}: its recipe was another: {'; '.join(changes)}. Give that one again, name a new "
                "folder, or go on with the change: --accept-changes"
            )
        return changes


def read_shown(path: Path) -> dict[str, Any]:
    """The recipe in a run's folder, as plain values.

    Raises:
        ResumeError: it is missing or damaged.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ResumeError(f"{path}: cannot be read: {why}; mend it, or name a new folder") from error
    if not isinstance(values, dict):
        raise ResumeError(f"{path}: holds no recipe; mend it, or name a new folder")
    return values
