"""Checkpoints of a run: written beside the training, complete or not there at all, and checked before they are used.

A checkpoint is a folder of PyTorch's distributed checkpoint format plus ``state.json``, which holds everything that is
no tensor, the SHA-256 of the other files, and that of itself without it. It is written under another name by a thread
of its own, from copies in main memory, and renamed when all of it is on the disk. Reading goes through Protea's own
reader, which runs no pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints.distcp import DistributedTensors
from protea.disk import sha256, sync_folder, write_durably
from protea.errors import CheckpointError, ResumeError
from protea.train.recipe import Save

STATE: Final = "state.json"
_FORMAT: Final = "protea training state"
_VERSION: Final = 1
_NAME: Final = re.compile(r"step-(\d+)")
_UNFINISHED: Final = "."
_REMOVED: Final = ".removed-"
_SEAL: Final = "sha256"


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk.

    Attributes:
        folder: where.
        step: after which it was taken.
        values: what ``state.json`` holds.
    """

    folder: Path
    step: int
    values: dict[str, Any]

    @property
    def loss(self) -> float | None:
        """The validation loss at that step, if it was measured then."""
        loss: float | None = self.values["validation_loss"]
        return loss

    def tensors(self) -> DistributedTensors:
        """What it holds, mapped.

        Raises:
            CheckpointError: it is damaged or hostile.
        """
        return DistributedTensors(self.folder)

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            CheckpointError: one is missing or differs.
        """
        for name, known in self.values["files"].items():
            try:
                found = sha256(self.folder / name)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name}: cannot be read: {error.strerror}") from error
            if found != known:
                raise CheckpointError(f"{self.folder / name}: SHA-256 {found[:16]}…, not {known[:16]}… as was written")


def read_saved(folder: Path) -> Saved:
    """A checkpoint by its folder.

    Raises:
        CheckpointError: there is none, or its ``state.json`` is damaged.
    """
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT or values["version"] != _VERSION:
            raise ValueError("of another program or version")
        if not all(isinstance(one, str) for pair in values["files"].items() for one in pair):
            raise ValueError("no list of files")
        if any(Path(name).name != name for name in values["files"]):
            raise ValueError("a file outside the folder")
        loss = values["validation_loss"]
        if not (loss is None or isinstance(loss, float)):
            raise ValueError("no loss")
        if values["step"] != step_of(folder):
            raise ValueError(f"of step {values['step']}, not of its folder's")
        if values[_SEAL] != _seal(values):
            raise ValueError("SHA-256 of what it holds is not as was written")
        return Saved(folder, step_of(folder), values)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where; made when the first is saved.
        keep: which stay.

    Attributes:
        last: the step of the newest that was begun or read; none after a failure.
    """

    def __init__(self, folder: Path, keep: Save) -> None:
        self.folder, self.keep = folder, keep
        self.last: int | None = None
        self._again = 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def folders(self) -> list[Path]:
        """All complete ones by step, the oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)

    def clear_unfinished(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"{_UNFINISHED}*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Iterator[Saved | CheckpointError]:
        """From the newest on: each checkpoint that is intact, or what is wrong with it."""
        for folder in reversed(self.folders()):
            try:
                saved = read_saved(folder)
                saved.verify()
                yield saved
            except CheckpointError as error:
                yield error

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy everything, and have it written while training goes on.

        Waits for the one before, whose failure ``failed`` tells.

        Args:
            step: after which this is.
            tensors: by name.
            values: what JSON can hold; ``validation_loss`` among it.
        """
        self.wait()
        self._copy(tensors)
        self.last = step
        plain = {"format": _FORMAT, "version": _VERSION, "step": step, **values}
        self._thread = threading.Thread(target=self._write, args=(step, plain), name="checkpoint")
        self._thread.start()

    def due(self, step: int) -> bool:
        """Whether one is to be saved after a step; not twice."""
        return step > 0 and step != self.last and (step % self.keep.every == 0 or step == self._again)

    def try_again(self, step: int) -> int:
        """The step at which to try once more, after one that could not be written."""
        self._again = step + max(1, self.keep.every // 10)
        return self._again

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self) -> str | None:
        """Why the last one could not be written, told once; nothing while it is still being written."""
        if self._thread is not None and self._thread.is_alive():
            return None
        failure, self._failure = self._failure, None
        if failure is not None:
            self.last = None
        return None if failure is None else _reason(failure)

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Into memory that stays ours, page-locked where that makes it fast."""
        pin = any(each.is_cuda for each in tensors.values())
        self._copies = {
            name: known
            if (known := self._copies.get(name)) is not None and known.shape == each.shape and known.dtype == each.dtype
            else torch.empty(each.shape, dtype=each.dtype, pin_memory=pin)
            for name, each in tensors.items()
        }
        for name, each in tensors.items():
            self._copies[name].copy_(each.detach(), non_blocking=True)
        if pin:
            torch.cuda.synchronize()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        # That this is a single process is what no_dist says.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        target = self.folder / f"step-{step:09d}"
        unfinished = self.folder / f"{_UNFINISHED}{target.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save(self._copies, storage_writer=FileSystemWriter(unfinished), no_dist=True)
            values["files"] = {path.name: sha256(path) for path in sorted(unfinished.iterdir())}
            values = json.loads(json.dumps(values))
            values[_SEAL] = _seal(values)
            write_durably(unfinished / STATE, json.dumps(values, indent=1, sort_keys=True) + "\n")
            sync_folder(unfinished)
            if target.exists():
                _remove(target)
            unfinished.rename(target)
            sync_folder(self.folder)
            self._remove_old(step)
        except BaseException as error:  # what PyTorch's writer raises is no Exception
            self._failure = error
            shutil.rmtree(unfinished, ignore_errors=True)

    def _remove_old(self, newest: int) -> None:
        # What is of a later step was damaged, or the run would not be at this one.
        folders = [path for path in self.folders() if step_of(path) <= newest]
        kept = set(folders[-self.keep.newest :])
        if self.keep.keep_every is not None:
            kept |= {path for path in folders if step_of(path) % self.keep.keep_every == 0}
        if self.keep.best:
            losses = [(loss, path) for path in folders if (loss := _loss(path)) is not None]
            kept |= {path for _, path in sorted(losses)[: self.keep.best]}
        for path in self.folders():
            if path not in kept:
                _remove(path)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    found = _NAME.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder.name} is no name of a checkpoint")
    return int(found[1])


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def newest_saved(run: Path, count: int) -> list[Saved]:
    """So many of a run's newest checkpoints, or all where there are fewer, the oldest first; verified.

    Raises:
        ResumeError: there is none.
        CheckpointError: one is damaged.
    """
    found = [read_saved(folder) for folder in _folders(run)[-count:]]
    for each in found:
        each.verify()
    return found


def choose(run: Path, which: str) -> Saved:
    """One checkpoint of a run; what else is damaged does not matter, unless it could be the best.

    Args:
        run: its folder.
        which: ``newest``, ``best`` by validation loss, or a step.

    Raises:
        ResumeError: there is none of that kind.
        CheckpointError: it is damaged.
    """
    folders = {step_of(folder): folder for folder in _folders(run)}
    if which == "newest":
        chosen = read_saved(folders[max(folders)])
    elif which == "best":
        saved = [read_saved(folder) for folder in folders.values()]
        losses = [(each.loss, each.step) for each in saved if each.loss is not None]
        if not losses:
            raise ResumeError(f"{run}: no checkpoint has a validation loss; name a step, or newest")
        chosen = read_saved(folders[min(losses)[1]])
    elif which.isdecimal() and int(which) in folders:
        chosen = read_saved(folders[int(which)])
    else:
        raise ResumeError(
            f"{run}: no checkpoint {which!r}; use newest, best, or a step: {', '.join(map(str, folders))}"
        )
    chosen.verify()
    return chosen


def _folders(run: Path) -> list[Path]:
    folders = Checkpoints(checkpoint_folder(run), Save()).folders()
    if not folders:
        raise ResumeError(f"{run}: no checkpoint of a training run in {checkpoint_folder(run)}")
    return folders


def _loss(folder: Path) -> float | None:
    try:
        return read_saved(folder).loss
    except CheckpointError:
        return None


def _reason(failure: BaseException) -> str:
    """The operating system's words where they are within what PyTorch's writer raises."""
    inner = getattr(failure, "failures", None)
    if isinstance(inner, Mapping):
        for wrapped in inner.values():
            failure = wrapped[0] if isinstance(wrapped, tuple) else wrapped
            break
    if isinstance(failure, OSError):
        return failure.strerror or str(failure)
    return " ".join(str(failure).split()) or type(failure).__name__


def _seal(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """First out of sight, so that what is listed is whole."""
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
