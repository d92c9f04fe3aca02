"""Reads a store of training data: clusters of sequences as token ids, mapped into memory.

The folder holds, for each of ``train``, ``valid`` and ``test`` that was made, two Arrow IPC files, which any Arrow
library reads too. Opening looks at the places of the record batches alone; rows are then gathered, thousands at a
time, straight from the mapped file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.manifest import Manifest, check_alphabet, read_manifest, verify
from protea.data.writer import CLUSTERS, ROWS, SEQUENCES
from protea.errors import StoreError

Rows = NDArray[np.integer[Any]]


class _File:
    """An Arrow IPC file of equal batches, its columns at the places they have in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as source:
                self._buffer = source.read_buffer()
            self._reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
            self.batch_rows = int(self._reader.schema.metadata[ROWS.encode()])
            self.count = self._reader.num_record_batches
            self.batches = [self._reader.get_batch(number) for number in range(self.count)]
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read: {error}; build the store again") from error
        self.bytes = np.frombuffer(self._buffer, np.uint8)
        self.rows = sum(batch.num_rows for batch in self.batches)

    def values(self, name: str, dtype: Any) -> Callable[[Rows], NDArray[Any]]:
        """A function from rows to the values of a column of numbers."""
        number = self._reader.schema.get_field_index(name)
        places = self._places([batch.column(number).buffers()[1] for batch in self.batches], dtype)
        words = self._words(dtype)
        rows = self.batch_rows

        def find(wanted: Rows) -> NDArray[Any]:
            found: NDArray[Any] = words[places[wanted // rows] + wanted % rows]
            return found

        return find

    def spans(self, name: str) -> Callable[[Rows], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """A function from rows to where in ``bytes`` the values of a column of lists begin, and how many they are."""
        number = self._reader.schema.get_field_index(name)
        columns = [batch.column(number) for batch in self.batches]
        offsets = self._places([column.buffers()[1] for column in columns], np.int32)
        values = self._places([column.values.buffers()[1] for column in columns], np.uint8)
        words = self._words(np.int32)
        rows = self.batch_rows

        def find(wanted: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            batch = wanted // rows
            place = offsets[batch] + wanted % rows
            starts = words[place]
            begin: NDArray[np.int64] = values[batch] + starts
            return begin, (words[place + 1] - starts).astype(np.int64)

        return find

    def text(self, name: str, rows: Rows) -> list[str]:
        """Values of a column of text, one by one."""
        number = self._reader.schema.get_field_index(name)
        places = [divmod(int(row), self.batch_rows) for row in rows]
        return [self.batches[batch].column(number)[row].as_py() for batch, row in places]

    def _places(self, buffers: list[Any], dtype: Any) -> NDArray[np.int64]:
        width = np.dtype(dtype).itemsize
        places = [0 if buffer is None else (buffer.address - self._buffer.address) // width for buffer in buffers]
        return np.array(places, np.int64)

    def _words(self, dtype: Any) -> NDArray[Any]:
        width = np.dtype(dtype).itemsize
        return self.bytes[: len(self.bytes) // width * width].view(dtype)


class Split:
    """The clusters and sequences of one split.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        alphabet: of the tokens.
        tokens: the bytes that spans refer to, mapped.
        clusters: how many there are.
        sequences: how many there are.
        starts: the first sequence of each of some clusters.
        counts: how many sequences each of some clusters has; they are neighbours.
        spans: where in ``tokens`` each of some sequences begins, and its length.
    """

    def __init__(self, folder: Path, name: str, alphabet: Alphabet) -> None:
        self.name, self.alphabet = name, alphabet
        self._sequences, self._clusters = _File(folder / name / SEQUENCES), _File(folder / name / CLUSTERS)
        self.tokens = self._sequences.bytes
        self.clusters, self.sequences = self._clusters.rows, self._sequences.rows
        self._start = self._clusters.values("start", np.uint64)
        self._count = self._clusters.values("count", np.uint32)
        self.spans = self._sequences.spans("tokens")

    def starts(self, clusters: Rows) -> NDArray[np.int64]:
        """The first sequence of each cluster."""
        return self._start(clusters).astype(np.int64)

    def counts(self, clusters: Rows) -> NDArray[np.int64]:
        """How many sequences each cluster has."""
        return self._count(clusters).astype(np.int64)

    def ids(self, sequences: Rows) -> list[str]:
        """The ids of some sequences."""
        return self._sequences.text("id", sequences)

    def cluster_ids(self, clusters: Rows) -> list[str]:
        """The ids of some clusters."""
        return self._clusters.text("id", clusters)

    def residues(self, sequence: int) -> NDArray[np.uint8]:
        """The token ids of one sequence, without BOS and EOS."""
        (start,), (length,) = self.spans(np.array([sequence]))
        return self.tokens[start : start + length]

    def text(self, sequence: int) -> str:
        """One sequence in letters."""
        return self.alphabet.decode(self.residues(sequence))


class TrainingStore:
    """A store of training data, opened.

    Args:
        folder: what a ``protea data`` command wrote.
        alphabet: of the model that will read it.

    Raises:
        StoreError: there is none, it is incomplete, or its tokens are of another alphabet.

    Attributes:
        manifest: what it holds and how it was made.
    """

    def __init__(self, folder: str | Path, alphabet: Alphabet) -> None:
        self.folder, self.alphabet = Path(folder), alphabet
        self.manifest: Manifest = read_manifest(self.folder)
        check_alphabet(self.folder, self.manifest, alphabet)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits it has."""
        return tuple(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of its files."""
        known = sorted((name, file["sha256"]) for name, file in self.manifest["files"].items())
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """One of its splits.

        Raises:
            StoreError: it has no such split.
        """
        if name not in self.splits:
            raise StoreError(f"{self.folder}: has no split {name!r}, only {', '.join(self.splits)}")
        return Split(self.folder, name, self.alphabet)

    def verify(self, advance: Callable[[int], None] | None = None) -> None:
        """Compare every file with its hash in the manifest.

        Raises:
            StoreError: one differs.
        """
        verify(self.folder, self.manifest, advance)
