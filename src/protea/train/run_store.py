"""The training data of a run: a store that its recipe names, or one in its folder, made from FASTA files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Final

from protea.alphabet import Alphabet
from protea.data.build_settings import BuildSettings, ClusterSettings, sample_size
from protea.data.from_fasta import build_fasta, build_uniref
from protea.data.manifest import PRETRAIN, is_store, name_of
from protea.data.training_store import TrainingStore
from protea.errors import DataError, ProgramError, StoreError, UnknownResidueError, UsageError
from protea.fasta import flows
from protea.output import write_durably
from protea.progress import Progress
from protea.records import read_records
from protea.text import counted
from protea.train.objective import Validation, make_loader
from protea.train.recipe import Recipe

STORE: Final = "store"
_SOURCES: Final = "store.sources.json"
_VALID: Final = "5%"  # of sequences without clusters: a family is small


def open_store(recipe: Recipe, folder: Path, alphabet: Alphabet, progress: Progress) -> TrainingStore:
    """The store that a recipe names, or the one in the run's folder, which is made if it is missing."""
    data = recipe.data
    if data.store is not None:
        return TrainingStore(data.store, alphabet)
    if data.fasta is None:
        raise UsageError("the recipe names no data: give data.store=DIR (see `protea data`), or data.fasta=FILE")
    output, record = folder / STORE, folder / _SOURCES
    sources = {
        "alphabet": name_of(alphabet),
        "files": [_describe(path) for path in data.fasta],
        "cluster": data.cluster,
    }
    if is_store(output):
        try:
            if _same(record, sources):
                return TrainingStore(output, alphabet)
            reason = "the FASTA files changed since the store was made, or data.cluster did"
        except StoreError as error:
            reason = str(error)
        progress.note(f"training data: {reason}; makes the store again")
    _build(recipe, output, data.fasta, alphabet, progress)
    write_durably(record, json.dumps(sources))
    return TrainingStore(output, alphabet)


def check_data(recipe: Recipe, alphabet: Alphabet) -> None:
    """Refuse training data with which no run can begin; a recipe that names none passes. Makes no store."""
    data, validates = recipe.data, recipe.validation.every is not None
    if data.store is not None:
        store = TrainingStore(data.store, alphabet)
        make_loader(store, "train", recipe, seed=recipe.run.seed, workers=0, pin=False)
        if validates:
            Validation(store, recipe)
    elif data.fasta is not None:
        for path in data.fasta:
            next(iter(() if flows(str(path)) else read_records([path])), None)
        if validates:
            _check_enough(data.fasta, cluster=data.cluster)


def _build(recipe: Recipe, output: Path, files: Sequence[Path], alphabet: Alphabet, progress: Progress) -> None:
    """Make a store; without ``data.cluster``, each sequence is a cluster of its own, and nothing is filtered."""
    name = name_of(alphabet)
    if recipe.validation.every is not None:
        _check_enough(files, cluster=recipe.data.cluster)
    try:
        if recipe.data.cluster:
            clusters = ClusterSettings(output=output, alphabet=name)
            build_fasta(clusters, files, progress, overwrite=True, command=PRETRAIN)
            return
        progress.note("data.cluster=false: validation sequences may resemble training sequences")
        settings = BuildSettings(output=output, alphabet=name, valid=_VALID, filtered=False)
        build_uniref(settings, files, [], None, progress, overwrite=True, command=PRETRAIN)
    except ProgramError as error:
        raise ProgramError(
            f"data.fasta: {error}; or set data.cluster=false, which trains without clusters and needs no MMseqs2"
        ) from error
    except UnknownResidueError as error:
        raise UnknownResidueError(
            f"data.fasta: {error}; this is an option of `protea data fasta`, whose store is for data.store"
        ) from error


def _check_enough(files: Sequence[Path], *, cluster: bool) -> None:
    """Refuse so few sequences that none would be held out for validation; a pipe cannot be read twice to count them."""
    valid = ClusterSettings.valid if cluster else _VALID
    least = next(total for total in count(1) if sample_size("valid", valid, total))
    if any(flows(str(path)) for path in files):
        return
    found = sum(1 for _ in islice(read_records(files), least))
    if found < least:
        other = (
            f"set data.cluster=false, which holds out {_VALID}, "
            if cluster and sample_size("valid", _VALID, found)
            else ""
        )
        raise DataError(
            f"data.fasta: {counted(found, 'sequence')}; holding out {valid} for validation needs at least {least}: "
            f"give more, {other}or set validation.every=null to train without validation"
        )


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
        alike = known["alphabet"] == sources["alphabet"] and known.get("cluster", True) == sources["cluster"]
        return same and bool(alike)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
