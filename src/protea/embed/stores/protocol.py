"""The interface that every format of embeddings implements.

A store writes in a folder of its own beside the output's final place. After ``commit``, everything written so far
survives a kill of the process. ``finish`` completes the output; only then does it move to its place.
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
"""What a store needs to continue from a commit, as plain values for JSON."""

RESIDUES: Final = "residues"
"""The kind of an array with one vector a residue; the other kinds are names of poolings."""


@dataclass(frozen=True)
class StoredRecord:
    """What a store keeps of a record beside its arrays.

    Attributes:
        id: unique in the output.
        description: the rest of the header.
        length: number of residues embedded.
        truncated_from: number of residues before truncation; ``None`` if the record is not truncated.
    """

    id: str
    description: str
    length: int
    truncated_from: int | None


@dataclass(frozen=True)
class ArrayLayout:
    """The form of every record's arrays.

    Attributes:
        kinds: names of poolings and ``RESIDUES``, in order.
        layers: layer numbers along the arrays' first axis.
        width: length of the last axis.
        dtype: ``float32`` or ``float16``.
        compression: gzip level of HDF5 datasets, or ``None``.
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

    def write(self, entry: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a record; each kind has an array ``[N, ...]`` whose first axis is the layers."""

    def commit(self) -> State:
        """Make all records so far survive a kill."""

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Complete the output, with the provenance inside as JSON; return the file or folder to move into place."""

    def abandon(self) -> None:
        """Drop everything since the last commit; never fails."""


class Contents(NamedTuple):
    """A finished output, as read.

    Attributes:
        provenance: settings and circumstances of the run.
        layout: of the arrays.
        records: as given to ``write``.
    """

    provenance: dict[str, Any]
    layout: ArrayLayout
    records: Iterator[tuple[StoredRecord, dict[str, Array]]]
