"""CSV: a row for each sequence, a column for each number of its vectors.

After the columns of ``StoredRecord`` come ``embedding_mean_layer6_0``, ``embedding_mean_layer6_1`` and so on: pooling,
layer, and place in the vector. Numbers have the fewest digits that give the same float back. A CSV file has no place
for the settings; they are in the run file beside it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from protea.embed.stores import Array, ArrayLayout, Arrays, Contents, State, StoredRecord, record_of
from protea.output import WRITTEN, read_run

_COLUMN: Final = re.compile(r"embedding_(\w+)_layer(\d+)_(\d+)")


class CsvStore:
    """Writes a file, row by row."""

    def __init__(self, work: Path, layout: ArrayLayout, state: State | None) -> None:
        self._path = work / "data.csv"
        self._file = self._path.open("a", newline="", encoding="utf-8")
        self._file.truncate(state["size"] if state else 0)
        self._rows = csv.writer(self._file, lineterminator="\n")
        if not state:
            columns = product(layout.kinds, layout.layers, range(layout.width))
            vectors = [f"embedding_{kind}_layer{layer}_{place}" for kind, layer, place in columns]
            self._rows.writerow([*StoredRecord._fields, *vectors])

    def write(self, record: StoredRecord, arrays: Mapping[str, Array]) -> None:
        """Add a row."""
        numbers = np.concatenate([array.reshape(-1) for array in arrays.values()])
        self._rows.writerow([*record, *numbers.astype(str)])

    def commit(self) -> State:
        """Flush."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"size": os.fstat(self._file.fileno()).st_size}

    def finish(self, provenance: Mapping[str, Any]) -> Path:
        """Close; the run file holds the provenance."""
        self._file.close()
        return self._path

    def abandon(self) -> None:
        """Close. Opening the store again cuts off rows written after the commit."""
        with suppress(OSError):
            self._file.close()


def read(path: Path) -> Contents:
    """Read a finished file, and the run file beside it."""
    provenance = read_run(path)
    provenance.pop(WRITTEN, None)
    with path.open(newline="", encoding="utf-8") as stream:
        columns = [match for name in next(csv.reader(stream)) if (match := _COLUMN.fullmatch(name))]
    kinds = tuple(dict.fromkeys(column[1] for column in columns))
    layers = tuple(dict.fromkeys(int(column[2]) for column in columns))
    layout = ArrayLayout(kinds, layers, len(columns) // (len(kinds) * len(layers)), provenance["store"])
    return Contents(provenance, layout, _entries(path, layout))


def _entries(path: Path, layout: ArrayLayout) -> Iterator[tuple[StoredRecord, Callable[[], Arrays]]]:
    fields = StoredRecord._fields
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader(stream)
        next(rows)
        for row in rows:
            record = record_of(dict(zip(fields, row, strict=False)))
            yield record, partial(dict, _arrays(row[len(fields) :], layout))


def _arrays(cells: list[str], layout: ArrayLayout) -> Arrays:
    shape = (len(layout.kinds), len(layout.layers), layout.width)
    # By way of float64: a decimal number of at most nine digits keeps its float32.
    return dict(zip(layout.kinds, np.array(cells, np.float64).astype(layout.dtype).reshape(shape), strict=True))
