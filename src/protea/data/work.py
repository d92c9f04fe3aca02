"""How a store is built: in stages, each in a folder of its own, so that the same command goes on after any kill.

Beside the output ``DIR`` lies ``.DIR.partial`` until it is complete. Its journal holds the plan (all settings, and the
size and time of every input) and the numbers of every finished stage. A stage that was broken off is done again from
its beginning; since stages depend on nothing but the plan and each other, the outcome is the same, byte for byte.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from protea.data.manifest import is_store
from protea.errors import OutputError, ResumeError

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
        plan: everything that the outcome depends on.
        watcher: told of progress.
        overwrite: replace a store that is there, and forget an unfinished run with another plan.

    Raises:
        OutputError: the output exists, or has no place to be.
        ResumeError: another run is at work on it, or an unfinished run had another plan.
    """

    def __init__(self, output: Path, plan: Mapping[str, Any], watcher: Watcher, *, overwrite: bool = False) -> None:
        _check_place(output, overwrite=overwrite)
        self.output, self.watcher = output, watcher
        self.folder = output.with_name(f".{output.name}.partial")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ResumeError(f"{output}: another run is making it; wait for that one, or name another") from error
        self._plan = json.loads(json.dumps(plan))
        self._done: dict[str, Numbers] = {}
        try:
            self._resume(overwrite=overwrite)
        except BaseException:
            self._lock.close()
            raise

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

    def stage(self, name: str, make: Callable[[Path], Numbers]) -> Numbers:
        """The numbers of a stage: noted ones if it was finished before, else those of doing it now in its folder."""
        if name not in self._done:
            folder = self.folder / name
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
            numbers = make(folder)
            _sync(folder)
            self._done[name] = json.loads(json.dumps(numbers))
            self._commit()
        return self._done[name]

    def discard(self, *names: str) -> None:
        """Free the space of stages whose files are not needed any more."""
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def finish(self) -> None:
        """Give the store the output's name and clear the work away."""
        if self.output.exists():
            old = self.folder / "replaced"
            self.output.rename(old)
        (self.folder / STORE).rename(self.output)
        _sync_folder(self.output.parent)
        self._done.clear()

    def _resume(self, *, overwrite: bool) -> None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return
        try:
            journal = json.loads(path.read_text())
            if journal["format"] != _FORMAT:
                raise ValueError(f"format {journal['format']}")
            plan, done = dict(journal["plan"]), dict(journal["done"])
        except (ValueError, KeyError, TypeError) as error:
            if not overwrite:
                raise ResumeError(
                    f"{self.output}: the journal of an unfinished run, {path}, cannot be read ({error}); "
                    "pass --overwrite to start anew"
                ) from error
            plan, done = {}, {}
        if STORE in done and not (self.folder / STORE).exists():
            path.unlink()  # it was moved into place, and only clearing away was left
        elif plan == self._plan:
            self._done = done
            self.watcher.note(f"going on with an unfinished run: {', '.join(done)} done before")
        elif overwrite:
            path.unlink()
        else:
            changed = "; ".join(
                f"{name} {_shown(plan.get(name))} -> {_shown(self._plan.get(name))}"
                for name in {**plan, **self._plan}
                if plan.get(name) != self._plan.get(name)
            )
            raise ResumeError(
                f"{self.output}: an unfinished run had other settings or input ({changed}); use those again, "
                "or pass --overwrite to start anew"
            )

    def _commit(self) -> None:
        path = self.folder / _JOURNAL
        temporary = path.with_suffix(".new")
        with temporary.open("w") as stream:
            json.dump({"format": _FORMAT, "plan": self._plan, "done": self._done}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)


def fingerprints(paths: Iterable[str | Path | None]) -> list[Any]:
    """Size and time of each input, by which a resumed run knows that they are the same."""
    prints: list[Any] = []
    for path in paths:
        if path is None or not os.path.isfile(path):
            prints.append(None)  # standard input, or missing, which reading says better
        else:
            status = os.stat(path)  # noqa: PTH116  of str and Path alike
            prints.append([status.st_size, status.st_mtime_ns])
    return prints


def residues_in(paths: Iterable[str | Path | None]) -> int:
    """About how many bytes of sequences some files hold, none left out; 0 for what cannot be known."""
    total = 0.0
    for path in paths:
        if path is not None and os.path.isfile(path):
            size = os.path.getsize(path)  # noqa: PTH202
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


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
