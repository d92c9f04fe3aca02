"""Formats of embedding files, one module each, chosen by the suffix of the path; and the names of records in them.

A store writes in its own folder beside the output's final place. After ``commit``, everything written so far
survives a kill of the process. ``finish`` completes the output, which is then moved to its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
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
"""The kind of an array with one vector a residue."""

LOG_PROBABILITIES: Final = "log_probabilities"
ENTROPY: Final = "entropy"
PREDICTIONS: Final = (LOG_PROBABILITIES, ENTROPY)
"""The kinds of arrays with the model's predictions of each residue, ``[L, letters]`` and ``[L]``.

All other kinds are names of poolings, one vector per sequence.
"""

_SUFFIXES: Final = {".h5": "h5", ".hdf5": "h5", ".parquet": "parquet", ".csv": "csv", ".npz": "npz", "": "folder"}
_CLASSES: Final = {
    "h5": "H5Store",
    "parquet": "ParquetStore",
    "folder": "FolderStore",
    "csv": "CsvStore",
    "npz": "NpzStore",
}
_VECTORS_ONLY: Final = ("csv", "npz")
_MAX_FILE_NAME: Final = 150


class StoredRecord(NamedTuple):
    """What a store keeps of a record beside its arrays.

    ``length`` counts the embedded residues, ``truncated_from`` those before truncation; it is ``None`` for a record
    that is not truncated. ``sequence_sha256`` is the SHA-256, in hexadecimal, of the sequence as it is in the input;
    it is empty in outputs of versions that did not store it.
    """

    id: str
    description: str
    length: int
    truncated_from: int | None
    sequence_sha256: str


@dataclass(frozen=True)
class ArrayLayout:
    """The form of every record's arrays, whose first axis is the layers.

    Attributes:
        kinds: names of poolings and ``RESIDUES``, or ``PREDICTIONS`` alone, in order.
        layers: their numbers; for predictions the last layer alone.
        width: length of the last axis: the model's width, or the number of letters.
        dtype: of the arrays.
        compression: gzip level of HDF5 datasets.
        letters: of the columns of ``LOG_PROBABILITIES``.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    dtype: str
    compression: int | None = None
    letters: str = ""

    def to_json(self) -> str:
        """The layout as text; outputs carry it."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "letters" or value})

    @classmethod
    def from_json(cls, text: str) -> ArrayLayout:
        """The layout from its text."""
        values = json.loads(text)
        return cls(**values | {"kinds": tuple(values["kinds"]), "layers": tuple(values["layers"])})

    def bytes(self, sequences: int, residues: int) -> int:
        """Bytes of the arrays alone."""
        values = sum(
            (residues if by_residue(kind) else sequences) * (1 if kind == ENTROPY else self.width)
            for kind in self.kinds
        )
        return values * len(self.layers) * np.dtype(self.dtype).itemsize

    def name(self, kind: str, layer: int) -> str:
        """The name of an array in a table: ``embedding``, with poolings or layers only where there are several."""
        if kind in PREDICTIONS:
            return kind
        several = f"_{kind}" if len(self.kinds) > 1 else ""
        return f"embedding{several}" + (f"_layer{layer}" if len(self.layers) > 1 else "")


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


Arrays = dict[str, Array]


@dataclass(frozen=True)
class Contents:
    """A finished output, as read: the run's provenance, the layout, and the records and arrays given to ``write``.

    Each entry is a record and a function that reads its arrays, now or later.
    """

    provenance: dict[str, Any]
    layout: ArrayLayout
    entries: Iterator[tuple[StoredRecord, Callable[[], Arrays]]]

    @property
    def records(self) -> Iterator[tuple[StoredRecord, Arrays]]:
        """The records with their arrays."""
        return ((record, read()) for record, read in self.entries)


def kind_of(path: Path, option: str) -> str:
    """The format of an output path by its suffix; ``UsageError`` if it names none, or none for the option's arrays."""
    kind = _SUFFIXES.get(path.suffix)
    if kind is None or (kind in _VECTORS_ONLY and option in ("-r", "--logits")):
        fault = f"unknown suffix {path.suffix!r}" if kind is None else f"{path.suffix} holds vectors of sequences (-o)"
        vectors = ".csv, .npz, " if option not in ("-r", "--logits") else ""
        raise UsageError(f"{option} {path}: {fault}; use .parquet, .h5, {vectors}or a name without suffix for a folder")
    return kind


def by_residue(kind: str) -> bool:
    """Whether the arrays of a kind have an axis for the residues."""
    return kind == RESIDUES or kind in PREDICTIONS


def record_of(row: Mapping[str, str]) -> StoredRecord:
    """A record from the cells of a CSV file, in which nothing stands for ``None``."""
    truncated_from = int(row["truncated_from"]) if row["truncated_from"] else None
    sha = row.get("sequence_sha256", "")
    return StoredRecord(row["id"], row["description"], int(row["length"]), truncated_from, sha)


def sequence_hash(sequence: str) -> str:
    """``StoredRecord.sequence_sha256`` of a sequence."""
    return sha256(sequence.encode()).hexdigest()


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

    ``/`` would make groups, ``.`` alone is the root, and ``@max`` at the end marks a kind of array; all are escaped.
    """
    if record_id == ".":
        return "%2E"
    name = record_id.replace("/", "%2F")
    return re.sub(r"@(mean|max|std|bos|entropy)$", r"%40\1", name) if "@" in name else name


def file_name(record_id: str) -> str:
    """A file name without suffix for any id: percent-encoded; a long one is cut and ends in a hash."""
    safe = quote(record_id, safe="|+=,@()[]~ ")
    safe = "%2E" + safe[1:] if safe.startswith(".") else safe
    if len(safe) <= _MAX_FILE_NAME:
        return safe
    return f"{safe[:_MAX_FILE_NAME]}-{blake2b(record_id.encode(), digest_size=8).hexdigest()}"
