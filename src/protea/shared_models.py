"""Parts that all estimators use: models in memory, vectors in a cache, and scikit-learn's columns of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Annotated, Any, Final

import numpy as np

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.embed import embeddings
from protea.embed.embeddings import POOLINGS, Asked, Embedding
from protea.embed.prepare import EncodedRecord, Long
from protea.embed.vector_cache import VectorCache
from protea.errors import UsageError
from protea.finetune.examples import EncodedExamples
from protea.finetune.features import Features
from protea.finetune.frozen import Source
from protea.finetune.heads import RESIDUES
from protea.finetune.members import Trainer
from protea.finetune.predictor import Predictor
from protea.infer.loading import LoadedModel, ModelLoader
from protea.infer.runner import FloatArray
from protea.language_model import LanguageModel, load
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.progress import Progress
from protea.score.expected import runner_for
from protea.text import shown
from protea.trained import TrainedPredictor

_MODELS: Final = 2
"""So many models stay in memory; a search over models drops the others."""

_OPENING: Final = RLock()

_FORMAT: Final = 1
"""Of the cache; another number for a version whose vectors are others."""

CacheFolder = Annotated[Path, "the path of a folder"] | None
"""What estimators take as ``cache``."""


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

    def embed(
        self,
        records: Sequence[EncodedRecord],
        asked: Asked,
        *,
        long: Long,
        cache: str | Path | None = None,
        token_budget: int | None = None,
    ) -> Iterator[Embedding]:
        """The vectors of records under the policy ``long``, in order; each distinct sequence is computed once.

        A folder as ``cache`` gives those that it has, and receives the vectors of all layers and poolings of the
        others. The caller holds the lock.
        """
        stored, whole = (None, asked) if cache is None else self._opened_cache(Path(cache), long)
        places = [whole.layers.index(layer) for layer in asked.layers]
        known: dict[str, dict[str, FloatArray]] = {}
        missing: dict[str, EncodedRecord] = {}
        for sequence, record in {record.record.sequence: record for record in records}.items():
            vectors = stored and {
                name: [stored.get(sequence, whole.poolings.index(name), place) for place in places]
                for name in asked.poolings
            }
            if not vectors or any(vector is None for found in vectors.values() for vector in found):
                missing[sequence] = record
            else:
                known[sequence] = {name: np.array(found) for name, found in vectors.items()}
        if missing:
            runner = runner_for(self.loaded.module, token_budget)
            for computed in embeddings.embed(runner, missing.values(), whole):
                sequence = computed.encoded.record.sequence
                if stored is not None:
                    stored.put(sequence, np.stack([computed.pooled[name] for name in whole.poolings]))
                known[sequence] = {name: computed.pooled[name][places] for name in asked.poolings}
        for record in records:
            yield Embedding(record, known[record.record.sequence], None)

    def _opened_cache(self, folder: Path, long: Long) -> tuple[VectorCache, Asked]:
        """The cache for what the vectors depend on, and all that it stores of a sequence."""
        config, frame = self.outline.config, self.outline.alphabet.frame
        poolings = tuple(name for name in POOLINGS if name != "bos" or frame.bos is not None)
        asked = Asked(layers=tuple(range(config.num_hidden_layers + 1)), poolings=poolings)
        settings = {
            "format": _FORMAT,
            "weights": self.weights,
            "family": config.family,
            "config": {name: str(value) for name, value in asdict(config).items()},
            "dtype": self.dtype,
            "computed_on": "any" if self.dtype == "float32" else self.device.partition(":")[0],
            "long": long,
            "poolings": poolings,
        }
        return VectorCache(folder, settings, (len(poolings), len(asked.layers), config.hidden_size)), asked


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


@dataclass(frozen=True)
class SharedLoader(ModelLoader):
    """Gives the model that all estimators of a process share."""

    def __call__(self, model: str) -> LoadedModel:
        """The model of a name."""
        return opened(model, self.device, self.dtype).loaded.loaded


@dataclass(frozen=True, kw_only=True)
class _CachedSource(Source):
    """Takes vectors of sequences from a cache, and those of residues from the model."""

    shared: SharedModel
    long: Long
    cache: Path

    def features(
        self, prepared: EncodedExamples, reads: str, layers: tuple[int, ...], name: str, progress: Progress
    ) -> Features:
        """Hidden states of all sequences."""
        if reads == RESIDUES:
            return super().features(prepared, reads, layers, name, progress)
        found = self.shared.embed(
            prepared.sequences,
            Asked(layers=layers, poolings=(reads,)),
            long=self.long,
            cache=self.cache,
            token_budget=self.token_budget,
        )
        values = np.stack([embedding.pooled[reads] for embedding in found])
        return Features(values, np.arange(len(values) + 1), layers)


@dataclass(frozen=True, kw_only=True)
class CachedTrainer(Trainer):
    """Takes vectors of the model as it is from a cache."""

    shared: SharedModel
    cache: Path

    def _source(self, model: Encoder, name: str, identity: dict[str, Any]) -> Source:
        source = super()._source(model, name, identity)
        if model is not self.loaded.module:
            return source
        return _CachedSource(**vars(source), shared=self.shared, long=self.settings.long, cache=self.cache)


class CachedPredictor(TrainedPredictor):
    """Takes vectors of sequences from a cache."""

    def __init__(self, predictor: Predictor, shared: SharedModel, cache: Path) -> None:
        super().__init__(predictor)
        self._shared, self._cache = shared, cache

    def _embed(
        self, records: list[EncodedRecord], asked: Asked, long: Long, token_budget: int | None
    ) -> Iterator[Embedding]:
        return self._shared.embed(records, asked, long=long, cache=self._cache, token_budget=token_budget)


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
