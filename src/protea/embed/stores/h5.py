"""HDF5: one dataset per record at the root, as UniProt distributes its embeddings.

The dataset's name is the record's id with ``/`` as ``%2F``; further kinds are ``id@max`` and so on. Arrays of several
layers have the layers as first axis, and the file's attribute ``layers`` lists them; ``letters`` lists the columns of
log-probabilities. Iteration gives the order of the input. ``model_name`` and ``original_id`` are the attributes that
ProtSpace and biotrainer read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import h5py

from protea.embed.stores import Array, ArrayLayout, Arrays, Contents, State, StoredRecord, store_name
from protea.embed.stores.rollback import RollbackFile
from protea.errors import ResumeError

_FORMAT: Final = ("v108", "v108")
"""File format of HDF5 1.8: it holds many datasets and long attributes, and every program since 2008 reads it."""


class H5Store:
    """Writes a file. ``truncated_from`` is 0 for a record that is not truncated."""

    def __init__(self, work: Path, layout: ArrayLayout, state: State | None) -> None:
        self._path = work / "data.h5"
        self._layout = layout
        self._raw = RollbackFile(self._path, None if state is None else (state["number"], state["size"]))
        if state is None:
            self._file = h5py.File(self._raw, "w", libver=_FORMAT, track_order=True)
            self._file.attrs["layers"] = layout.layers
            self._file.attrs["layout"] = layout.to_json()
            if layout.letters:
                self._file.attrs["letters"] = layout.letters
        else:
            self._file = h5py.File(self._raw, "r+", libver=_FORMAT)

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add one dataset for each array."""
        level = self._layout.compression
        options = {} if level is None else {"compression": "gzip", "compression_opts": level, "shuffle": True}
        for number, (kind, array) in enumerate(arrays.items()):
            name = store_name(record.id) + (f"@{kind}" if number else "")
            if name in self._file:
                raise ResumeError(f"record {record.id!r} is already in the output: the input changed during the run")
            data = array if len(self._layout.layers) > 1 else array[0]
            dataset = self._file.create_dataset(name, data=data, **options)
            attributes = {"truncated_from": record.truncated_from or 0, "original_id": record.id}
            dataset.attrs.update(record._asdict() | attributes)
        self._raw.check()

    def commit(self) -> State:
        """Flush. The previous commit can be restored until the caller has stored this one."""
        self._raw.forget_older()
        self._file.flush()
        self._raw.check()
        number, size = self._raw.commit()
        return {"number": number, "size": size}

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Write the provenance and close."""
        self._file.attrs["protea"] = json.dumps(dict(provenance))
        self._file.attrs["model_name"] = str(provenance.get("model", ""))
        self._file.close()
        self._raw.check()
        self._raw.close()
        return self._path

    def abandon(self) -> None:
        """Close without writing."""
        self._raw.deaf = True
        with suppress(OSError, RuntimeError, ValueError):
            self._file.close()
        self._raw.close()


def read(path: Path) -> Contents:
    """Read a finished file."""
    with h5py.File(path) as file:
        layout = ArrayLayout.from_json(file.attrs["layout"])
        return Contents(json.loads(file.attrs["protea"]), layout, _entries(path, layout))


def _entries(path: Path, layout: ArrayLayout) -> Iterator[tuple[StoredRecord, Callable[[], Arrays]]]:
    file = h5py.File(path)  # closed when nothing refers to it, arrays still to be read included
    names = iter(file)
    for name in names:
        keys = (name, *islice(names, len(layout.kinds) - 1))
        attributes = file[name].attrs
        record = StoredRecord(
            str(attributes["id"]),
            str(attributes["description"]),
            int(attributes["length"]),
            int(attributes["truncated_from"]) or None,
            str(attributes.get("sequence_sha256", "")),
        )
        yield record, partial(_arrays, file, keys, layout)


def _arrays(file: h5py.File, keys: Sequence[str], layout: ArrayLayout) -> Arrays:
    arrays = [file[key][()] for key in keys]
    return dict(zip(layout.kinds, arrays if len(layout.layers) > 1 else [array[None] for array in arrays], strict=True))
