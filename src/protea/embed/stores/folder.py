"""A folder with one ``.pt`` file per record, with the keys of fair-esm's ``esm-extract``, and an ``index.csv``.

``torch.load(file)`` gives ``label``, and a dictionary by layer for each requested kind: ``representations`` ``[L, D]``,
``mean_representations`` ``[D]``, ``bos_representations``, ``max_representations``, ``std_representations``.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from protea.embed.stores import RESIDUES, Array, ArrayLayout, Contents, State, StoredRecord, file_name

_INDEX: Final = "index.csv"
_SETTINGS: Final = "protea.json"
_COLUMNS: Final = ("id", "file", "length", "truncated_from", "description")


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
            # Copy, because a view would be saved with its whole pack.
            contents[_key(kind)] = {
                layer: torch.from_numpy(np.array(values))
                for layer, values in zip(self._layout.layers, array, strict=True)
            }
        name = f"{file_name(record.id)}.pt"
        with (self._folder / name).open("xb") as stream:
            torch.save(contents, stream)
        self._rows.writerow([record.id, name, record.length, record.truncated_from, record.description])

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
    return Contents(described["protea"], layout, _records(path, layout.kinds))


def _records(path: Path, kinds: tuple[str, ...]) -> Iterator[tuple[StoredRecord, dict[str, Array]]]:
    with (path / _INDEX).open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            truncated_from = int(row["truncated_from"]) if row["truncated_from"] else None
            record = StoredRecord(row["id"], row["description"], int(row["length"]), truncated_from)
            contents = torch.load(path / row["file"], weights_only=True)
            layers = {kind: contents[_key(kind)].values() for kind in kinds}
            arrays = {kind: np.stack([values.numpy() for values in layers[kind]]) for kind in kinds}
            yield record, arrays


def _key(kind: str) -> str:
    return "representations" if kind == RESIDUES else f"{kind}_representations"
