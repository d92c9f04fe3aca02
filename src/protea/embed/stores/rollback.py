"""A file that returns to its last commit after a kill in the middle of a write.

HDF5 changes index blocks in place. Before a write replaces bytes of the last commit, this file saves them in an undo
file, as databases do. To return to the commit, it writes the saved bytes back and cuts off what was added. The file
``undo-N`` belongs to commit number N; an undo file of another number is out of date.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any, Final

_HEADER: Final = struct.Struct("<QQ")


class RollbackFile(io.RawIOBase):
    """A binary file for reading and writing at any place, with commits.

    HDF5 crashes if a write fails inside it. So this file keeps the failure, which ``check`` raises, and ignores all
    later writes.

    Args:
        path: of the file; the undo files are beside it.
        commit: number and size of the commit to return to; ``None`` starts an empty file.

    Attributes:
        number: of the last commit.
        deaf: ignore further writes, so that HDF5, which flushes when it closes, can close.
    """

    def __init__(self, path: Path, commit: tuple[int, int] | None) -> None:
        self._path = path
        self.number, self._committed = commit or (0, 0)
        self.deaf = False
        self._failure: OSError | None = None
        if commit is None:
            path.write_bytes(b"")
        self._file: io.FileIO = path.open("r+b", buffering=0)
        if commit is not None:
            self._undo_all()
            self._file.truncate(self._committed)
        self._undo = self._fresh_undo()

    def readable(self) -> bool:
        """Yes."""
        return True

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes."""
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def write(self, data: Any) -> int:
        """Write, after saving the bytes of the last commit."""
        view = memoryview(data).cast("B")
        start = self._file.tell()
        if self.deaf:
            return self._file.seek(start + len(view)) - start
        try:
            if start < self._committed:
                self._save(start, min(len(view), self._committed - start))
                self._file.seek(start)
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self._failure, self.deaf = error, True
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Truncate, after saving the bytes of the last commit."""
        size = self._file.tell() if size is None else size
        if self.deaf:
            return size
        try:
            if size < self._committed:
                self._save(size, self._committed - size)
            return self._file.truncate(size)
        except OSError as error:
            self._failure, self.deaf = error, True
            return size

    def check(self) -> None:
        """Raise the failure of an earlier write.

        Raises:
            OSError: a write failed, for example on a full disk.
        """
        if self._failure is not None:
            raise self._failure

    def commit(self) -> tuple[int, int]:
        """Make the present contents the state to return to, once the caller has stored the result.

        Returns:
            Number and size of the commit.
        """
        os.fsync(self._file.fileno())
        self.number, self._committed = self.number + 1, os.fstat(self._file.fileno()).st_size
        self._undo.close()
        self._undo = self._fresh_undo()
        return self.number, self._committed

    def forget_older(self) -> None:
        """Remove the undo files of earlier commits, once the caller has stored the last one."""
        for path in self._path.parent.glob("undo-*"):
            if path.name != f"undo-{self.number}":
                path.unlink()

    def close(self) -> None:
        """Close without committing."""
        if not self.closed:
            self._undo.close()
            self._file.close()
        super().close()

    def _fresh_undo(self) -> io.FileIO:
        return (self._path.parent / f"undo-{self.number}").open("wb", buffering=0)

    def _save(self, start: int, size: int) -> None:
        self._file.seek(start)
        old = b""
        while len(old) < size:
            part = self._file.read(size - len(old))
            if not part:
                break
            old += part
        record = _HEADER.pack(start, len(old)) + old
        if self._undo.write(record) != len(record):
            raise OSError(28, "No space left on device")

    def _undo_all(self) -> None:
        """Write the saved bytes back, newest first, because a later record may cover an earlier one."""
        path = self._path.parent / f"undo-{self.number}"
        if not path.exists():
            return
        data = path.read_bytes()
        records: list[tuple[int, bytes]] = []
        place = 0
        while place + _HEADER.size <= len(data):
            start, size = _HEADER.unpack_from(data, place)
            place += _HEADER.size
            if place + size > len(data):
                break  # killed while saving; the file still holds the old bytes
            records.append((start, data[place : place + size]))
            place += size
        for start, old in reversed(records):
            self._file.seek(start)
            self._file.write(old)
