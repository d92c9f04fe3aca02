"""Files of ``torch.save``, read in place without running their pickles, and written one tensor at a time.

Two layouts are read: the zip archive of PyTorch 1.6 and later, and the run of pickles before it, in which Meta
published ESM-1b. Numbers stay in the file until asked for.
"""

from __future__ import annotations

import errno
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints.layout import Planned
from protea.checkpoints.region import Region
from protea.checkpoints.safetensors_files import add_key, check_expected
from protea.checkpoints.tensors import FLOATS, Tensors, raw_bytes
from protea.checkpoints.unpickle import MAX_PICKLE_BYTES, StorageRef, TensorRef, unpickle
from protea.errors import CheckpointError

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that begins files before PyTorch 1.6."""

_LOCAL_HEADER: Final = 30
"""Bytes of a zip member's own header, before its name."""

_MAX_MEMBERS: Final = 1 << 20


def is_torch_file(region: Region) -> bool:
    """Whether a file begins as ``torch.save``'s do."""
    return region.read(0, len(_LEGACY)).startswith((_ZIP, _LEGACY))


class TorchFile:
    """One file of ``torch.save``.

    Attributes:
        region: where it is.
        content: what was saved, of dicts, lists, numbers, strings, ``Inert`` records, and a ``TensorRef`` a tensor.

    Raises:
        CheckpointError: it is damaged, or its pickle asks for what no checkpoint needs.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._storages: dict[str, Region] = {}
        start = region.read(0, len(_LEGACY))
        if start.startswith(_ZIP):
            self.content = self._read_zip()
        elif start == _LEGACY:
            self.content = self._read_legacy()
        else:
            raise CheckpointError(f"{region.name}: no file of torch.save, or truncated; fetch it again")

    def tensor(self, ref: TensorRef) -> Tensor:
        """A tensor, mapped where it can be.

        Raises:
            CheckpointError: it reaches beyond its storage, or the storage beyond the file.
        """
        storage = self.checked(ref)
        if 0 in ref.shape:
            return torch.empty(ref.shape, dtype=ref.storage.dtype)
        return storage.tensor(ref.storage.dtype).as_strided(ref.shape, ref.stride, ref.offset)

    def checked(self, ref: TensorRef) -> Region:
        """The storage of a tensor that lies within it; nothing is read.

        Raises:
            CheckpointError: it reaches beyond its storage, or the storage beyond the file.
        """
        storage = self._storage(ref.storage)
        if 0 in ref.shape:
            if prod(max(1, length) for length in ref.shape) > self.region.size:
                raise CheckpointError(f"{self.region.name}: a tensor of impossible shape; fetch it again")
            return storage
        end = 1 + ref.offset + sum((length - 1) * step for length, step in zip(ref.shape, ref.stride, strict=True))
        # A view that repeats elements would be larger than what it is stored in, as large as the file likes.
        if max(end, prod(ref.shape)) * ref.storage.dtype.itemsize > storage.size:
            raise CheckpointError(
                f"{self.region.name}: a tensor reaches beyond its storage {ref.storage.key}; fetch it again"
            )
        return storage

    def storage(self, key: str) -> Region:
        """The bytes of a storage."""
        return self._storages[key]

    def _storage(self, ref: StorageRef) -> Region:
        if ref.key not in self._storages:
            raise CheckpointError(f"{self.region.name}: storage {ref.key[:100]!r} is missing; fetch it again")
        return self._storages[ref.key]

    def _read_zip(self) -> Any:
        try:
            members = {member.name: member for member in _members(self.region)}
        # zipfile knows no one base for the ways in which bytes are no archive.
        except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, EOFError, OverflowError, IndexError) as error:
            raise CheckpointError(f"{self.region.name}: truncated or damaged ({error}); fetch it again") from error
        except (NotImplementedError, RuntimeError, UnicodeDecodeError, OSError) as error:
            raise CheckpointError(f"{self.region.name}: not as torch.save writes ({error}); fetch it again") from error
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{self.region.name}: a zip archive, but not of torch.save: {len(pickles)} data.pkl in it"
            )
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and order.read(0, 8) != b"little":
            raise CheckpointError(f"{self.region.name}: saved on a big-endian machine, which is not supported")
        self._storages = {
            name[len(root) + 5 :]: region for name, region in members.items() if name.startswith(f"{root}data/")
        }
        return unpickle(_small(members[pickles[0]]), f"{self.region.name}: data.pkl")

    def _read_legacy(self) -> Any:
        stream = self.region.part(0, min(self.region.size, MAX_PICKLE_BYTES)).stream()
        where = self.region.name
        for _ in range(2):  # the magic number, the protocol
            unpickle(stream, where)
        system = unpickle(stream, where)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(f"{where}: saved on a big-endian machine, which is not supported")
        content = unpickle(stream, where)
        keys = unpickle(stream, where)
        named = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
        if not named or len(set(map(str, keys))) != len(keys):
            raise CheckpointError(f"{where}: damaged: no list of storages; fetch it again")
        widths = {ref.storage.key: ref.storage.dtype.itemsize for ref in _refs(content)}
        for key in map(str, keys):
            count = int.from_bytes(self.region.part(stream.tell(), 8).read(), "little")
            size = count * widths.get(key, 1)
            self._storages[key] = self.region.part(stream.tell() + 8, size, f"{where}: storage {key}")
            stream.seek(stream.tell() + 8 + size)
        return content


def _refs(content: Any) -> Iterator[TensorRef]:
    """The tensors in a tree of dictionaries and lists."""
    waiting, seen = [content], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, TensorRef):
            yield one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one


def _small(region: Region) -> bytes:
    if region.size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{region.name}: {region.size:,} bytes, far beyond what describes a model; not read")
    return region.read()


def _members(region: Region) -> list[Region]:
    """The members of a zip archive as stretches of it: stored, not compressed, apart from each other.

    Raises:
        ValueError: it is not so; torch.save writes no other archives, and those that are not so want to cheat.
    """
    with zipfile.ZipFile(region.stream()) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len(infos) > _MAX_MEMBERS:
        raise ValueError(f"{len(infos)} members")
    found: list[Region] = []
    end = 0
    for info in infos:
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"{name[:100]!r} is compressed or encrypted")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name[:100]!r} leads out of the archive")
        header = region.part(info.header_offset, _LOCAL_HEADER).read()
        if header[:4] != _ZIP or info.header_offset < end:
            raise ValueError(f"{name[:100]!r} overlaps another member")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER + lengths
        end = start + info.file_size
        found.append(replace(region.part(start, info.file_size), name=name))
    if len({member.name for member in found}) != len(found):
        raise ValueError("two members have one name")
    return found


class TorchTensors(Tensors):
    """The tensors of a dictionary in a file of ``torch.save``.

    Args:
        files: each file and the dictionary in it, each with the keys expected in it.
        normalize: turns a stored key into the one to look it up by.
    """

    def __init__(
        self, files: Mapping[Path, tuple[TorchFile, Any, set[str]]], normalize: Callable[[str], str] = str
    ) -> None:
        self._keys: dict[str, tuple[TorchFile, TensorRef, Path]] = {}
        self.paths = list(files)
        for path, (file, state, expected) in files.items():
            if not isinstance(state, dict):
                raise CheckpointError(f"{path}: holds no dictionary of tensors where one is expected")
            tensors = {key: ref for key, ref in state.items() if isinstance(key, str) and isinstance(ref, TensorRef)}
            check_expected(path, expected, set(tensors))
            for key, ref in tensors.items():
                file.checked(ref)  # a truncated file is found now, before any work
                add_key(self._keys, normalize(key), (file, ref, path), path)

    def __getitem__(self, key: str) -> Tensor:
        file, ref, _ = self._keys[key]
        return file.tensor(ref)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._keys[key][1].shape

    def dtype(self, key: str) -> str:
        """A tensor's stored type."""
        dtype = self._keys[key][1].storage.dtype
        return next((name for name, known in FLOATS.items() if known == dtype), str(dtype).removeprefix("torch."))

    def path(self, key: str) -> Path:
        """The file a tensor is in."""
        return self._keys[key][2]


def open_state_dicts(files: dict[Path, set[str]], normalize: Callable[[str], str] = str) -> TorchTensors:
    """Files that hold a dictionary of tensors each, as ``pytorch_model.bin`` and its shards do.

    Raises:
        CheckpointError: one is damaged, or lacks what is expected of it.
    """
    opened = {path: TorchFile(Region.of_file(path)) for path in files}
    return TorchTensors({path: (file, file.content, files[path]) for path, file in opened.items()}, normalize)


def save_torch_file(path: Path, content: Callable[[dict[str, Tensor]], Any], plan: list[Planned]) -> None:
    """Write a file as ``torch.save`` does, holding one tensor at a time.

    PyTorch leaves room for the numbers (memory that is reserved for them here is never touched), and they are then
    put where its own layout has them.

    Args:
        path: the file.
        content: what to save, given the dictionary of all tensors.
        plan: the tensors.

    Raises:
        OSError: the file cannot be written.
    """
    blanks = {planned.key: torch.empty(planned.shape, dtype=planned.dtype) for planned in plan}
    try:
        with torch.serialization.skip_data():
            torch.save(content(blanks), path)
    except RuntimeError as error:  # whatever the system said, PyTorch says this
        raise OSError(errno.EIO, "PyTorch could not write all of it: the disk is full, or fails") from error
    file = TorchFile(Region.of_file(path))
    refs: dict[str, TensorRef] = {}
    for state in _dictionaries(file.content):
        refs |= {key: value for key, value in state.items() if isinstance(value, TensorRef)}
    with path.open("r+b") as stream:
        for planned in plan:
            stream.seek(file.storage(refs[planned.key].storage.key).start)
            stream.write(raw_bytes(planned.value()))


def _dictionaries(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _dictionaries(value)


def to_bytes(value: Any) -> bytes:
    """What ``torch.save`` writes for something small."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
