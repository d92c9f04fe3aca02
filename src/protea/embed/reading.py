"""Read the outputs of ``protea embed`` in any format, for NumPy, pandas, polars and AnnData.

Shapes: N sequences, L residues of one, R residues of all, D model width. Several poolings or layers add an axis, in
their order, as in ``LanguageModel.embed``: ``[N, n_pools, n_layers, D]``, ``[n_layers, L, D]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protea.arguments import check
from protea.embed.finished import reading
from protea.embed.stores import RESIDUES, Array, ArrayLayout, StoredRecord, by_residue, kind_of, read_store
from protea.errors import OutputError, UsageError
from protea.optional import extra

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame
    from polars import DataFrame as PolarsFrame


def read_embeddings(path: str | Path) -> StoredEmbeddings:
    """Read a finished output of ``protea embed``, ``-o`` or ``-r``, into memory: HDF5, Parquet, CSV, NPZ or a folder.

    ``OutputError`` if it is missing, damaged or holds other arrays; ``UsageError`` for an unknown suffix.
    """
    check("path", path, Path)
    path = Path(path)
    kind = kind_of(path, "path")
    if not path.exists():
        raise OutputError(f"{path}: there is no such file or folder; give the path after -o or -r of protea embed")
    with reading(path, "is damaged, or protea embed did not write it", "give a finished output, or compute it again"):
        contents = read_store(path, kind)
        kinds = contents.layout.kinds
        if any(by_residue(kind) and kind != RESIDUES for kind in kinds):
            raise OutputError(f"{path}: holds predictions (--logits), not embeddings; docs/embedding.md describes it")
        records, arrays = [], []
        for record, of_record in contents.records:
            records.append(record)
            arrays.append(of_record)
    layout = contents.layout
    poolings = tuple(kind for kind in kinds if kind != RESIDUES)
    axes = 0 if len(poolings) == 1 else slice(None), 0 if len(layout.layers) == 1 else slice(None)
    pooled: Array | None = None
    if poolings:
        shape = (len(records), len(poolings), len(layout.layers), layout.width)
        stacked = np.array([[one[kind] for kind in poolings] for one in arrays], layout.dtype).reshape(shape)
        pooled = stacked[:, *axes]
    residues = [one[RESIDUES][axes[1]] for one in arrays] if RESIDUES in kinds else None
    return StoredEmbeddings(records, pooled, residues, poolings, layout, contents.provenance)


@dataclass(frozen=True, eq=False, repr=False)
class StoredEmbeddings:
    """Embeddings as ``protea embed`` stored them, in the order of its input.

    Attributes:
        records: of each sequence its id, description, length and SHA-256.
        pooled: ``[N, D]``; ``None`` if the output has only residues.
        residues: ``[L, D]`` for each sequence; ``None`` if the output has none.
        poolings: the names of the poolings.
        layout: the form of the arrays in the output.
        provenance: the settings and circumstances of the run.
    """

    records: list[StoredRecord]
    pooled: Array | None
    residues: list[Array] | None
    poolings: tuple[str, ...]
    layout: ArrayLayout
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        kinds = ", ".join(self.layout.kinds)
        return f"<StoredEmbeddings of {len(self)} sequences: {kinds}, layers {self.layers}, width {self.layout.width}>"

    @property
    def ids(self) -> list[str]:
        """The ids of the sequences."""
        return [record.id for record in self.records]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers."""
        return self.layout.layers

    @property
    def vectors(self) -> Array | list[Array]:
        """One vector per sequence ``[N, D]``; if the output has only residues, ``[L, D]`` for each sequence."""
        if self.pooled is not None:
            return self.pooled
        return [] if self.residues is None else self.residues

    def to_numpy(self) -> Array:
        """``[N, D]``; if the output has only residues, those of all sequences, ``[R, D]``."""
        if self.pooled is not None:
            return self.pooled
        axes = (0, len(self.layers), self.layout.width) if len(self.layers) > 1 else (0, self.layout.width)
        return np.concatenate([np.empty(axes, self.layout.dtype).swapaxes(0, -2), *(self.residues or [])], axis=-2)

    def to_pandas(self) -> DataFrame:
        """A table with a column for each number and the ids as index, or ids and numbers of residues, from 1."""
        with extra("pandas", "to_pandas needs pandas"):
            import pandas as pd
        index = pd.MultiIndex.from_arrays(list(self._keys().values()), names=list(self._keys()))
        matrix, columns = self._matrix()
        return pd.DataFrame(matrix, index if self.pooled is None else index.get_level_values(0), columns)

    def to_polars(self) -> PolarsFrame:
        """A table with a column for each number, after the column ``id`` and, for residues, ``residue``, from 1."""
        with extra("polars", "to_polars needs polars"):
            import polars as pl
        matrix, columns = self._matrix()
        # polars 1.20 has no float16.
        numbers = matrix.astype(np.float32, copy=False)
        return pl.DataFrame(self._keys()).hstack(pl.from_numpy(numbers, columns))

    def to_anndata(self) -> AnnData:
        """Sequences as observations: vectors in ``obsm["X_MODEL"]``, the provenance as JSON in ``uns["protea"]``.

        Several poolings or layers have an entry each, as ``X_MODEL_mean_layer6``. ``truncated_from`` is 0 for a
        sequence that is not truncated.
        """
        if self.pooled is None:
            raise UsageError(
                "to_anndata takes one vector per sequence, and this output has only residues; read that of -o"
            )
        with extra("anndata", "to_anndata needs anndata"):
            import anndata
            import pandas as pd
        model = f"X_{Path(str(self.provenance.get('model', 'protea'))).name}"
        obsm = {model + name.removeprefix("embedding"): matrix for name, matrix in self._matrices()}
        rows = [record._replace(truncated_from=record.truncated_from or 0) for record in self.records]
        obs = pd.DataFrame(rows, columns=StoredRecord._fields).set_index("id")
        return anndata.AnnData(obs=obs, obsm=obsm, uns={"protea": json.dumps(self.provenance)})

    def _matrices(self) -> Iterator[tuple[str, Array]]:
        """The numbers ``[N, D]`` or ``[R, D]`` of each pooling and layer, by the names that tables give them."""
        kinds = self.poolings or (RESIDUES,)
        names = ArrayLayout(kinds, self.layers, self.layout.width, self.layout.dtype)
        values = self.to_numpy()
        if self.pooled is None:
            matrices = values.reshape(1, len(self.layers), -1, self.layout.width)
        else:
            shape = (len(self), len(kinds), len(self.layers), self.layout.width)
            matrices = np.moveaxis(values.reshape(shape), 0, 2)
        for (place, kind), (row, layer) in product(enumerate(kinds), enumerate(self.layers)):
            yield names.name(kind, layer), matrices[place, row]

    def _matrix(self) -> tuple[Array, list[str]]:
        """All numbers of each row, and the names of their columns."""
        named = list(self._matrices())
        columns = [f"{name}_{place}" for name, _ in named for place in range(self.layout.width)]
        return np.concatenate([matrix for _, matrix in named], axis=1), columns

    def _keys(self) -> dict[str, list[Any]]:
        """The columns that identify a row: ``id``, and for residues ``residue``, their number from 1."""
        if self.pooled is not None:
            return {"id": self.ids}
        places = [(record.id, number + 1) for record in self.records for number in range(record.length)]
        return {"id": [name for name, _ in places], "residue": [number for _, number in places]}
