"""Formats of embedding files, one module each; the suffix of the path chooses."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Final

from protea.embed.stores.protocol import RESIDUES, Array, ArrayLayout, Contents, EmbeddingStore, State, StoredRecord
from protea.errors import UsageError

__all__ = [
    "RESIDUES",
    "Array",
    "ArrayLayout",
    "Contents",
    "EmbeddingStore",
    "State",
    "StoredRecord",
    "is_output_folder",
    "kind_of",
    "open_store",
    "read_store",
]

_SUFFIXES: Final = {".h5": "h5", ".hdf5": "h5", ".parquet": "parquet", "": "folder"}
_CLASSES: Final = {"h5": "H5Store", "parquet": "ParquetStore", "folder": "FolderStore"}


def kind_of(path: Path, option: str) -> str:
    """The format of an output path: ``h5``, ``parquet`` or ``folder``.

    Raises:
        UsageError: the suffix names no format.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"{option} {path}: unknown suffix {path.suffix!r}; use .parquet, .h5, or a name without suffix for a folder"
        )
    return _SUFFIXES[path.suffix]


def open_store(kind: str, work: Path, layout: ArrayLayout, state: State | None) -> EmbeddingStore:
    """Open a store for writing.

    Args:
        kind: from ``kind_of``.
        work: an existing folder that only this store uses.
        layout: of the arrays.
        state: the commit to continue from; ``None`` starts an empty store.
    """
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
