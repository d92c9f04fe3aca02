"""The folder of a run, which one process at a time works in: its recipe, its training data, and how far it is.

recipe.yaml       the complete recipe
metrics.jsonl     one line for each logged step; docs/pretraining.md defines the metrics
tensorboard/      the same for TensorBoard
checkpoints/      step-000001000/ and so on
store/            training data made from FASTA files; store.sources.json names these files
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import yaml

import protea
from protea import native
from protea.alphabet import Alphabet
from protea.checkpoints.hf_config import config_json
from protea.checkpoints.tensors import Tensors
from protea.data.build_settings import BuildSettings, ClusterSettings, sample_size
from protea.data.from_fasta import build_fasta, build_uniref
from protea.data.loader import Position
from protea.data.manifest import PRETRAIN, is_store, name_of
from protea.data.training_store import TrainingStore
from protea.errors import (
    CheckpointError,
    DataError,
    OutputError,
    ProgramError,
    ResumeError,
    StoreError,
    UnknownResidueError,
    UsageError,
)
from protea.fasta import flows
from protea.journal import differences, lock
from protea.output import write_durably
from protea.progress import Progress
from protea.records import read_records
from protea.settings_errors import read_yaml
from protea.text import counted
from protea.train.model import TYPES, Trainable, settle_precision
from protea.train.objective import Validation, make_loader
from protea.train.optim import PREFIX
from protea.train.parallel import ALONE
from protea.train.recipe import Recipe, flatten
from protea.train.run_checkpoints import (
    CHECKPOINTS,
    MODEL,
    STATE,
    RunCheckpoints,
    SavedCheckpoint,
    step_folders,
)
from protea.train.shares import Parts, fill
from protea.train.world import World

RECIPE: Final = "recipe.yaml"
STORE: Final = "store"
_SOURCES: Final = "store.sources.json"
_LOCK: Final = ".lock"
_UNFINISHED: Final = f".{RECIPE}.unfinished"
_PRECISION: Final = "run.precision"
_LAYOUT: Final = "layout"
_VALID: Final = "5%"  # of sequences without clusters: a family is small
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


@dataclass
class TrainingState:
    """How far a run is."""

    step: int = 0  # updates done
    position: Position = field(default_factory=Position)  # where in the data the next step begins
    tokens: int = 0  # seen so far, BOS and EOS included
    validation_loss: float | None = None  # at this step, if it was measured


def save(checkpoints: RunCheckpoints, trainable: Trainable, state: TrainingState, *, recipe: Recipe, data: str) -> None:
    """Save everything that the next step depends on; ``data`` is the hash of the training data."""
    model = trainable.model
    weights = {**dict(model.named_parameters()), **model.stored_buffers}
    checkpoints.save(
        state.step,
        {f"{MODEL}{name}": tensor for name, tensor in weights.items()} | dict(trainable.optimizers.state()),
        {
            "position": list(state.position),
            "tokens": state.tokens,
            "validation_loss": state.validation_loss,
            "scaler": trainable.precision.scaler.state_dict(),
            "config": config_json(model, torch.float32),
            "recipe": recipe.shown(),
            "data": data,
            "protea": protea.__version__,
            "surroundings": surroundings(trainable),
        },
    )


def versions() -> dict[str, str]:
    """The versions that all processes of a run must share."""
    return {"Protea": protea.__version__, "PyTorch": torch.__version__, "NumPy": np.__version__}


def surroundings(trainable: Trainable) -> dict[str, str]:
    """What the last bits of a step depend on besides the recipe and the data."""
    device = trainable.model.device
    on_gpu = device.type == "cuda"
    own = None if on_gpu else native.instruction_set()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "attention kernel": "PyTorch's" if own is None else f"Protea's, {own}",
        _LAYOUT: str(trainable.parallel.layout),
    }


def compare_surroundings(before: Mapping[str, str], trainable: Trainable, progress: Progress) -> None:
    """Tell what changed of that on which the last bits of a step depend."""
    before = {_LAYOUT: str(ALONE.layout), **before}
    for name, now in surroundings(trainable).items():
        if before[name] != now:
            progress.note(f"{name} was {before[name]}, is now {now}: results will not be the same to the last bit")


def resume(checkpoints: RunCheckpoints, trainable: Trainable, progress: Progress, *, data: str) -> TrainingState:
    """Load the newest intact checkpoint, if there is any; damaged ones are skipped with a note."""
    saved = checkpoints.newest(progress)
    if saved is None:
        return TrainingState()
    try:
        state = _restore(saved, trainable, progress, data, checkpoints.world)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.folder / STATE}: is not from a training run: {error!r}") from error
    checkpoints.last = state.step
    progress.note(f"continues after step {state.step:,}")
    return state


def _restore(
    saved: SavedCheckpoint, trainable: Trainable, progress: Progress, data: str, world: World
) -> TrainingState:
    values = saved.values
    if values["data"] != data:
        raise ResumeError(f"{saved.folder}: was trained on other data; use that data again, or name a new folder")
    position = Position(*map(int, values["position"]))
    if len(position) != len(values["position"]) or min(position) < 0:
        raise ValueError(f"position {values['position']}")
    compare_surroundings(values["surroundings"], trainable, progress)
    model, precision = trainable.model, trainable.precision
    weights = {**dict(model.named_parameters()), **model.stored_buffers}
    tensors = saved.tensors(weights.items())
    for name, value in weights.items():
        fill(value, tensors, f"{MODEL}{name}")
    trainable.optimizers.load(_moments(tensors, trainable, world))
    scaler: dict[str, Any] = values["scaler"]
    if precision.scaler.is_enabled() and scaler:
        precision.scaler.load_state_dict(scaler)
    return TrainingState(saved.step, position, int(values["tokens"]), saved.loss)


def _moments(tensors: Tensors, trainable: Trainable, world: World) -> Parts:
    """The stored state of optimizers, divided as the parameters are; that of other processes' parameters left out."""
    parameters = trainable.optimizers.parameters
    elsewhere = {name for names in world.gather([*parameters]) for name in names} - parameters.keys()
    models = {}
    for key in tensors:
        name = key.removeprefix(PREFIX).rpartition(".")[0]
        if key.startswith(PREFIX) and name not in elsewhere:
            models[key] = parameters.get(name)
    return Parts(tensors, models)
