"""Vectors of sequences kept in a folder, for processes that share it: one file for each sequence.

A file holds the vectors of all poolings and layers, so that one pass through the model serves every choice of them. Its
rows are of one size, a hash and a vector, so that one vector is read without the others. The hash covers the vector,
its place in the file, the sequence and the settings: a file that is cut, altered or misplaced is noticed.

A file is written under another name and renamed, so processes may read, write and be killed at any moment. Nothing is
forced to disk: what a crash of the machine damages is computed again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np

from protea.errors import OutputError, warn
from protea.infer.runner import FloatArray
from protea.output import write_failure

_HASH: Final = 16
_NUMBER: Final = np.dtype("<f4")
_LEFT_BEHIND: Final = 24 * 60 * 60
"""Age in seconds of an unfinished file that no living process can be writing; writing takes milliseconds."""


class VectorCache:
    """The vectors ``[n_pools, n_layers, D]`` of sequences, as computed with the ``settings``, which are plain values.

    Raises ``OutputError`` if the folder cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shape: tuple[int, int, int]) -> None:
        self._shape = shape
        text = json.dumps(dict(settings), sort_keys=True, indent=1)
        self._settings = sha256(text.encode()).digest()
        self._folder = folder / self._settings.hex()
        self._aside = self._folder / "unfinished"
        with _told(folder):
            self._aside.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "settings.json").exists():
                self._write(self._folder / "settings.json", text.encode())
            self._remove_left_behind()

    def get(self, sequence: str, pooling: int, layer: int) -> FloatArray | None:
        """The vector ``[D]`` of a pooling and a layer, by their places; ``None``, with a warning, if it is damaged."""
        path, key = self._place(sequence)
        row = pooling * self._shape[1] + layer
        size = _HASH + self._shape[2] * _NUMBER.itemsize
        try:
            with path.open("rb") as file:
                whole = os.fstat(file.fileno()).st_size == size * self._shape[0] * self._shape[1]
                file.seek(row * size)
                stored = file.read(size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror or error}; name another cache") from error
        if not whole or stored[:_HASH] != self._hash(stored[_HASH:], key, row):
            warn(f"{path}: damaged; the vectors of this sequence are computed and stored again")
            return None
        return np.frombuffer(stored[_HASH:], _NUMBER).astype(np.float32)

    def put(self, sequence: str, vectors: FloatArray) -> None:
        """Store all vectors of a sequence, in place of those that are there."""
        path, key = self._place(sequence)
        if vectors.shape != self._shape:
            raise ValueError(f"vectors {vectors.shape} in a cache of {self._shape}")
        rows = (row.tobytes() for row in vectors.reshape(-1, self._shape[2]).astype(_NUMBER))
        with _told(path):
            path.parent.mkdir(exist_ok=True)
            self._write(path, b"".join(self._hash(data, key, row) + data for row, data in enumerate(rows)))

    def _place(self, sequence: str) -> tuple[Path, bytes]:
        key = sha256(sequence.encode())
        return self._folder / key.hexdigest()[:2] / f"{key.hexdigest()[2:]}.vectors", key.digest()

    def _hash(self, data: bytes, key: bytes, row: int) -> bytes:
        of_all = self._settings[: blake2b.PERSON_SIZE]
        return blake2b(data, digest_size=_HASH, key=key, salt=row.to_bytes(4, "little"), person=of_all).digest()

    def _write(self, path: Path, data: bytes) -> None:
        aside = self._aside / uuid4().hex
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def _remove_left_behind(self) -> None:
        """Remove what killed processes were writing, with a warning."""
        for path in self._aside.iterdir():
            try:
                old = time.time() - path.stat().st_mtime > _LEFT_BEHIND
            except FileNotFoundError:  # another process has just finished it
                continue
            if old:
                path.unlink(missing_ok=True)
                warn(f"{path}: removed; a killed process had left it")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into an ``OutputError``."""
    try:
        yield
    except OSError as error:
        parent = next(folder for folder in (path, *path.parents) if folder.is_dir())
        raise write_failure(error, parent / path.name, "; name another folder as cache") from error
