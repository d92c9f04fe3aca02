"""The training data of a run: a store, or FASTA files of which a store is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.alphabet import Alphabet
from protea.data.cluster import ClusterSettings, build_fasta
from protea.data.loader import Loader, Packing
from protea.data.manifest import is_store, name_of
from protea.data.sampler import Sampler
from protea.data.training_store import TrainingStore
from protea.errors import StoreError, UsageError
from protea.output import write_durably
from protea.progress import Progress
from protea.train.recipe import Recipe

STORE: Final = "store"
_SOURCES: Final = "store.sources.json"
_SAMPLE: Final = 4096


def open_store(recipe: Recipe, folder: Path, alphabet: Alphabet, progress: Progress) -> TrainingStore:
    """The store that a recipe names, or the one in the run's folder, which is made if it is missing.

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
    sources = {"alphabet": name_of(alphabet), "files": [_describe(path) for path in data.fasta]}
    if is_store(output):
        try:
            if _same(record, sources):
                return TrainingStore(output, alphabet)
            reason = "the FASTA files changed since the store was made"
        except StoreError as error:
            reason = str(error)
        progress.note(f"training data: {reason}; makes the store again")
    settings = ClusterSettings(output=output, alphabet=name_of(alphabet))
    build_fasta(settings, data.fasta, progress, overwrite=True)  # type: ignore[arg-type,unused-ignore]
    write_durably(record, json.dumps(sources))
    return TrainingStore(output, alphabet)


def make_loader(store: TrainingStore, split: str, recipe: Recipe, *, seed: int, workers: int, pin: bool) -> Loader:
    """Masked packs of a split, as the recipe crops, masks and packs sequences; ``pin`` uses page-locked memory."""
    data = recipe.data
    sampler = Sampler(
        store.split(split), seed=seed, max_tokens=data.max_tokens, crop=data.crop, max_length=data.max_length
    )
    packing = Packing(tokens=recipe.batch.pack)
    return Loader(sampler, masking=data.masking, packing=packing, workers=workers, pin=pin)


def mean_length(sampler: Sampler) -> float:
    """Mean over tokens of the length of each token's sequence, from a sample of the first epoch."""
    lengths = sampler.draw(0, np.arange(min(_SAMPLE, len(sampler)))).tokens.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def _describe(path: Path) -> list[Any]:
    """Name, size and time of a file; the name alone if the file is missing."""
    if not path.is_file():
        return [str(path)]
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _same(record: Path, sources: dict[str, Any]) -> bool:
    """Whether a store was made of these files; for files that are missing by now, the name decides."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        pairs = zip(known["files"], sources["files"], strict=True)
        same = all(now in (before, [before[0]]) for before, now in pairs)
        return same and bool(known["alphabet"] == sources["alphabet"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
