"""Contact maps on disk: whole in HDF5, or their likely pairs in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from protea.disk import unfinished
from protea.embed.names import store_name
from protea.errors import OutputError, UsageError
from protea.infer.runner import FloatArray
from protea.tables import Beside, check_output, write_table


class Maps(Protocol):
    """Where maps go."""

    def add(self, name: str, sequence: str, probabilities: FloatArray) -> None:
        """One protein's map ``[L, L]``."""

    def finish(self, beside: Beside) -> None:
        """Give the output its name, with what lies beside it."""

    def abandon(self) -> None:
        """Leave nothing behind but what is finished."""


def check_maps(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        UsageError: the suffix names no format.
        OutputError: it exists, or its folder does not.
    """
    try:
        check_output(path, overwrite=overwrite, others=(".h5",))
    except UsageError as error:
        raise UsageError(f"{path}: no kind of contacts; name a .h5, or a .csv, .tsv or .parquet of pairs") from error


def open_maps(path: Path, *, least: float, apart: int) -> Maps:
    """What a path's suffix means.

    Args:
        path: checked before.
        least: probability of a pair in a table.
        apart: residues along the chain between those of a pair in a table.
    """
    return _H5(path) if path.suffix == ".h5" else _Pairs(path, least, apart)


class _H5:
    """One ``[L, L]`` float32 dataset a protein, named as ``protea embed`` names them."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, unfinished(path)
        try:
            self._file = h5py.File(self._aside, "w", libver=("v108", "v108"), track_order=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error}") from error

    def add(self, name: str, sequence: str, probabilities: FloatArray) -> None:
        try:
            dataset = self._file.create_dataset(store_name(name), data=probabilities)
            dataset.attrs["id"] = name
            dataset.attrs["sequence"] = np.bytes_(sequence)
            dataset.attrs["length"] = len(sequence)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error}") from error

    def finish(self, beside: Beside) -> None:
        try:
            self._file.attrs["protea"] = json.dumps(dict(beside.settings))
            self._file.close()
            beside.write(self._path)
            self._aside.replace(self._path)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error}") from error

    def abandon(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)  # there is none when it was finished


class _Pairs:
    """A row a pair: ``id, i, j, residue_i, residue_j, probability``, residues counted from 1, i before j."""

    def __init__(self, path: Path, least: float, apart: int) -> None:
        self._path, self._least, self._apart = path, least, apart
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("id", "i", "j", "residue_i", "residue_j", "probability")
        }

    def add(self, name: str, sequence: str, probabilities: FloatArray) -> None:
        first, second = np.nonzero(np.triu(probabilities >= self._least, min(self._apart, len(sequence))))
        letters = np.array(list(sequence))
        for column, values in zip(
            self._columns.values(),
            (
                [name] * len(first),
                (first + 1).tolist(),
                (second + 1).tolist(),
                letters[first].tolist(),
                letters[second].tolist(),
                probabilities[first, second].tolist(),
            ),
            strict=True,
        ):
            column.extend(values)

    def finish(self, beside: Beside) -> None:
        import pyarrow as pa

        kinds = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string(), pa.float64())
        schema = pa.schema(list(zip(self._columns, kinds, strict=True)))
        write_table(self._path, pa.table(self._columns, schema=schema), beside)

    def abandon(self) -> None:
        """Nothing was written yet."""
