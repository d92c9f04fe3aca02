"""Files and folders of checkpoints: stretches of them read in place, and new ones that appear only when complete."""

from __future__ import annotations

import io
import json
import mmap
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from protea.errors import CheckpointError, OutputError

CONFIG: Final = "config.json"

# Private, so that writing to tensors does not reach the file; and without a claim on memory for all of it, which
# Linux refuses for files larger than the machine's. Python has the constant since 3.13.
_MAP: Final = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE

_MAX_READ: Final = 32 << 20
_MAX_LINE: Final = 4096
_MAX_TEXT: Final = 16 << 20

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


def read_text(path: Path, limit: int = _MAX_TEXT) -> str:
    """A text, if it is no longer than those of checkpoints.

    Raises:
        OSError: the file is absent or unreadable.
        ValueError: it is longer, or no UTF-8.
    """
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes, which is far beyond what describes a model")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is absent, unreadable, or holds something else.
    """
    try:
        raw = json.loads(read_text(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable JSON, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place to write a checkpoint at; it appears as ``target`` only when complete, with any files put beside it.

    Args:
        target: a file or folder that does not exist, or an empty folder.

    Raises:
        OutputError: it exists, or cannot be written; nothing is left behind.
    """
    made: list[Path] = []
    # Named before it is made: an interrupt may come between any two lines, and only what is known can be removed.
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        try:
            _refuse(target)
            made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir(mode=0o700)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {error.strerror}; choose another place") from error
        yield temporary / target.name
        # What goes with the target comes before it: where the target is, everything is.
        written = sorted(temporary.iterdir(), key=lambda path: path.name == target.name)
        for path in written:
            _refuse(target.parent / path.name)
        for path in written:
            if path.is_dir() and (target.parent / path.name).exists():
                (target.parent / path.name).rmdir()
            path.rename(target.parent / path.name)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # they hold something
            for folder in made:
                folder.rmdir()


def _refuse(target: Path) -> None:
    # A link, dangling or not, could not be replaced by the finished checkpoint.
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OutputError(f"{target}: exists already; remove it or choose another name")
