"""A folder with one ``.pt`` file per record, with the keys of fair-esm's ``esm-extract``, and an ``index.csv``.

``torch.load(file)`` gives ``label``, and for each kind asked for a dictionary by layer: ``representations`` ``[L, D]``,
``mean_representations`` ``[D]``, ``bos_representations``, ``max_representations``, ``std_representations``. Predictions
are tensors: ``log_probabilities`` ``[L, letters]`` and ``entropy`` ``[L]``, and ``letters`` names the columns.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from protea.embed.stores import (
    PREDICTIONS,
    RESIDUES,
    Array,
    ArrayLayout,
    Arrays,
    Contents,
    State,
    StoredRecord,
    file_name,
    record_of,
)

_INDEX: Final = "index.csv"
_SETTINGS: Final = "protea.json"
_COLUMNS: Final = ("id", "file", "length", "truncated_from", "description", "sequence_sha256")


class FolderStore:
    """Writes a folder."""

    def __init__(self, work: Path, layout: ArrayLayout, state: State | None) -> None:
        self._folder = work / "data"
        self._layout = layout
        self._folder.mkdir(exist_ok=True)
        self._index = (self._folder / _INDEX).open("a+", newline="", encoding="utf-8")
        self._index.truncate(state["index"] if state else 0)
        self._index.seek(0)
        known = {row["file"] for row in csv.DictReader(self._index)}
        for path in self._folder.iterdir():  # files written after the commit
            if path.name not in known | {_INDEX}:
                path.unlink()
        self._rows = csv.writer(self._index)
        if not state:
            self._rows.writerow(_COLUMNS)

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a file and a line of the index."""
        contents: dict[str, Any] = {"label": record.id}
        for kind, array in arrays.items():
            # A view would be saved with its whole pack; so copy.
            tensors = [torch.from_numpy(np.array(values)) for values in array]
            by_layer = dict(zip(self._layout.layers, tensors, strict=True))
            contents[_key(kind)] = tensors[0] if kind in PREDICTIONS else by_layer
        if self._layout.letters:
            contents["letters"] = self._layout.letters
        name = f"{file_name(record.id)}.pt"
        with (self._folder / name).open("xb") as stream:
            torch.save(contents, stream)
        row = record._asdict() | {"file": name}
        self._rows.writerow([row[column] for column in _COLUMNS])

    def commit(self) -> State:
        """Flush the index."""
        self._index.flush()
        os.fsync(self._index.fileno())
        return {"index": os.fstat(self._index.fileno()).st_size}

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Write the layout and the provenance; close the index."""
        described = {"layout": self._layout.to_json(), "protea": dict(provenance)}
        (self._folder / _SETTINGS).write_text(json.dumps(described))
        self._index.close()
        return self._folder

    def abandon(self) -> None:
        """Close. Opening the store again removes files written after the commit."""
        with suppress(OSError):
            self._index.close()


def read(path: Path) -> Contents:
    """Read a finished folder."""
    described = json.loads((path / _SETTINGS).read_text())
    layout = ArrayLayout.from_json(described["layout"])
    return Contents(described["protea"], layout, _entries(path, layout.kinds))


def _entries(path: Path, kinds: tuple[str, ...]) -> Iterator[tuple[StoredRecord, Callable[[], Arrays]]]:
    with (path / _INDEX).open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            yield record_of(row), partial(_arrays, path / row["file"], kinds)


def _arrays(path: Path, kinds: tuple[str, ...]) -> Arrays:
    contents = torch.load(path, weights_only=True)
    stored = {kind: contents[_key(kind)] for kind in kinds}
    tensors = {kind: [value] if kind in PREDICTIONS else list(value.values()) for kind, value in stored.items()}
    return {kind: np.stack([tensor.numpy() for tensor in values]) for kind, values in tensors.items()}


def _key(kind: str) -> str:
    if kind in PREDICTIONS:
        return kind
    return "representations" if kind == RESIDUES else f"{kind}_representations"
