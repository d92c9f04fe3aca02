"""A file that returns to its last commit after a kill in the middle of a write.

HDF5 changes index blocks in place. Before a write replaces bytes of the last commit, this file saves them in an undo
file, as databases do. To return to the commit, it writes the saved bytes back and cuts off what was added. The file
``undo-N`` belongs to commit number N; an undo file of another number is out of date.
"""

from __future__ import annotations

import errno
import io
import os
import struct
from pathlib import Path
from typing import Any, Final

_HEADER: Final = struct.Struct("<QQ")  # place and number of the saved bytes that follow


class RollbackFile(io.FileIO):
    """An unbuffered file for reading and writing, with commits; the undo files are beside it.

    HDF5 crashes if a write fails inside it. So this file keeps the failure, which ``check`` raises, and ignores all
    later writes.

    It opens at the ``commit`` with this number and size; ``None`` starts an empty file. ``number`` is that of the last
    commit. With ``deaf`` it ignores further writes, so that HDF5, which flushes when it closes, can close.
    """

    def __init__(self, path: Path, commit: tuple[int, int] | None) -> None:
        super().__init__(path, "w+b" if commit is None else "r+b")
        self._folder = path.parent
        self.number, self._committed = commit or (0, 0)
        self.deaf = False
        self._failure: OSError | None = None
        if commit is not None:
            self._undo_all()
            super().truncate(self._committed)
        self._undo = self._undo_path().open("wb", buffering=0)

    def write(self, data: Any) -> int:
        """Write, after saving the bytes of the last commit."""
        view = memoryview(data).cast("B")
        start = self.tell()
        if self.deaf:
            return self.seek(start + len(view)) - start
        try:
            if start < self._committed:
                self._save(start, min(len(view), self._committed - start))
                self.seek(start)
            done = 0
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self._failure, self.deaf = error, True
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Truncate, after saving the bytes of the last commit."""
        size = self.tell() if size is None else size
        if self.deaf:
            return size
        try:
            if size < self._committed:
                self._save(size, self._committed - size)
            return super().truncate(size)
        except OSError as error:
            self._failure, self.deaf = error, True
            return size

    def check(self) -> None:
        """Raise the failure of an earlier write, for example on a full disk."""
        if self._failure is not None:
            raise self._failure

    def commit(self) -> tuple[int, int]:
        """Make the present contents the state to return to, once the caller has stored its number and size."""
        os.fsync(self.fileno())
        self.number, self._committed = self.number + 1, os.fstat(self.fileno()).st_size
        self._undo.close()
        self._undo = self._undo_path().open("wb", buffering=0)
        return self.number, self._committed

    def forget_older(self) -> None:
        """Remove the undo files of earlier commits, once the caller has stored the last one."""
        for path in self._folder.glob("undo-*"):
            if path != self._undo_path():
                path.unlink()

    def close(self) -> None:
        """Close without committing."""
        if hasattr(self, "_undo"):  # missing if opening failed
            self._undo.close()
        super().close()

    def _undo_path(self) -> Path:
        return self._folder / f"undo-{self.number}"

    def _save(self, start: int, size: int) -> None:
        old = b""
        while part := os.pread(self.fileno(), size - len(old), start + len(old)):
            old += part
        record = _HEADER.pack(start, len(old)) + old
        if self._undo.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _undo_all(self) -> None:
        """Write the saved bytes back, newest first, because a later record may cover an earlier one."""
        data = self._undo_path().read_bytes() if self._undo_path().exists() else b""
        records: list[tuple[int, bytes]] = []
        place = 0
        while place + _HEADER.size <= len(data):
            start, size = _HEADER.unpack_from(data, place)
            place += _HEADER.size + size
            if place > len(data):
                break  # killed while saving; the file still holds the old bytes
            records.append((start, data[place - size : place]))
        for start, old in reversed(records):
            self.seek(start)
            super().write(old)
