"""Tensors in safetensors files: read through a memory map, written one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from protea.checkpoints.json_files import CONFIG, read_json
from protea.checkpoints.region import Region, damaged
from protea.checkpoints.tensors import Planned, StoredTensor, Tensors, type_name
from protea.errors import CheckpointError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_MAX_HEADER: Final = 16 << 20


def open_safetensors(files: dict[Path, set[str]], normalize: Callable[[str], str] = str) -> Tensors:
    """The tensors of safetensors files, each given with the keys that its index expects in it.

    ``normalize`` turns a stored key into the key to look it up by.
    """
    tensors = Tensors(list(files))
    for path, expected in files.items():
        handle, header = _open(path)
        tensors.metadata |= header.pop("__metadata__", {})
        check_expected(path, expected, set(header))
        for key in sorted(header):
            shape, dtype = tuple(header[key]["shape"]), header[key]["dtype"]
            tensors.add(normalize(key), StoredTensor(path, shape, dtype, partial(handle.get_tensor, key)))
    return tensors


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file opened by safetensors, which checks the header, and the header."""
    # safetensors says "no such file" of every file that it cannot open, and keeps the last of two equal names.
    region = Region.of_file(path)
    length = int.from_bytes(region.read(0, 8), "little")
    if length > _MAX_HEADER:
        raise damaged(path, f"a header of {length:,} bytes")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        return handle, json.loads(region.read(8, length), object_pairs_hook=_without_repeats)
    except (SafetensorError, OSError, ValueError, MemoryError, RecursionError) as error:
        raise damaged(path, error) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("two entries of the header have the same name")
    return entries


def check_expected(path: Path, expected: set[str], stored: set[str]) -> None:
    """Check that a shard holds what its index says."""
    if absent := sorted(expected - stored):
        raise CheckpointError(f"{path}: lacks {absent[0]}, which its index says it holds; fetch both again")


def shards(folder: Path, weights: str = WEIGHTS, index: str = INDEX) -> dict[Path, set[str]]:
    """A folder's weight files, each with the keys that its index expects in it (none without an index)."""
    # lexists: a link that leads nowhere is a file that cannot be read, and opening it says why.
    if not os.path.lexists(folder / index):
        if os.path.lexists(folder / weights):
            return {folder / weights: set()}
        raise CheckpointError(f"{folder}: no {weights} and no {index}; put the weights beside {CONFIG}")
    files: dict[Path, set[str]] = {}
    try:
        for key, name in read_json(folder / index)["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"{name[:200]!r} is in another folder")
            files.setdefault(folder / name, set()).add(key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / index, repr(error)) from error
    if not files:
        raise damaged(folder / index, "its weight_map names no tensors")
    if absent := sorted(path.name for path in files if not os.path.lexists(path)):
        raise CheckpointError(f"{folder}: {', '.join(absent)} missing of {len(files)} shards in {index}; fetch it")
    return dict(sorted(files.items()))


def write_safetensors(path: Path, plan: list[Planned], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, in order, with strings for the header; the library's own writer would hold all of them in memory.

    The format: the header's length in 8 bytes, a JSON header, the bytes of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for planned in plan:
        start, end = end, end + planned.size
        offsets = [start, end]
        header[planned.key] = {"dtype": type_name(planned.dtype), "shape": planned.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors in place
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            stream.write(planned.data())
