"""Files of embeddings, one module a format; ``open_store`` picks by the file's suffix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from protea.embed.engine import Encoded, FloatArray
from protea.errors import OutputError, UsageError

SEQUENCE_SUFFIXES: Final = (".parquet", ".h5", ".hdf5")
RESIDUE_SUFFIXES: Final = (".h5", ".hdf5")


class Store(Protocol):
    """Takes embeddings one record at a time."""

    def write(self, encoded: Encoded, arrays: Mapping[str, FloatArray]) -> None:
        """Add a record: by pooling name, ``[N, ...]`` arrays with an axis for layers."""

    def close(self) -> None:
        """Write what is left."""


def check_path(path: Path, suffixes: tuple[str, ...], option: str, *, overwrite: bool) -> None:
    """Refuse an output that no store can write, before any work is done.

    Raises:
        UsageError: the suffix names no format.
        OutputError: the file exists, or its folder does not.
    """
    if path.suffix not in suffixes:
        raise UsageError(f"{option} {path}: unknown suffix {path.suffix!r}; use {' or '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; create it first")


@contextmanager
def open_store(path: Path, layers: tuple[int, ...], settings: Mapping[str, Any]) -> Iterator[Store]:
    """A store that appears under its name only when complete.

    Args:
        path: where to; the suffix picks the format.
        layers: the layers of every array's first axis.
        settings: what was run, kept inside the file as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.touch()  # a folder that cannot be written is found now, not after the first megabytes
        try:
            store = _create(temporary, path.suffix, layers, settings)
            try:
                yield store
            finally:
                store.close()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _create(path: Path, suffix: str, layers: tuple[int, ...], settings: Mapping[str, Any]) -> Store:
    if suffix == ".parquet":
        from protea.embed.stores.parquet import ParquetStore

        return ParquetStore(path, layers, settings)
    from protea.embed.stores.h5 import H5Store

    return H5Store(path, layers, settings)
