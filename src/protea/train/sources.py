"""The training data of a run: a store, or FASTA files that one is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from protea.alphabet import Alphabet
from protea.data import work
from protea.data.cluster import ClusterSettings, build_fasta
from protea.data.manifest import ALPHABETS, is_store
from protea.data.store import Store
from protea.errors import UsageError
from protea.train.recipe import Recipe
from protea.train.watcher import Watcher

STORE: Final = "store"


class _Steps(work.Watcher):
    """Passes on what a build tells."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def begin(self, what: str, total: int | None = None) -> None:
        self._watcher.note(f"training data: {what}")

    def note(self, message: str) -> None:
        self._watcher.note(message)


def open_store(recipe: Recipe, folder: Path, alphabet: Alphabet, watcher: Watcher) -> Store:
    """The store that a recipe names, or the one in the run's folder, made where it is not there yet.

    Raises:
        UsageError: the recipe names no data.
        DataError: the data cannot be used; StoreError for a store of another alphabet, or a damaged one.
    """
    data = recipe.data
    if data.store is not None:
        return Store(data.store, alphabet)
    if data.fasta is None:
        raise UsageError("the recipe names no data: give data.store=DIR (see `protea data`), or data.fasta=FILE")
    output = folder / STORE
    if not is_store(output):
        name = next(name for name, known in ALPHABETS.items() if known == alphabet)
        build_fasta(ClusterSettings(output=output, alphabet=name), data.fasta, _Steps(watcher))
    return Store(output, alphabet)
