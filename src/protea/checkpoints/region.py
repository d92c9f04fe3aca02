"""Parts of memory-mapped files: complete files, members of tar archives, the bytes of tensors. Nothing is unpacked."""

from __future__ import annotations

import io
import mmap
import os
import re
import stat
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Self

import torch
from torch import Tensor

from protea.errors import CheckpointError

# Private, so that writing to tensors does not change the file. Without reserved memory, because Linux refuses to
# reserve it for files larger than the machine's. Python has the constant since 3.13.
_MAP: Final = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE

_MAX_READ: Final = 32 << 20
_MAX_LINE: Final = 4096
_MAX_HEADERS: Final = 100

_MISTAKES: Final = {
    re.compile(rb"\Z"): "is empty: the download or the copy failed; fetch it again",
    re.compile(rb"version https://git-lfs"): "is a pointer of Git LFS in place of the file; fetch the file with "
    "`git lfs install` and `git lfs pull` in the folder that was cloned",
    re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|error)", re.IGNORECASE): "is a web page, saved in place of "
    "the file: the server answered with an error or a login; open its address in a browser, and fetch the file again",
}
"""How files begin that no checkpoint consists of, and what they are."""

_ALIGNMENT: Final = 16
"""Kernels expect tensors at multiples of this many bytes; a tensor elsewhere is copied."""


def damaged(where: str | Path, reason: object) -> CheckpointError:
    """The error for a damaged file."""
    return CheckpointError(f"{where}: truncated or damaged: {reason}; fetch it again")


def hostile(where: str | Path, reason: str) -> CheckpointError:
    """The error for a file with content that no checkpoint needs."""
    return CheckpointError(f"{where}: {reason}; this file may be hostile and was not loaded")


def aligned(mapped: Tensor) -> Tensor:
    """A tensor where its place in the file allows computing with it, else a copy."""
    return mapped.clone() if mapped.data_ptr() % _ALIGNMENT else mapped


@dataclass(frozen=True)
class Region:
    """A part of a memory-mapped file: its place in the file, and its name in messages."""

    path: Path
    name: str
    start: int
    size: int
    _data: mmap.mmap | bytes

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """A complete file."""
        try:
            if stat.S_ISFIFO(path.stat().st_mode):
                raise ValueError("it is a pipe, not a file")  # opening it would wait for a writer
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                data = mmap.mmap(stream.fileno(), 0, flags=_MAP, prot=_PROTECTION) if size else b""
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path}: cannot be read: {reason}; check the file and its permissions") from error
        for beginning, mistake in _MISTAKES.items():
            if beginning.match(data[:_MAX_LINE]):
                raise CheckpointError(f"{path}: {mistake}")
        return cls(path, str(path), 0, size, data)

    def part(self, start: int, size: int, name: str | None = None) -> Region:
        """A part of this part."""
        if start < 0 or size < 0 or start + size > self.size:
            raise damaged(name or self.name, f"bytes {start} to {start + size} of {self.size}")
        return Region(self.path, name or self.name, self.start + start, size, self._data)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """A copy of the bytes from ``start`` on: at most ``size`` bytes, or all of them."""
        end = self.size if size is None else min(self.size, start + size)
        return bytes(self._data[self.start + start : self.start + end])

    def stream(self) -> _Stream:
        """The bytes as a file, which raises ValueError when asked for more than any header, name or pickle has.

        The limit is needed because a sparse file can have any size.
        """
        return _Stream(self)

    def mapped(self, dtype: torch.dtype) -> Tensor:
        """The bytes as a vector, mapped, at whatever place in the file; see ``aligned``."""
        count = self.size // dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=self.start)


class _Stream(io.RawIOBase):
    def __init__(self, region: Region) -> None:
        self._region, self._position = region, 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._region.size}[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._region.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_READ:
            raise ValueError(f"{size:,} bytes where a header or a name is expected")
        data = self._region.read(self._position, size)
        self._position += len(data)
        return data

    def readline(self, _size: int | None = -1, /) -> bytes:
        # Python reads a line byte by byte; a long one is returned in parts.
        return super().readline(_MAX_LINE)


def is_tar(region: Region) -> bool:
    """Whether a file is an uncompressed tar archive."""
    return region.read(257, 5) == b"ustar"


def tar_members(path: Path) -> dict[str, Region]:
    """The files in a tar archive, by their paths without a leading ``./``.

    Members that no checkpoint has are refused: links, devices, paths that lead out of the archive, repeated names.
    """
    file = Region.of_file(path)
    members: dict[str, Region] = {}
    try:
        with tarfile.open(fileobj=file.stream(), mode="r:") as archive:
            for member in archive:
                name = str(PurePosixPath(member.name))
                refusals = {
                    "has too many headers": len(member.pax_headers) > _MAX_HEADERS,
                    "is neither a file nor a folder": not (member.isdir() or member.isreg()) or member.issparse(),
                    "leads out of the archive": name.startswith("/") or ".." in PurePosixPath(name).parts,
                    "is there twice": name in members,
                }
                for reason, refused in refusals.items():
                    if refused:
                        raise hostile(path, f"member {member.name[:200]!r} {reason}")
                if member.isfile():
                    members[name] = file.part(member.offset_data, member.size, f"{path}: {name}")
            # Zeros follow the last member; the library accepts anything as the end, and a missing end.
            if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("no end of the archive")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise damaged(path, error) from error
    return members


def folder_members(folder: Path, names: set[str]) -> dict[str, Region]:
    """The files of an unpacked archive that have one of some names, those in folders of the folder included."""
    paths = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.name in names]
    return {str(path.relative_to(folder)): Region.of_file(path) for path in paths if path.is_file()}
