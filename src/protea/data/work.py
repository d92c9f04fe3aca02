"""How a store is built: in stages, each in a folder of its own, so that the same command goes on after any kill.

Beside the output ``DIR`` lies ``.DIR.partial`` until it is complete. Its journal holds the numbers of every finished
stage, and a hash of all that went into it: its own settings, the size and time of its inputs, and the stages before. A
stage that was broken off, or that something changed for, is done again from its beginning; others are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

from protea.data.manifest import is_store
from protea.disk import lock, sync_folder, write_durably
from protea.errors import OutputError, ResumeError
from protea.fasta import flows

Numbers = dict[str, Any]
"""What a stage reports: what JSON can hold."""

STORE: Final = "store"
"""The last stage: the folder that becomes the output."""

_JOURNAL: Final = "journal.json"
_LOCK: Final = "lock"
_FORMAT: Final = 1
_PACKED: Final = 2.5
"""Residues in a byte of a compressed file, at most, from experience: 1.8 for zstd, 2.0 for gzip."""


class Watcher:
    """Is told how a run goes; this one takes no notice."""

    def begin(self, what: str, total: int | None = None) -> None:
        """A stage has begun, of so many units if that is known."""

    def advance(self, amount: int) -> None:
        """So many units of it are done."""

    def note(self, message: str) -> None:
        """Something the user should know."""


class Work:
    """The work folder of one output, locked against other runs.

    Args:
        output: the folder to make.
        watcher: told of progress.
        overwrite: replace a store that is there.

    Raises:
        OutputError: the output exists, or has no place to be.
        ResumeError: another run is at work on it.
    """

    def __init__(self, output: Path, watcher: Watcher, *, overwrite: bool = False) -> None:
        _check_place(output, overwrite=overwrite)
        self.output, self.watcher = output, watcher
        self.folder = output.with_name(f".{output.name}.partial")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = lock(self.folder / _LOCK)
        except BlockingIOError as error:
            raise ResumeError(f"{output}: another run is making it; wait for that one, or name another") from error
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
        self._done = self._journal()
        self._chain = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock; a folder in which nothing was finished is removed, a finished one too."""
        if not self._done:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @property
    def begun(self) -> bool:
        """Whether a stage was finished before."""
        return bool(self._done)

    def stage(self, name: str, make: Callable[[Path], Numbers], given: Any = None) -> Numbers:
        """The numbers of a stage: noted ones if it was finished before, else those of doing it now in its folder.

        Args:
            name: of the stage and its folder.
            make: does it.
            given: what it depends on besides the stages before; what JSON can hold.
        """
        entry = json.dumps([_FORMAT, self._chain, name, given], sort_keys=True)
        self._chain = hashlib.sha256(entry.encode()).hexdigest()
        known = self._done.get(name)
        if known is not None and known["key"] == self._chain:
            self.watcher.note(f"{name}: done before")
            return dict(known["numbers"])
        folder = self.folder / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        numbers = make(folder)
        _sync(folder)
        self._done[name] = {"key": self._chain, "numbers": json.loads(json.dumps(numbers))}
        self._commit()
        return dict(self._done[name]["numbers"])

    def finish(self) -> None:
        """Give the store the output's name and clear the work away."""
        if self.output.exists():
            old = self.folder / "replaced"
            self.output.rename(old)
        (self.folder / STORE).rename(self.output)
        sync_folder(self.output.parent)
        self._done.clear()

    def _journal(self) -> dict[str, Numbers]:
        """What was finished before; a journal that cannot be read is of nothing."""
        try:
            done = dict(json.loads((self.folder / _JOURNAL).read_text())["done"])
            if all({"key", "numbers"} <= set(entry) for entry in done.values()):
                return {name: entry for name, entry in done.items() if (self.folder / name).is_dir()}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {}

    def _commit(self) -> None:
        write_durably(self.folder / _JOURNAL, json.dumps({"done": self._done}))


def fingerprints(paths: Iterable[str | Path | None]) -> list[Any]:
    """Name, size and time of each input, by which a resumed run knows that they are the same."""
    prints: list[Any] = []
    for path in paths:
        if path is None:
            prints.append(None)
        elif flows(str(path)) or not os.path.isfile(path):
            prints.append(uuid4().hex)  # gone once read, or missing, which reading says better
        else:
            status = os.stat(path)  # noqa: PTH116  of str and Path alike
            prints.append([Path(path).name, status.st_size, status.st_mtime_ns])
    return prints


def residues_in(paths: Iterable[str | Path | None]) -> int:
    """About how many bytes of sequences some files hold, none left out; 0 for what cannot be known."""
    total = 0.0
    for path in paths:
        if path is not None and os.path.isfile(path):
            size = os.path.getsize(path)  # noqa: PTH202  of str and Path alike
            total += size * (_PACKED if str(path).endswith((".gz", ".bz2", ".xz", ".zst")) else 1)
    return int(total)


def check_space(output: Path, needed: int) -> None:
    """Compare an estimate of the space that a run takes with what is free.

    Raises:
        OutputError: it will not fit.
    """
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise OutputError(
            f"{output}: building it takes about {_size(needed)} of disk, {_size(free)} are free; free some, or name a "
            "folder on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _check_place(output: Path, *, overwrite: bool) -> None:
    if not output.name or output.name == "..":
        raise OutputError(f"{output}: name a new folder")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}; create it first")
    if not output.exists() and not output.is_symlink():
        return
    if not is_store(output):
        # Whatever else is there is not ours to remove, --overwrite or not.
        raise OutputError(f"{output}: exists and is no store of training data; name another folder")
    if not overwrite:
        raise OutputError(f"{output}: exists already; choose another name or pass --overwrite")


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)
