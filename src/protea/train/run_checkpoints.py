"""Checkpoints of a run: written while training continues, complete or absent, verified before use, and exported.

A checkpoint is a folder in PyTorch's distributed checkpoint format with a ``state.json``, which holds everything that
is not a tensor, the SHA-256 of the other files, and the SHA-256 of its own content. A thread writes it from copies in
main memory, under another name, and renames it when all of it is on disk. Protea's own reader reads it, which runs no
pickle.

Of many processes, each writes a file with its share of the tensors' parts, and the first one writes the rest. If one of
them fails, all drop the checkpoint. Whatever layout wrote a checkpoint, any other can read it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints.distcp import (
    METADATA,
    DistributedTensors,
    Piece,
    WrittenPiece,
    data_file,
    metadata,
    write_pieces,
)
from protea.errors import CheckpointError, ResumeError
from protea.output import sha256, sync_folder, write_durably
from protea.progress import SILENT, Progress
from protea.train.recipe import SaveSettings
from protea.train.shares import Part, all_do, own_share, part_of, reason_of
from protea.train.world import Gather, Value, World, local

CHECKPOINTS: Final = "checkpoints"
STATE: Final = "state.json"
MODEL: Final = "model."
"""The names of weights begin with this; those of moments with ``optimizer.``."""

_FORMAT: Final = "protea training state"
_VERSION: Final = 1
_NAME: Final = re.compile(r"step-\d+")
_REMOVED: Final = ".removed-"
_SEAL: Final = "sha256"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk, the validation loss if it was measured, and the content of ``state.json``."""

    folder: Path
    step: int
    loss: float | None
    values: dict[str, Any]

    def tensors(self, parameters: Iterable[tuple[str, Tensor]] = ()) -> DistributedTensors:
        """The tensors, mapped from the file; those of the given parameters must be there, in the same shapes."""
        tensors = DistributedTensors(self.folder)
        for name, value in parameters:
            key = f"{MODEL}{name}"
            if key not in tensors or tensors.shape(key) != tuple(value.shape):
                raise CheckpointError(f"{self.folder}: {key} is missing or has another shape than in the model")
        return tensors


def read_saved(folder: Path) -> SavedCheckpoint:
    """A checkpoint by its folder; of its files, only ``state.json`` is verified."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        step, loss, files = values["step"], values["validation_loss"], values["files"]
        if (values["format"], values["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another program or version wrote it")
        if values[_SEAL] != _seal(values):
            raise ValueError("its SHA-256 does not match its content")
        files_are_plain = all(isinstance(digest, str) and Path(name).name == name for name, digest in files.items())
        if step != step_of(folder) or not isinstance(loss, float | None) or not files_are_plain:
            raise ValueError("its step, its validation loss or its list of files cannot be right")
        return SavedCheckpoint(folder, step, loss, values)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error


def read_verified(folder: Path, share: int = 0, shares: int = 1, progress: Progress = SILENT) -> SavedCheckpoint:
    """A checkpoint by its folder, with all files compared with their hashes, or a share of them."""
    saved = read_saved(folder)
    for name, expected in [*saved.values["files"].items()][share::shares]:
        path = folder / name
        try:
            actual = sha256(path, progress)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if actual != expected:
            raise CheckpointError(f"{path}: is damaged: its SHA-256 is {actual[:16]}…, not {expected[:16]}…")
    return saved


def newest_intact(
    folder: Path, progress: Progress, world: World | None = None, gather: Gather | None = None
) -> SavedCheckpoint | None:
    """The newest checkpoint that is intact, if there is any; damaged ones are skipped with a note.

    Of many processes, each verifies some of the files, and all get the same checkpoint. ``gather`` waits for the
    slowest.
    """
    world = world or World()
    if world.is_first:
        for unfinished in folder.glob(".*"):  # half written or half removed by a killed process
            shutil.rmtree(unfinished, ignore_errors=True)
    folders = world.broadcast(step_folders(folder))
    for path in reversed(folders):
        try:
            with world.patience():
                return all_do(world, partial(read_verified, path, world.rank, world.size), gather)[world.rank]
        except CheckpointError as error:
            progress.note(f"{error}; skipped")
    if folders:
        raise ResumeError(f"{folder}: all checkpoints are damaged; remove the folder to start again")
    return None


class RunCheckpoints:
    """Writes the checkpoints of one run, and removes old ones.

    All processes of ``world`` call the same methods at the same steps.
    """

    def __init__(self, folder: Path, settings: SaveSettings, world: World | None = None) -> None:
        self.folder, self.settings, self.world = folder, settings, world or World()
        self.last: int | None = None  # step of the newest checkpoint begun or read; None after a failure
        self._retry = 0
        self._held: dict[str, Part] = {}  # what this process has of each tensor
        self._share: frozenset[str] = frozenset()  # the names of those that it writes
        self._copies: dict[str, Tensor] = {}
        self._written: list[list[WrittenPiece]] = [[] for _ in range(self.world.size)]
        self._metadata = b""
        self._gather = self.world.gather_apart()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def newest(self, progress: Progress) -> SavedCheckpoint | None:
        """See ``newest_intact``."""
        return newest_intact(self.folder, progress, self.world, self._gather)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after a step."""
        return step > 0 and step != self.last and (step % self.settings.every == 0 or step == self._retry)

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy everything, and write it while training continues; ``values`` must be what JSON can hold."""
        self.wait()
        held = {name: part_of(tensor) for name, tensor in tensors.items()}
        if self.world.any(held != self._held):
            self._held, self._share = held, own_share(self.world.gather(held), self.world.rank)
        self._copy({name: local(tensor) for name, tensor in tensors.items() if name in self._share})
        self.last = step
        plain = {"format": _FORMAT, "version": _VERSION, "step": step, **values}
        self._writing = self._thread.submit(self._write, step, plain)

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            with self.world.patience():
                self._writing.exception()

    def close(self) -> None:
        """Wait, and end the thread: it must not use connections that are about to be closed."""
        self.wait()
        self._thread.shutdown()

    def failure(self, step: int) -> str | None:
        """The reason why the last checkpoint was not written, given only once. It plans another one after ``step``."""
        if self._writing is None or self.world.any(not self._writing.done()):
            return None
        error, self._writing = self._writing.exception(), None
        reasons = self.world.gather(None if error is None else reason_of(error))
        if reason := next(filter(None, reasons), None):
            self.last, self._retry = None, step + max(1, self.settings.every // 10)
        return reason

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy to main memory that is reused each time, page-locked if the tensors are on a GPU."""
        pin = any(tensor.is_cuda for tensor in tensors.values())
        before, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            copy = before.get(name)
            if copy is None or copy.shape != tensor.shape:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            self._copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        if pin:
            torch.cuda.synchronize()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        target = self.folder / f"step-{step:09d}"
        unfinished = self.folder / f".{target.name}"
        try:
            self._all_do(lambda: self._begin(unfinished))
            written, files = self._write_parts(unfinished)
            self._all_do(lambda: self._finish(unfinished, target, written, {**values, "files": files}))
        except Exception:
            if self.world.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        keeps = range(self.world.size) if self.world.is_first else (self.world.rank,)
        self._written = [pieces if rank in keeps else [] for rank, pieces in enumerate(written)]

    def _all_do(self, work: Callable[[], Value]) -> list[Value]:
        return all_do(self.world, work, self._gather)

    def _begin(self, unfinished: Path) -> None:
        if self.world.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def _write_parts(self, folder: Path) -> tuple[list[list[WrittenPiece]], dict[str, str]]:
        """Write this process's file; what is in the files of all, by rank, and the SHA-256 of each file by its name."""

        def write() -> tuple[list[WrittenPiece] | None, str]:
            path = folder / data_file(self.world.rank)
            parts = {key: self._held[key] for key in self._copies}
            pieces = [Piece(key, part.shape, part.box, self._copies[key].detach) for key, part in parts.items()]
            written = write_pieces(path, pieces)
            # Places in files hardly ever change, and those of many processes are long lists: only changes are told.
            return None if written == self._written[self.world.rank] else written, sha256(path)

        results = self._all_do(write)
        written = [before if now is None else now for (now, _), before in zip(results, self._written, strict=True)]
        return written, {data_file(rank): digest for rank, (_, digest) in enumerate(results)}

    def _finish(
        self, unfinished: Path, target: Path, written: list[list[WrittenPiece]], values: dict[str, Any]
    ) -> None:
        if not self.world.is_first:
            return
        if written != self._written:
            self._metadata = metadata({data_file(rank): pieces for rank, pieces in enumerate(written)})
        write_durably(unfinished / METADATA, self._metadata)
        values["files"][METADATA] = sha256(unfinished / METADATA)
        values[_SEAL] = _seal(values)
        write_durably(unfinished / STATE, json.dumps(values, indent=1, sort_keys=True) + "\n")
        sync_folder(unfinished)
        if target.exists():
            _remove(target)
        unfinished.rename(target)
        sync_folder(self.folder)
        self._remove_old(values["step"])

    def _remove_old(self, newest: int) -> None:
        folders, settings = step_folders(self.folder), self.settings
        # Checkpoints of later steps are damaged, or the run would have continued from them.
        valid = [path for path in folders if step_of(path) <= newest]
        kept = set(valid[-settings.newest :])
        if settings.keep_every is not None:
            kept |= {path for path in valid if step_of(path) % settings.keep_every == 0}
        losses = []
        for path in valid:
            with suppress(CheckpointError):
                losses.append((read_saved(path).loss, path))
        best = sorted(pair for pair in losses if pair[0] is not None)[: settings.best]
        kept |= {path for _, path in best}
        for path in folders:
            if path not in kept:
                _remove(path)


def step_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by step."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def choose(run: Path, which: str, progress: Progress = SILENT) -> SavedCheckpoint:
    """One checkpoint of a run, verified: ``newest``, ``best`` by validation loss, or a step."""
    folders = {str(step_of(folder)): folder for folder in run_folders(run)}
    if which == "newest":
        which = [*folders][-1]
    elif which == "best":
        losses = [(loss, folder) for folder in folders.values() if (loss := read_saved(folder).loss) is not None]
        if not losses:
            raise ResumeError(f"{run}: no checkpoint has a validation loss; use newest, or name a step")
        which = str(step_of(min(losses)[1]))
    elif which not in folders:
        raise ResumeError(f"{run}: has no checkpoint {which!r}; use newest, best, or a step: {', '.join(folders)}")
    return read_verified(folders[which], progress=progress)


def run_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by step; ``ResumeError`` if there is none."""
    folders = step_folders(run / CHECKPOINTS)
    if not folders:
        raise ResumeError(f"{run}: there is no checkpoint of a training run in {run / CHECKPOINTS}")
    return folders


def _seal(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Hide the folder first, so that a folder that can be seen is complete."""
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
