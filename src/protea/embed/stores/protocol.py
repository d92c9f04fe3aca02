"""What every output of embeddings is, whatever its format.

A store works in a folder of its own beside the output's final place. ``commit`` makes everything written so far
survive whatever happens to the process, ``finish`` makes the output complete; only then is it moved to its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

State = dict[str, Any]
"""What a store must know to go on from a commit; plain values that JSON can hold."""

RESIDUES: Final = "residues"
"""The kind of an array with one vector a residue; other kinds are names of poolings."""


@dataclass(frozen=True)
class StoredRecord:
    """What is stored of a record beside its arrays.

    Attributes:
        id: unique in the output.
        description: the rest of the header.
        length: residues embedded.
        truncated_from: residues before truncation; ``None`` if it was not truncated.
    """

    id: str
    description: str
    length: int
    truncated_from: int | None


@dataclass(frozen=True)
class ArrayLayout:
    """What every record's arrays look like.

    Attributes:
        kinds: names of poolings and ``RESIDUES``, in order.
        layers: of the arrays' first axis.
        width: of the last axis.
        dtype: ``float32`` or ``float16``.
        compression: gzip level of HDF5 datasets, or ``None``.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    dtype: str
    compression: int | None = None

    def to_json(self) -> str:
        """As outputs carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ArrayLayout:
        """The inverse."""
        values = json.loads(text)
        return cls(**values | {"kinds": tuple(values["kinds"]), "layers": tuple(values["layers"])})

    def bytes(self, sequences: int, residues: int) -> int:
        """What the numbers alone take."""
        vectors = sum(residues if kind == RESIDUES else sequences for kind in self.kinds)
        return vectors * len(self.layers) * self.width * np.dtype(self.dtype).itemsize


class EmbeddingStore(Protocol):
    """Takes embeddings one record at a time; see the module for what a store promises."""

    def write(self, entry: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a record: for each kind an array ``[N, ...]`` with an axis for layers."""

    def commit(self) -> State:
        """Make all records so far durable."""

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Complete the output, with what was run as JSON inside, and give the file or folder to move into place."""

    def abandon(self) -> None:
        """Let go of everything since the last commit; never fails."""


class Contents(NamedTuple):
    """A finished output, read back.

    Attributes:
        provenance: what was run.
        layout: what arrays look like.
        records: as they were given to ``write``.
    """

    provenance: dict[str, Any]
    layout: ArrayLayout
    records: Iterator[tuple[StoredRecord, dict[str, Array]]]
