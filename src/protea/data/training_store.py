"""Reads a store of training data: clusters of sequences as token ids, mapped into memory.

For each of ``train``, ``valid`` and ``test`` that was made, the folder holds two Arrow IPC files, which any Arrow
library can read. Opening one only reads the places of its record batches. Rows are then gathered, thousands at a time,
from the mapped file.
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
from protea.data.manifest import Manifest, name_of, read_manifest
from protea.data.writer import CLUSTERS, ROWS, SEQUENCES
from protea.errors import StoreError

Rows = NDArray[np.integer[Any]]


class _MappedFile:
    """An Arrow IPC file of batches with the same number of rows."""

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                self._buffer = source.read_buffer()
            reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
            self._batch_rows = int(reader.schema.metadata[ROWS.encode()])
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read: {error}; build the store again") from error
        self.bytes = np.frombuffer(self._buffer, np.uint8)
        self.rows = sum(batch.num_rows for batch in self._batches)

    def numbers(self, name: str, dtype: Any) -> Callable[[Rows], NDArray[np.int64]]:
        """A function that gives the values of a column of numbers in some rows."""
        words, starts = self._located([batch.column(name) for batch in self._batches], dtype)
        size = self._batch_rows

        def look_up(rows: Rows) -> NDArray[np.int64]:
            values: NDArray[np.int64] = words[starts[rows // size] + rows % size].astype(np.int64)
            return values

        return look_up

    def spans(self, name: str) -> Callable[[Rows], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """A function that gives, for a column of lists, where in ``bytes`` each begins and how long it is."""
        columns = [batch.column(name) for batch in self._batches]
        words, offsets = self._located(columns, np.int32)
        _, values = self._located([column.values for column in columns], np.uint8)
        size = self._batch_rows

        def look_up(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            batch = rows // size
            places = offsets[batch] + rows % size
            begins = words[places]
            return values[batch] + begins, (words[places + 1] - begins).astype(np.int64)

        return look_up

    def text(self, name: str, rows: Rows) -> list[str]:
        """The values of a column of text in some rows."""
        places = [divmod(int(row), self._batch_rows) for row in rows]
        return [self._batches[batch].column(name)[row].as_py() for batch, row in places]

    def _located(self, arrays: list[pa.Array], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The file as an array of numbers, and the index in it of the first number of each array."""
        width = np.dtype(dtype).itemsize
        buffers = [array.buffers()[1] for array in arrays]
        begins = [0 if buffer is None else buffer.address - self._buffer.address for buffer in buffers]
        return self.bytes[: len(self.bytes) // width * width].view(dtype), np.array(begins, np.int64) // width


class StoreSplit:
    """The clusters and sequences of one split; ``clusters`` and ``sequences`` are their numbers.

    Attributes:
        tokens: all bytes of the file of sequences, mapped.
        starts: gives the first sequence of each of some clusters.
        counts: gives the number of sequences of each of some clusters; a cluster's sequences are neighbours.
        spans: gives where in ``tokens`` each of some sequences begins, and its length.
    """

    def __init__(self, folder: Path, name: str, alphabet: Alphabet) -> None:
        self.name, self.alphabet = name, alphabet
        self._sequences, self._clusters = _MappedFile(folder / name / SEQUENCES), _MappedFile(folder / name / CLUSTERS)
        self.tokens = self._sequences.bytes
        self.clusters, self.sequences = self._clusters.rows, self._sequences.rows
        self.starts = self._clusters.numbers("start", np.uint64)
        self.counts = self._clusters.numbers("count", np.uint32)
        self.spans = self._sequences.spans("tokens")

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
    """A store of training data, for a model with the same alphabet."""

    def __init__(self, folder: str | Path, alphabet: Alphabet) -> None:
        self.folder, self.alphabet = Path(folder), alphabet
        self.manifest: Manifest = read_manifest(self.folder)
        self.splits: tuple[str, ...] = tuple(self.manifest["splits"])
        if tuple(self.manifest["alphabet"]["tokens"]) != alphabet.tokens:
            raise StoreError(
                f"{folder}: has the {self.manifest['alphabet']['name']} alphabet, the model has {alphabet.name}; build "
                f"the store again for the alphabet {name_of(alphabet)}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the hashes of its files."""
        hashes = sorted((name, file["sha256"]) for name, file in self.manifest["files"].items())
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def split(self, name: str) -> StoreSplit:
        """Open a split."""
        if name not in self.splits:
            raise StoreError(f"{self.folder}: has no split {name!r}, only {', '.join(self.splits)}")
        return StoreSplit(self.folder, name, self.alphabet)
