"""Parquet: one row a sequence, one column a pooling and layer.

The column is ``embedding`` when there is one; with several poolings ``embedding_mean``, with several layers
``embedding_layer6``, with both ``embedding_mean_layer6``. ``truncated_from`` is null for a record that was not
truncated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protea.embed.engine import Encoded, FloatArray

_ROW_GROUP_BYTES: Final = 32 << 20


class ParquetStore:
    """Writes one file, a row group at a time."""

    def __init__(self, path: Path, layers: tuple[int, ...], settings: Mapping[str, Any]) -> None:
        self._path = path
        self._layers = layers
        self._metadata = {b"protea": json.dumps(dict(settings)).encode()}
        self._records: list[Encoded] = []
        self._vectors: dict[str, list[FloatArray]] = {}
        self._bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, encoded: Encoded, arrays: Mapping[str, FloatArray]) -> None:
        """Add one row."""
        self._records.append(encoded)
        for kind, array in arrays.items():
            for layer, vector in zip(self._layers, array, strict=True):
                self._vectors.setdefault(self._column(kind, layer, len(arrays)), []).append(vector)
            self._bytes += array.nbytes
        if self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the last row group and the footer."""
        if self._records:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _column(self, kind: str, layer: int, kinds: int) -> str:
        name = "embedding"
        if kinds > 1:
            name += f"_{kind}"
        if len(self._layers) > 1:
            name += f"_layer{layer}"
        return name

    def _flush(self) -> None:
        columns = {
            "id": pa.array([item.record.id for item in self._records], pa.string()),
            "description": pa.array([item.record.description for item in self._records], pa.string()),
            "length": pa.array([len(item.ids) for item in self._records], pa.int64()),
            "truncated_from": pa.array([item.truncated_from for item in self._records], pa.int64()),
        }
        for name, vectors in self._vectors.items():
            matrix = np.stack(vectors)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
        table = pa.table(columns).replace_schema_metadata(self._metadata)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        self._records, self._vectors, self._bytes = [], {}, 0
