"""Stretches of files read in place: a whole file, a member of an archive, the bytes of a tensor."""

from __future__ import annotations

import io
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from protea.errors import CheckpointError

# Private, so that writing to tensors does not reach the file; and without a claim on memory for all of it, which
# Linux refuses for files larger than the machine's. Python has the constant since 3.13.
_MAP: Final = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE

_MAX_READ: Final = 32 << 20
_MAX_LINE: Final = 4096

_ALIGNMENT: Final = 16
"""Bytes that kernels expect tensors to be aligned to; ones that are not are copied."""


@dataclass(frozen=True)
class Region:
    """A stretch of a memory-mapped file: a whole file, a member of an archive, a tensor's bytes.

    Attributes:
        path: the file.
        name: what messages call the stretch.
        start: its first byte within the file.
        size: its length in bytes.
    """

    path: Path
    name: str
    start: int
    size: int
    _data: mmap.mmap | bytes

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """A whole file, mapped so that nothing written to tensors reaches it.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                data = mmap.mmap(stream.fileno(), 0, flags=_MAP, prot=_PROTECTION) if size else b""
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path}: cannot be read: {reason}; check the file and its permissions") from error
        return cls(path, str(path), 0, size, data)

    def part(self, start: int, size: int, name: str | None = None) -> Region:
        """A stretch within this one.

        Raises:
            CheckpointError: it does not lie within.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise CheckpointError(
                f"{name or self.name}: truncated or damaged: bytes {start} to {start + size} of {self.size}; fetch it "
                "again"
            )
        return Region(self.path, name or self.name, self.start + start, size, self._data)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """A copy of the bytes from ``start``, to the end or ``size`` of them if there are as many."""
        end = self.size if size is None else min(self.size, start + size)
        return bytes(self._data[self.start + start : self.start + end])

    def stream(self) -> RegionStream:
        """The bytes as a file, for libraries that read files."""
        return RegionStream(self)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The bytes as a vector, mapped, not copied, where their place in the file allows it."""
        count = self.size // dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        mapped = torch.frombuffer(self._data, dtype=dtype, count=count, offset=self.start)
        return mapped.clone() if self.start % _ALIGNMENT else mapped


class RegionStream(io.RawIOBase):
    """A region as a file; asked for more bytes than there are, it reserves no memory for them.

    Raises:
        ValueError: asked for more at once than headers, names and pickles have; files with holes have any size.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The next byte's place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._region.size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """As many bytes as there are, up to ``size``."""
        left = max(0, self._region.size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_READ:
            raise ValueError(f"{size:,} bytes where a header or a name is expected")
        data = self._region.read(self._at, size)
        self._at += len(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line; longer ones, which would be read byte by byte, in parts."""
        return super().readline(_MAX_LINE if size is None or size < 0 else min(size, _MAX_LINE))

    def readinto(self, buffer: Any) -> int:
        """The same into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
