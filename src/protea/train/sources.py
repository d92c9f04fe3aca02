"""The training data of a run: a store, or FASTA files that one is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from protea.alphabet import Alphabet
from protea.data.cluster import ClusterSettings, build_fasta
from protea.data.manifest import is_store, name_of
from protea.data.training_store import TrainingStore
from protea.disk import write_durably
from protea.errors import StoreError, UsageError
from protea.progress import Progress
from protea.train.recipe import Recipe
from protea.train.watcher import Watcher

STORE: Final = "store"
_SOURCES: Final = "store.sources.json"


class _Steps(Progress):
    """Passes on what a build tells."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        self._watcher.note(f"training data: {task}")

    def note(self, message: str) -> None:
        self._watcher.note(message)


def open_store(recipe: Recipe, folder: Path, alphabet: Alphabet, watcher: Watcher) -> TrainingStore:
    """The store that a recipe names, or the one in the run's folder, made where it is not there yet.

    Raises:
        UsageError: the recipe names no data.
        DataError: the data cannot be used; StoreError for a store of another alphabet, or a damaged one.
    """
    data = recipe.data
    if data.store is not None:
        return TrainingStore(data.store, alphabet)
    if data.fasta is None:
        raise UsageError("the recipe names no data: give data.store=DIR (see `protea data`), or data.fasta=FILE")
    output, record = folder / STORE, folder / _SOURCES
    name = name_of(alphabet)
    sources = {"alphabet": name, "files": [_describe(path) for path in data.fasta]}
    if is_store(output):
        try:
            if _same(record, sources):
                return TrainingStore(output, alphabet)
            why = "the FASTA files are not those that the store was made of"
        except StoreError as error:
            why = str(error)
        watcher.note(f"training data: {why}; it is made anew")
    build_fasta(ClusterSettings(output=output, alphabet=name), data.fasta, _Steps(watcher), overwrite=True)
    write_durably(record, json.dumps(sources))
    return TrainingStore(output, alphabet)


def _describe(path: Path) -> list[Any]:
    """Name, size and time, by which a file is known again."""
    found = path.stat() if path.is_file() else None
    return [str(path), *((found.st_size, found.st_mtime_ns) if found else ())]


def _same(record: Path, sources: dict[str, Any]) -> bool:
    """Whether a store was made of these; of a file that is gone by now, the name must do."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        pairs = list(zip(known["files"], sources["files"], strict=True))
        same = all(one == other or [one[0]] == other for one, other in pairs)
        return bool(same and known["alphabet"] == sources["alphabet"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
