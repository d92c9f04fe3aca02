"""Files of ``torch.save``, read in place without running their pickles, and written one tensor at a time.

Two layouts are read: the zip archive of PyTorch 1.6 and later, and the sequence of pickles that earlier versions
wrote, in which Meta published ESM-1b.
"""

from __future__ import annotations

import errno
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints.region import Region, aligned, damaged
from protea.checkpoints.tensors import Planned, StoredTensor, Tensors, check_expected, type_name
from protea.checkpoints.unpickle import MAX_PICKLE_BYTES, TensorRef, unpickle
from protea.errors import CheckpointError, ProteaWarning

MODEL_NAMES: Final = ("model_state_dict", "state_dict", "model")
"""What training programs call the state dict, beside their own state."""

_WORDS: Final = ("word_embeddings.weight", "embed_tokens.weight", "shared.weight")
_AVERAGED: Final = re.compile(r"(?<![a-z])(ema|swa)|averag|shadow", re.IGNORECASE)
_LONGEST: Final = 60
"""Longer places within a file are not looked into."""

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that begins files before PyTorch 1.6."""

_LOCAL_HEADER: Final = 30
"""Bytes of a zip member's own header, before its name."""


def is_torch_file(region: Region) -> bool:
    """Whether a file begins like the files of ``torch.save``."""
    return region.read(0, len(_LEGACY)).startswith((_ZIP, _LEGACY))


class TorchFile:
    """One file of ``torch.save``, with its ``content`` as ``unpickle`` gives it."""

    def __init__(self, region: Region) -> None:
        self._region, self._name = region, region.name
        self._storages: dict[str, Region] = {}
        start = region.read(0, len(_LEGACY))
        if start.startswith(_ZIP):
            self.content = self._read_zip()
        elif start == _LEGACY:
            self.content = self._read_legacy()
        else:
            raise CheckpointError(f"{self._name}: no file of torch.save, or truncated; fetch it again")

    def tensor(self, ref: TensorRef) -> Tensor:
        """A tensor, mapped where possible."""
        return self._view(ref, aligned)

    def mapped(self, ref: TensorRef) -> Tensor:
        """A tensor, mapped at whatever place in the file; ``region.aligned`` copies what of it is needed."""
        return self._view(ref, lambda vector: vector)

    def _view(self, ref: TensorRef, placed: Callable[[Tensor], Tensor]) -> Tensor:
        storage = self.storage(ref)
        if 0 in ref.shape:
            return torch.empty(ref.shape, dtype=ref.storage.dtype)
        return placed(storage.mapped(ref.storage.dtype)).as_strided(ref.shape, ref.stride, ref.offset)

    def storage(self, ref: TensorRef) -> Region:
        """Where the storage of a tensor is, which must hold the whole tensor. Nothing is read."""
        key = ref.storage.key
        if key not in self._storages:
            raise damaged(self._name, f"storage {key[:100]!r} is missing")
        storage = self._storages[key]
        if 0 in ref.shape:
            if prod(max(1, length) for length in ref.shape) > self._region.size:
                raise damaged(self._name, "a tensor of impossible shape")
            return storage
        end = 1 + ref.offset + sum((length - 1) * step for length, step in zip(ref.shape, ref.stride, strict=True))
        # A view that repeats elements could be far larger than its storage, so its size counts too.
        if max(end, prod(ref.shape)) * ref.storage.dtype.itemsize > storage.size:
            raise damaged(self._name, f"a tensor reaches beyond its storage {key}")
        return storage

    def _read_zip(self) -> Any:
        try:
            members = {member.name: member for member in _members(self._region)}
        # zipfile has no common base class for its errors.
        except (zipfile.BadZipFile, ValueError, EOFError, OverflowError, IndexError, RuntimeError, OSError) as error:
            raise damaged(self._name, error) from error
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self._name}: a zip archive, but not of torch.save: {len(pickles)} data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and order.read(0, 8) != b"little":
            raise CheckpointError(f"{self._name}: saved on a big-endian machine, which is not supported")
        data = f"{root}data/"
        self._storages = {name.removeprefix(data): members[name] for name in members if name.startswith(data)}
        return unpickle(members[pickles[0]], f"{self._name}: data.pkl")

    def _read_legacy(self) -> Any:
        stream = self._region.part(0, min(self._region.size, MAX_PICKLE_BYTES)).stream()
        _magic, _protocol, system = (unpickle(stream, self._name) for _ in range(3))
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(f"{self._name}: saved on a big-endian machine, which is not supported")
        content, keys = (unpickle(stream, self._name) for _ in range(2))
        are_keys = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
        if not are_keys or len(set(map(str, keys))) != len(keys):
            raise damaged(self._name, "no list of storages")
        widths = {ref.storage.key: ref.storage.dtype.itemsize for _, ref in named_tensors(content)}
        for key in map(str, keys):
            start = stream.tell() + 8
            size = int.from_bytes(self._region.part(start - 8, 8).read(), "little") * widths.get(key, 1)
            self._storages[key] = self._region.part(start, size, f"{self._name}: storage {key}")
            stream.seek(start + size)
        return content


def named_tensors(content: Any) -> Iterator[tuple[Any, TensorRef]]:
    """The tensors in a tree of dictionaries and lists, each with its key or index. Trees may contain themselves."""
    waiting: list[Any] = [[content]]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, dict | list | tuple):
            continue
        seen.add(id(node))
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, TensorRef):
                yield key, value
            else:
                waiting.append(value)


def _members(region: Region) -> list[Region]:
    """The members of a zip archive; ``ValueError`` if they are compressed or overlap, which torch.save never writes."""
    with zipfile.ZipFile(region.stream()) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    members: list[Region] = []
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
        members.append(replace(region.part(start, info.file_size), name=name))
    if len({member.name for member in members}) != len(members):
        raise ValueError("two members have the same name")
    return members


def _refs(node: Any) -> dict[Any, TensorRef]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for key, value in items if isinstance(value, TensorRef)}


def has_words(keys: Iterable[Any]) -> bool:
    """Whether word embeddings are among some keys, as among those of the weights of a whole model."""
    return any(isinstance(key, str) and key.endswith(_WORDS) for key in keys)


def state_of(path: Path, content: Any) -> dict[Any, Any]:
    """The state dict in a file: under the first of ``MODEL_NAMES``, or the whole; best one with word embeddings."""
    if isinstance(content, dict):
        places = (*(content.get(name) for name in MODEL_NAMES), content)
        if states := [state for state in places if isinstance(state, dict) and _refs(state)]:
            return max(states, key=has_words)
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path}: holds {held[:200]}, and no state dict, by itself or as {', '.join(MODEL_NAMES)}; save one: "
        "`torch.save(model.state_dict(), FILE)`; parts of DeepSpeed become one file with its zero_to_fp32.py"
    )


def _name_others(path: Path, content: Any, chosen: dict[Any, Any]) -> None:
    """Name the models in a file beside the chosen one, in a note. Two under usual names are an error."""
    refs, read, others, seen = _refs(chosen), "", list[str](), set[int]()
    waiting = [("", content)]
    for place, node in waiting:  # which grows, and never by what was seen
        if id(node) in seen or isinstance(node, TensorRef) or not isinstance(node, dict | list | tuple):
            continue
        seen.add(id(node))
        held = _refs(node)
        averaged = _AVERAGED.search(place) and 2 * len(held) > len(refs)
        if node is chosen:
            read = place
        elif held != refs and (averaged or has_words(held)):
            others.append(place)
        if isinstance(node, dict) and len(place) < _LONGEST:
            names = [key for key in node if isinstance(key, str) and "optim" not in key]
            waiting += [(f"{place}[{name[:_LONGEST]!r}]", node[name]) for name in names]
    if not others:
        return
    alone = "save that alone: `torch.save(torch.load(FILE){}, NEW_FILE)`"
    also = f"also holds weights of a model at {', '.join(place or 'its top' for place in others[:3])}"
    if any(place in ("", *(f"[{name!r}]" for name in MODEL_NAMES)) for place in others):
        raise CheckpointError(f"{path}: holds a model at {read}, and {also}; choose one, and {alone.format(read)}")
    message = f"{path}: read {read or 'its top'}; the file {also}; to read {others[0]}, {alone.format(others[0])}"
    warnings.warn(message, ProteaWarning, stacklevel=2)


def open_state_dicts(
    states: Mapping[Path, tuple[TorchFile, Any]], expected: Mapping[Path, set[str]] | None = None
) -> Tensors:
    """The tensors of dictionaries in files of ``torch.save``, which must hold the keys that an index expects there."""
    tensors = Tensors(list(states))
    for path, (file, state) in states.items():
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds no dictionary of tensors where one is expected")
        _name_others(path, file.content, state)
        refs = {key: ref for key, ref in state.items() if isinstance(key, str) and isinstance(ref, TensorRef)}
        check_expected(path, (expected or {}).get(path, set()), set(refs))
        for key, ref in refs.items():
            file.storage(ref)  # finds a truncated file before any work
            stored = StoredTensor(path, ref.shape, type_name(ref.storage.dtype), partial(file.tensor, ref))
            tensors.add(key, stored)
    return tensors


def save_torch_file(path: Path, content: Callable[[dict[str, Tensor]], Any], plan: list[Planned]) -> None:
    """Write a file as ``torch.save`` does; ``content`` makes the object to save from the tensors by name.

    PyTorch writes the file with gaps for the tensors' values (it never touches the memory reserved for them here).
    Then the values are written into the gaps.
    """
    blanks = {planned.key: torch.empty(planned.shape, dtype=planned.dtype) for planned in plan}
    try:
        with torch.serialization.skip_data():
            torch.save(content(blanks), path)
    except RuntimeError as error:  # PyTorch raises this for every error of the operating system
        raise OSError(errno.EIO, "PyTorch could not write all of it: the disk is full, or fails") from error
    file = TorchFile(Region.of_file(path))
    refs = dict(named_tensors(file.content))
    with path.open("r+b") as stream:
        for planned in plan:
            stream.seek(file.storage(refs[planned.key]).start)
            stream.write(planned.data())


def to_bytes(value: Any) -> bytes:
    """What ``torch.save`` writes for a small value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
