"""What all estimators of a process share: the models in memory; and columns of sequences as scikit-learn has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, Final

import numpy as np

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.errors import UsageError
from protea.language_model import LanguageModel, load
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.text import shown

_MODELS: Final = 2
"""So many models stay in memory; a search over models drops the others."""

_OPENING: Final = RLock()


@dataclass(frozen=True)
class SharedModel:
    """A model that all estimators of a process share; its weights are read when they are first needed.

    ``outline`` is on the meta device, without weights. ``lock`` lets one thread at a time load and compute.
    """

    name: str
    device: str
    dtype: str
    outline: Encoder
    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]
    lock: Any = field(default_factory=RLock)

    @cached_property
    def loaded(self) -> LanguageModel:
        """The model with its weights."""
        return load(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def weights(self) -> list[str]:
        """SHA-256 of the weight files, in order."""
        return sorted(map(sha256, self.files))


@lru_cache(maxsize=_MODELS)
def _shared(name: str, device: str, dtype: str) -> SharedModel:
    with open_checkpoint(locate(name)) as checkpoint:
        files = tuple(checkpoint.tensors.paths)
        return SharedModel(name, device, dtype, checkpoint.model, files, _stamps(files))


def opened(name: str, device: str, dtype: str) -> SharedModel:
    """The shared model; opened again if its files have changed."""
    with _OPENING:
        model = _shared(name, device, dtype)
        if all(path.exists() for path in model.files) and _stamps(model.files) == model.stamps:
            return model
        _shared.cache_clear()
        return _shared(name, device, dtype)


def _stamps(files: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((status.st_mtime_ns, status.st_size) for status in (path.stat() for path in files))


def column(values: Any) -> Any:
    """A column in a form for ``protea.sequences``, which refuses lists of letters.

    The column of a table is a mapping of its rows: its values are sequences, be they single letters, and not labels.
    """
    if isinstance(values, Mapping) or not hasattr(values, "__len__"):  # a generator would be empty after ``fit``
        raise no_column(values)
    kinds = {kind.__name__ for kind in type(values).__mro__}
    if "DataFrame" in kinds:
        _check_width(values, len(values.columns))
        values = values[values.columns[0]]
    if isinstance(values, np.ndarray) and values.ndim > 1:
        _check_width(values, 0 if values.ndim > 2 else values.shape[1])
        return dict(enumerate(values[:, 0]))
    return dict(enumerate(values)) if kinds & {"DataFrame", "Series"} else values


def no_column(values: Any) -> UsageError:
    """The error for what is no column of sequences."""
    given = f"{shown(values)} ({type(values).__name__})"
    return UsageError(f"X: got {given}; give a list of sequences, or a table with one column")


def _check_width(values: Any, columns: int) -> None:
    if columns != 1:
        raise UsageError(
            f"X: got a {type(values).__name__} of shape {shown(values.shape)}; give one column, as in "
            "table['sequence'], or name it in a ColumnTransformer"
        )
