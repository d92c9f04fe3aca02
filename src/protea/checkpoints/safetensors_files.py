"""Tensors in safetensors files: read through a memory map, written one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from protea.checkpoints.json_files import CONFIG, read_text
from protea.checkpoints.layout import Planned
from protea.checkpoints.tensors import FLOATS, Tensors, raw_bytes
from protea.errors import CheckpointError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_MAX_HEADER: Final = 16 << 20

_NAMES: Final = {dtype: name for name, dtype in FLOATS.items()}


class SafetensorsFiles(Tensors):
    """The tensors of some files, each opened once.

    Args:
        files: the files, each with the keys expected in it.
        normalize: turns a stored key into the one to look it up by.

    Raises:
        CheckpointError: a file is unreadable, truncated, lacks what is expected of it, or two keys mean the same.
    """

    def __init__(self, files: dict[Path, set[str]], normalize: Callable[[str], str] = str) -> None:
        self._files = ExitStack()
        self._handles: dict[Path, Any] = {}
        self._keys: dict[str, tuple[Any, str, Path]] = {}
        with self._files:
            self.paths = list(files)
            for path, expected in files.items():
                handle = self._handles[path] = self._open(path)
                stored = set(handle.keys())
                check_expected(path, expected, stored)
                for key in sorted(stored):
                    add_key(self._keys, normalize(key), (handle, key, path), path)
            self._files = self._files.pop_all()

    def _open(self, path: Path) -> Any:
        try:
            # safetensors calls every file that it cannot open absent, and takes the last of two tensors of one name.
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = stream.read(length) if length <= _MAX_HEADER else b""
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
            ) from error
        if length > _MAX_HEADER:
            raise CheckpointError(f"{path}: truncated or damaged: a header of {length:,} bytes; fetch it again")
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
            json.loads(header, object_pairs_hook=_unique)
        except (SafetensorError, OSError, ValueError, MemoryError, RecursionError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error
        return handle

    def close(self) -> None:
        """Let the files go; tensors already read stay valid."""
        self._files.close()

    def __getitem__(self, key: str) -> Tensor:
        handle, stored, _ = self._keys[key]
        tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        handle, stored, _ = self._keys[key]
        return tuple(handle.get_slice(stored).get_shape())

    def dtype(self, key: str) -> str:
        """A tensor's stored type."""
        handle, stored, _ = self._keys[key]
        return str(handle.get_slice(stored).get_dtype())

    def path(self, key: str) -> Path:
        """The file a tensor is in."""
        return self._keys[key][2]

    def metadata(self, path: Path) -> dict[str, str]:
        """The strings in a file's header."""
        return dict(self._handles[path].metadata() or {})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("two entries of the header have one name")
    return found


def add_key(keys: dict[str, Any], key: str, value: Any, path: Path) -> None:
    """Note where a tensor is; one name may not stand for two.

    Raises:
        CheckpointError: the name is taken.
    """
    if key in keys:
        raise CheckpointError(f"{path}: two tensors are called {key}; fetch the file again")
    keys[key] = value


def check_expected(path: Path, expected: set[str], stored: set[str]) -> None:
    """Check that a shard holds what its index says.

    Raises:
        CheckpointError: naming the first tensor that it lacks.
    """
    if absent := sorted(expected - stored):
        raise CheckpointError(f"{path}: lacks {absent[0]}, which its index says it holds; fetch both again")


def shards(folder: Path, weights: str = WEIGHTS, index: str = INDEX) -> dict[Path, set[str]]:
    """A folder's weight files, each with the keys its index expects in it (none without an index).

    Raises:
        CheckpointError: none are there, the index is damaged, or names a file that is absent.
    """
    # lexists: a link that leads nowhere is a file that cannot be read, and opening it says why.
    if not os.path.lexists(folder / index):
        if os.path.lexists(folder / weights):
            return {folder / weights: set()}
        raise CheckpointError(f"{folder}: no {weights} and no {index}; put the weights beside {CONFIG}")
    try:
        weight_map = json.loads(read_text(folder / index))["weight_map"]
        found: dict[Path, set[str]] = {}
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise ValueError(f"{name[:200]!r} is in another folder")
            found.setdefault(folder / name, set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / index}: damaged: {error!r}; fetch it again") from error
    if not found:
        raise CheckpointError(f"{folder / index}: its weight_map names no tensors; fetch it again")
    if absent := sorted(path.name for path in found if not os.path.lexists(path)):
        raise CheckpointError(
            f"{folder}: {', '.join(absent)} missing of the {len(found)} shards that {index} names; fetch it"
        )
    return dict(sorted(found.items()))


def write_safetensors(path: Path, plan: list[Planned], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, holding one tensor at a time; the library's own writer holds all of them.

    The format: the header's length in 8 bytes, a JSON header, the bytes of all tensors.

    Args:
        path: the file.
        plan: the tensors, in order.
        metadata: strings for the header.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for planned in plan:
        start, end = end, end + planned.size
        header[planned.key] = {
            "dtype": _NAMES[planned.dtype],
            "shape": planned.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors in place
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            stream.write(raw_bytes(planned.value()))
