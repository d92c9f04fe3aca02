"""Protea in scikit-learn: a transformer from columns of sequences to vectors, and estimators (``estimators.py``)."""

# scikit-learn has no types, so its base classes are Any.
# mypy: disable-error-code="misc"

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, get_type_hints

import numpy as np

from protea import bundled
from protea import sequences as door
from protea.arguments import check
from protea.device import resolve_device
from protea.embed.embeddings import Asked, check_poolings, resolve_layers
from protea.embed.prepare import EncodedRecord, Long
from protea.errors import CheckpointError
from protea.estimators import ProteaClassifier, ProteaRegressor
from protea.infer.runner import FloatArray
from protea.language_model import Device, Dtype, ModelName, under_policy
from protea.optional import extra
from protea.shared_models import CacheFolder, SharedModel, column, no_column, opened

with extra("sklearn", "protea.sklearn needs scikit-learn"):
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

__all__ = ["EmbeddingTransformer", "ProteaClassifier", "ProteaRegressor"]


class EmbeddingTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turns a column of sequences into an array ``[N, D]`` float32, one vector per sequence.

    A column is a list or an array of sequences, an array or a table with one column, or a ``Series`` of pandas or
    polars; ``docs/python.md`` says what a sequence is. A sequence that comes several times is computed once. Nothing is
    learned: ``fit`` checks the column and the settings, and ``transform`` needs no ``fit``.

    The model is loaded when something must be computed, once per process, and shared by all transformers with the same
    ``model``, ``device`` and ``dtype``. A pickle holds the SHA-256 of the weights, not the weights; a transformer that
    was read from a pickle refuses a model with other weights.

    Args:
        model: a published name, a Hugging Face repository, or a checkpoint, as for ``protea.load``.
        layer: 0 is the embedding, -1 the last layer after its norm.
        pool: ``mean``, ``max``, ``std`` or ``bos``.
        dtype: what to compute in, as for ``protea.load``.
        device: as for ``protea.load``.
        long: the policy for a sequence over the model's limit: ``truncate``, ``window``, ``full`` or ``error``.
        cache: a folder that keeps vectors for this process and others. It is created if it is missing. One pass through
            the model stores the vectors of all layers and poolings, so that a search over them computes each sequence
            once. Its entries depend on the weights, on ``dtype`` and ``long``, and, except in float32, on the kind of
            device.
        token_budget: the number of tokens computed at a time, which bounds memory.
    """

    def __init__(
        self,
        model: str | Path = bundled.NAME,
        *,
        layer: int = -1,
        pool: str = "mean",
        dtype: str = "float32",
        device: Device = "auto",
        long: Long = "truncate",
        cache: str | Path | None = None,
        token_budget: int | None = None,
    ) -> None:
        self.model = model
        self.layer = layer
        self.pool = pool
        self.dtype = dtype
        self.device = device
        self.long = long
        self.cache = cache
        self.token_budget = token_budget

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Check the settings and the column; nothing is learned and nothing computed."""
        self._read(X)
        return self

    def transform(self, X: Any) -> FloatArray:  # noqa: N803
        """The vectors ``[N, D]`` of a column, in its order."""
        records = self._read(X)
        model = self._model()
        if not records:
            return np.empty((0, model.outline.config.hidden_size), np.float32)
        asked = Asked(layers=resolve_layers([self.layer], model.outline), poolings=(self.pool,))
        with model.lock:
            found = model.embed(records, asked, long=self.long, cache=self.cache, token_budget=self.token_budget)
            return np.stack([embedding.pooled[self.pool][0] for embedding in found])

    def fit_transform(self, X: Any, y: Any = None) -> FloatArray:  # noqa: N803
        """``transform``, which checks what ``fit`` checks."""
        return self.transform(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pickled": (self.model, self._model().weights)}

    @property
    def _n_features_out(self) -> int:
        return self._model().outline.config.hidden_size

    def _read(self, X: Any) -> list[EncodedRecord]:  # noqa: N803
        """The sequences of a column, checked and under the policy for length; checks the settings first."""
        model = self._model()
        resolve_layers([self.layer], model.outline)
        check_poolings([self.pool], model.outline.alphabet.frame)
        given = door.read(column(X), model.outline.alphabet)
        if given.single:
            raise no_column(X)
        return under_policy(given, model.outline, self.long)

    def _model(self) -> SharedModel:
        """The model of the settings; ``CheckpointError`` if a pickle of this transformer had other weights."""
        hints = get_type_hints(EmbeddingTransformer.__init__, include_extras=True)
        special = {"model": ModelName, "cache": CacheFolder, "dtype": Dtype}
        for name, value in self.get_params(deep=False).items():
            check(name, value, special.get(name, hints[name]))
        model = opened(str(self.model), str(resolve_device(str(self.device))), self.dtype)
        name, weights = getattr(self, "_pickled", (None, []))
        if name == self.model and weights != model.weights:
            raise CheckpointError(
                f"{self.model}: its weights differ from those that this transformer had when it was pickled (SHA-256 "
                f"{', '.join(model.weights)} now, {', '.join(weights)} then); restore them, or make a new transformer"
            )
        return model
