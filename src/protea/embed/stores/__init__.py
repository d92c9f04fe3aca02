"""Formats of embedding files, one module each, chosen by the suffix of the path; and the names of records in them.

A store writes in its own folder beside the output's final place. After ``commit``, everything written so far
survives a kill of the process. ``finish`` completes the output, which is then moved to its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from protea.errors import UsageError

Array = NDArray[np.floating]

State = dict[str, Any]
"""What a store needs to continue from a commit, as plain values for JSON."""

RESIDUES: Final = "residues"
"""The kind of an array with one vector per residue; the other kinds are names of poolings."""

_SUFFIXES: Final = {".h5": "h5", ".hdf5": "h5", ".parquet": "parquet", "": "folder"}
_CLASSES: Final = {"h5": "H5Store", "parquet": "ParquetStore", "folder": "FolderStore"}
_MAX_FILE_NAME: Final = 150


class StoredRecord(NamedTuple):
    """What a store keeps of a record beside its arrays.

    ``length`` counts the embedded residues, ``truncated_from`` those before truncation; it is ``None`` for a record
    that is not truncated.
    """

    id: str
    description: str
    length: int
    truncated_from: int | None


@dataclass(frozen=True)
class ArrayLayout:
    """The form of every record's arrays: their first axis is the layers, their last axis has the model's width.

    ``kinds`` are names of poolings and ``RESIDUES``, in order; ``compression`` is the gzip level of HDF5 datasets.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    dtype: str
    compression: int | None = None

    def to_json(self) -> str:
        """The layout as text; outputs carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ArrayLayout:
        """The layout from its text."""
        values = json.loads(text)
        return cls(**values | {"kinds": tuple(values["kinds"]), "layers": tuple(values["layers"])})

    def bytes(self, sequences: int, residues: int) -> int:
        """Bytes of the arrays alone."""
        vectors = sum(residues if kind == RESIDUES else sequences for kind in self.kinds)
        return vectors * len(self.layers) * self.width * np.dtype(self.dtype).itemsize


class EmbeddingStore(Protocol):
    """Receives embeddings record by record; the module docstring states what a store promises."""

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a record; each kind has an array ``[N, ...]`` whose first axis is the layers."""

    def commit(self) -> State:
        """Make all records so far safe if the process is killed."""

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Complete the output, with the provenance inside as JSON; return the file or folder to move into place."""

    def abandon(self) -> None:
        """Drop everything since the last commit; never fails."""


class Contents(NamedTuple):
    """A finished output, as read: the run's provenance, the layout, and the records and arrays given to ``write``."""

    provenance: dict[str, Any]
    layout: ArrayLayout
    records: Iterator[tuple[StoredRecord, dict[str, Array]]]


def kind_of(path: Path, option: str) -> str:
    """The format of an output path: ``h5``, ``parquet`` or ``folder``; ``UsageError`` if the suffix names none."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"{option} {path}: unknown suffix {path.suffix!r}; use .parquet, .h5, or a name without suffix for a folder"
        )
    return _SUFFIXES[path.suffix]


def open_store(kind: str, work: Path, layout: ArrayLayout, state: State | None) -> EmbeddingStore:
    """Open a store for writing in an existing folder that only it uses; without a state it is empty."""
    store: EmbeddingStore = getattr(_module(kind), _CLASSES[kind])(work, layout, state)
    return store


def read_store(path: Path, kind: str) -> Contents:
    """Open a finished output of a format."""
    contents: Contents = _module(kind).read(path)
    return contents


def is_output_folder(path: Path) -> bool:
    """Whether a folder is empty or holds embeddings that Protea wrote, so that it may be replaced."""
    return path.is_dir() and ((path / "protea.json").is_file() or not any(path.iterdir()))


def _module(kind: str) -> Any:
    return import_module(f"protea.embed.stores.{kind}")


def store_name(record_id: str) -> str:
    """The name of a record's HDF5 dataset, as in UniProt's embedding files. Two ids with one name are duplicates.

    ``/`` would make groups, ``.`` alone is the root, and ``@max`` at the end marks a pooling; all are escaped.
    """
    if record_id == ".":
        return "%2E"
    name = record_id.replace("/", "%2F")
    return re.sub(r"@(mean|max|std|bos)$", r"%40\1", name) if "@" in name else name


def file_name(record_id: str) -> str:
    """A file name without suffix for any id: percent-encoded; a long one is cut and ends in a hash."""
    safe = quote(record_id, safe="|+=,@()[]~ ")
    safe = "%2E" + safe[1:] if safe.startswith(".") else safe
    if len(safe) <= _MAX_FILE_NAME:
        return safe
    return f"{safe[:_MAX_FILE_NAME]}-{blake2b(record_id.encode(), digest_size=8).hexdigest()}"
