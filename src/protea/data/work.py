"""The stages of a build. A build that is killed continues after its last finished stage.

The work folder's journal holds the numbers of every finished stage and a key: a hash of its settings, the size and
time of its inputs, and the key of the stage before. A stage whose key changed is done again, and so are all after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

from protea.data.manifest import is_store
from protea.errors import ResumeError
from protea.fasta import flows
from protea.journal import WorkFolder
from protea.output import check_output, sync_folder
from protea.progress import Progress

Numbers = dict[str, Any]
"""The results of a stage, as JSON can hold them."""

STORE: Final = "store"
"""The last stage. Its folder becomes the output."""

_FORMAT: Final = 2
_COMPRESSION: Final = 2.5
"""Upper bound of residues in a byte of a compressed file; measured: 1.8 for zstd, 2.0 for gzip."""


class Work:
    """The stages of one store, in its locked work folder."""

    def __init__(self, output: Path, progress: Progress, *, overwrite: bool = False) -> None:
        check_output(output, overwrite=overwrite, ours=is_store)
        self.output, self._progress = output, progress
        self._work = WorkFolder(output)
        self.folder = self._work.path
        self._key = ""
        self._done: dict[str, Numbers] = {}
        with suppress(ResumeError):  # without a readable journal, all stages are done again
            stages = (self._work.read() or {}).get("done", {})
            self._done = {name: entry for name, entry in stages.items() if (self.folder / name).is_dir()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock; remove a folder without finished stages."""
        if not self._done:
            self._work.remove()
        self._work.__exit__(*exception)

    @property
    def begun(self) -> bool:
        """Whether any stage is finished."""
        return bool(self._done)

    def stage(self, name: str, make: Callable[[Path], Numbers], given: Any = None) -> Numbers:
        """Do a stage, unless it is finished; return its numbers.

        Args:
            name: of the stage and of its folder.
            make: does the work in that folder.
            given: what the stage depends on besides the stages before it, as JSON can hold it.
        """
        entry = json.dumps([_FORMAT, self._key, name, given], sort_keys=True)
        self._key = hashlib.sha256(entry.encode()).hexdigest()
        known = self._done.get(name)
        if known is not None and known["key"] == self._key:
            self._progress.note(f"{name}: done before")
            return dict(known["numbers"])
        folder = self.folder / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        numbers = make(folder)
        _sync(folder)
        self._done[name] = {"key": self._key, "numbers": json.loads(json.dumps(numbers))}
        self._work.commit({"done": self._done})
        return dict(self._done[name]["numbers"])

    def finish(self) -> None:
        """Move the store to the output and forget the stages."""
        if self.output.exists():
            old = self.folder / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        (self.folder / STORE).rename(self.output)
        sync_folder(self.output.parent)
        self._done.clear()


def fingerprints(paths: Iterable[str | Path]) -> list[Any]:
    """Name, size and time of each input, by which a continued build recognises it."""
    prints: list[Any] = []
    for path in paths:
        if flows(str(path)) or not os.path.isfile(path):
            prints.append(uuid4().hex)  # a pipe can be read once; a missing file fails when it is read
        else:
            status = os.stat(path)  # noqa: PTH116  str or Path
            prints.append([Path(path).name, status.st_size, status.st_mtime_ns])
    return prints


def input_bytes(paths: Iterable[str | Path]) -> int:
    """Estimate of the bytes of sequences in some files; 0 for pipes and missing files."""
    total = 0.0
    for path in paths:
        if os.path.isfile(path):
            size = os.path.getsize(path)  # noqa: PTH202  str or Path
            total += size * (_COMPRESSION if str(path).endswith((".gz", ".bz2", ".xz", ".zst")) else 1)
    return int(total)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)
