"""HDF5: one dataset a record at the root, as UniProt distributes its embeddings.

The dataset's name is the record's id with ``/`` as ``%2F``; further poolings are ``id@max`` and so on. With several
layers the first axis is theirs, and the file's attribute ``layers`` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from protea.embed.engine import Encoded, FloatArray
from protea.errors import OutputError


def dataset_name(record_id: str) -> str:
    """The name HDF5 can hold: ``/`` would make groups, ``.`` alone means the root."""
    return "%2E" if record_id == "." else record_id.replace("/", "%2F")


class H5Store:
    """Writes one file. ``truncated_from`` is 0 for a record that was not truncated."""

    def __init__(self, path: Path, layers: tuple[int, ...], settings: Mapping[str, Any]) -> None:
        self._file = h5py.File(path, "w")
        self._file.attrs["protea"] = json.dumps(dict(settings))
        self._file.attrs["layers"] = layers
        self._single = len(layers) == 1

    def write(self, encoded: Encoded, arrays: Mapping[str, FloatArray]) -> None:
        """Add one dataset an array.

        Raises:
            OutputError: the name is taken by another record.
        """
        record = encoded.record
        for number, (kind, array) in enumerate(arrays.items()):
            name = dataset_name(record.id) + (f"@{kind}" if number else "")
            if name in self._file:
                raise OutputError(f"{record.place}: the dataset {name!r} exists already; rename the record")
            dataset = self._file.create_dataset(name, data=array[0] if self._single else array)
            dataset.attrs["id"] = record.id
            dataset.attrs["description"] = record.description
            dataset.attrs["length"] = len(encoded.ids)
            dataset.attrs["truncated_from"] = encoded.truncated_from or 0

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
