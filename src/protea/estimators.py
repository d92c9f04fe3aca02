"""scikit-learn's classifier and regressor over columns of sequences: the training and the predictions of the commands.

Both are in ``protea.sklearn``.
"""

# scikit-learn has no types, so its base classes are Any.
# mypy: disable-error-code="misc"

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from protea import bundled
from protea import sequences as door
from protea.alphabet import Alphabet
from protea.arguments import check
from protea.device import resolve_device
from protea.embed.prepare import Long
from protea.errors import DataError, UsageError, warn
from protea.finetune.examples import prepare
from protea.finetune.finetune_settings import FinetuneSettings, parse
from protea.finetune.fitting import Fitted, fit_predictor
from protea.finetune.heads import RESIDUES
from protea.finetune.labelled_data import check_targets
from protea.finetune.members import Trainer, head_of
from protea.finetune.predictor import Predictor, is_predictor, predictor_files, read_predictor, with_encoder
from protea.finetune.splits import calibration, validation
from protea.finetune.tasks import TASKS, Labelled, LabelledExample
from protea.language_model import Device
from protea.letters import ReportRow
from protea.optional import extra
from protea.output import check_output, put_in_place
from protea.progress import SILENT
from protea.shared_models import (
    CachedPredictor,
    CachedTrainer,
    CacheFolder,
    SharedLoader,
    SharedModel,
    column,
    no_column,
    opened,
)
from protea.text import counted, shown
from protea.trained import TrainedPredictor

with extra("sklearn", "protea.sklearn needs scikit-learn"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.validation import check_is_fitted

_OURS: Final = "cache", "model"
"""Options that are no settings of the command, or not in this form."""


class _Estimator(BaseEstimator, ABC):
    """The base class of ``ProteaClassifier`` and ``ProteaRegressor``; ``_labelled`` reads the labels of a task."""

    _task: str
    _files: dict[str, bytes]
    _ready: tuple[Predictor, SharedModel | None]

    def __init__(
        self,
        model: str | Path = bundled.NAME,
        *,
        method: str = "frozen",
        head: str | None = None,
        layer: int | str = -1,
        pool: str = "mean",
        lr: float | list[float] | None = None,
        head_lr: float = 1e-3,
        epochs: float | None = None,
        batch: int | None = None,
        patience: float | None = None,
        rank: int = 8,
        class_weights: bool = False,
        seed: int = 0,
        seeds: int = 1,
        long: Long = "truncate",
        dtype: str = "float32",
        device: Device = "auto",
        cache: str | Path | None = None,
        token_budget: int | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.head = head
        self.layer = layer
        self.pool = pool
        self.lr = lr
        self.head_lr = head_lr
        self.epochs = epochs
        self.batch = batch
        self.patience = patience
        self.rank = rank
        self.class_weights = class_weights
        self.seed = seed
        self.seeds = seeds
        self.long = long
        self.dtype = dtype
        self.device = device
        self.cache = cache
        self.token_budget = token_budget

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:  # noqa: N803
        """Train on a column of sequences and their labels; sequences of one group, ``[N]``, stay together."""
        settings = self._settings()
        load = self._loader()
        loaded = load(str(self.model))
        sequences = _sequences(X, loaded.module.alphabet)
        labelled = self._labelled(sequences, _labels("y", y, len(sequences)))
        check_targets(labelled)
        parts = validation(labelled, None if groups is None else _labels("groups", groups, len(sequences)), self.seed)
        parts = calibration(parts, settings.calibration, self.seed, settings.coverage)
        settings.check(TASKS[self._task])
        head_of(settings, loaded.module, parts)
        rows: list[ReportRow] = []
        prepared = prepare(parts, loaded.module, settings.long, rows)
        for row in rows:
            warn(f"{row.id} {row.what}: {row.detail}")
        shared = self._shared()
        with TemporaryDirectory() as folder, shared.lock:
            trainer = Trainer(settings, loaded, Path(folder), "fit", {}, SILENT)
            if self.cache is not None:
                trainer = CachedTrainer(**vars(trainer), shared=shared, cache=Path(self.cache))
            fitted = fit_predictor(trainer, prepared)
            self._keep(fitted, Path(folder) / "predictor")
            self._ready = fitted.predictor, shared
        self.notes_ = [*parts.notes, *fitted.best.notes, *fitted.calibration.notes]
        return self

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the folder of the predictor, which ``protea predict``, ``load`` and ``protea.load_predictor`` read."""
        check_is_fitted(self)
        folder = Path(folder)
        check_output(folder, overwrite=overwrite, ours=is_predictor)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
            self._write(Path(work) / "complete")
            put_in_place(Path(work) / "complete", folder)

    @classmethod
    def load(
        cls, folder: str | Path, *, model: str | Path | None = None, dtype: str = "float32", device: Device = "auto"
    ) -> Self:
        """The fitted estimator of a folder of ``save`` or ``protea finetune``; ``model`` names its base anew."""
        read = read_predictor(Path(folder))
        if read.task.name != cls._task:
            raise UsageError(f"{folder}: predicts {read.task.name}; {cls.__name__} is for {cls._task}")
        found = cls(
            model or read.base.name,
            method=read.method,
            head=read.head.config.kind,
            layer=read.layer if read.method == "frozen" else -1,
            pool=read.head.config.pool,
            long=read.long,
            dtype=dtype,
            device=device,
        )
        names = [path for path in predictor_files(Path(folder)) if path.suffix in (".json", ".safetensors")]
        found._files = {str(path.relative_to(folder)): path.read_bytes() for path in names}
        found._fitted_as(read)
        found.notes_ = []
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_ready"}

    def _settings(self) -> FinetuneSettings:
        values = {name: value for name, value in self.get_params(deep=False).items() if name not in _OURS}
        check("cache", self.cache, CacheFolder)
        values |= {"device": str(self.device), "data": ["X"], "output": "X", "model": str(self.model)}
        return parse(values, type(self).__name__)

    def _shared(self) -> SharedModel:
        return opened(str(self.model), str(resolve_device(str(self.device))), self.dtype)

    def _loader(self) -> SharedLoader:
        return SharedLoader(str(resolve_device(str(self.device))), self.dtype)

    def _keep(self, fitted: Fitted, folder: Path) -> None:
        """Keep the files of a predictor."""
        folder.mkdir()
        fitted.save(folder)
        self._files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def _write(self, folder: Path) -> None:
        for name, content in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def _outcomes(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Values ``[N]`` or calibrated probabilities ``[N, C]`` of a column."""
        check_is_fitted(self)
        with self._shared().lock if self.method != "full" else nullcontext():
            trained = self._trained()
            named = dict(enumerate(_sequences(X, trained.alphabet)))
            found = list(trained.predict(named, token_budget=self.token_budget).values())
        return np.array(found, np.float64).reshape(len(found), *([len(trained.classes)] if trained.classes else []))

    def _trained(self) -> TrainedPredictor:
        """The predictor of ``fit``, or of the files, which a pickle or a folder had."""
        if not hasattr(self, "_ready"):
            with TemporaryDirectory() as name:
                self._write(folder := Path(name))
                read = read_predictor(folder)
                base = None if read.method == "full" else str(self.model)
                read = with_encoder(read, folder, self._loader(), base)
            self._ready = read, None if read.method == "full" else self._shared()
        predictor, shared = self._ready
        own = predictor.method != "frozen" or predictor.random_seed is not None  # weights that are not the base's
        if self.cache is None or own or shared is None or RESIDUES in predictor.kinds:
            return TrainedPredictor(predictor)
        return CachedPredictor(predictor, shared, Path(self.cache))

    @abstractmethod
    def _labelled(self, sequences: list[str], y: list[Any]) -> Labelled:
        """Labelled examples of sequences ``[N]`` and their labels ``[N]``."""

    def _fitted_as(self, predictor: Predictor) -> None:
        """Set what ``fit`` sets beside the predictor."""

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_files")


class ProteaClassifier(ClassifierMixin, _Estimator):
    """A classifier of sequences: one class for each, with the options of ``protea finetune``.

    A column is a list or an array of sequences, a ``Series`` of pandas or polars, or a table with one column. ``fit``
    draws a tenth of the sequences as a validation part, which chooses penalty, layer, epoch or learning rate; half of
    it or less calibrates instead, if it has 18 or more. Equal sequences stay together, and so do equal ``groups``.

    The fitted predictor is kept as the files of its folder, in memory. A pickle holds these and no weights of the base
    model, unless all of them were trained (``method="full"``); the base must have the same weights when it is used.

    Args:
        model: the base model, as for ``protea.load``.
        method: ``frozen``, ``lora`` or ``full``.
        head: ``linear``, ``mlp`` or ``light-attention``.
        layer: 0 is the embedding, -1 the last layer; ``auto`` takes the best on the validation part (frozen).
        pool: ``mean``, ``max``, ``std`` or ``bos``.
        lr: learning rate of the encoder; of several the best is kept.
        head_lr: learning rate of a head that is trained, not solved.
        epochs: most passes over the training part.
        batch: examples of an update.
        patience: epochs without a better validation, after which training stops.
        rank: of LoRA's matrices.
        class_weights: give rare classes more weight.
        seed: of the validation part and of training.
        seeds: trainings, of which the best on the validation part is kept.
        long: the policy for a sequence over the model's limit.
        dtype: what to compute in, as for ``protea.load``; training has its own precision.
        device: as for ``protea.load``.
        cache: a folder that keeps vectors, as of ``EmbeddingTransformer``, which may share it: in a search over layers,
            poolings and heads the model computes each sequence once. Of no use to ``lora``, ``full`` and
            ``light-attention``, which do not read vectors of the model as it is.
        token_budget: the number of tokens computed at a time, which bounds memory.

    Attributes:
        notes_: what the command would tell: the parts, the chosen layer, what is not calibrated.
        classes_: the classes, sorted; texts after ``load``.
    """

    _task = "sequence-class"

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each sequence, ``[N]``."""
        places = self._outcomes(X).argmax(1)
        found: NDArray[Any] = self.classes_[places]
        return found

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Calibrated probabilities ``[N, C]``, in the order of ``classes_``."""
        return self._outcomes(X)

    def _labelled(self, sequences: list[str], y: list[Any]) -> Labelled:
        if values := [value for value in y if isinstance(value, float) and not value.is_integer()]:
            raise UsageError(f"y: {shown(values[0])} is a value, not a class; use ProteaRegressor")
        self.classes_, numbers = np.unique(np.asarray(y), return_inverse=True)
        names = tuple(str(name) for name in self.classes_.tolist())
        return Labelled(TASKS[self._task], names, _examples(sequences), [*numbers.astype(np.int64)[:, None]])

    def _fitted_as(self, predictor: Predictor) -> None:
        self.classes_ = np.array(predictor.classes)


class ProteaRegressor(RegressorMixin, _Estimator):
    """A regressor of sequences: one number for each; arguments and attributes are those of ``ProteaClassifier``."""

    _task = "sequence-value"

    def predict(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """The value of each sequence, ``[N]``."""
        return self._outcomes(X)

    def _labelled(self, sequences: list[str], y: list[Any]) -> Labelled:
        try:
            values = np.array([float(value) for value in y])
        except (TypeError, ValueError) as error:
            raise UsageError(f"y: {error}; give numbers, or use ProteaClassifier") from error
        if not np.isfinite(values).all():
            raise DataError(f"y: {values[~np.isfinite(values)][0]} is not finite; correct it, or leave it out")
        return Labelled(TASKS[self._task], (), _examples(sequences), [*values[:, None]])


def _sequences(X: Any, alphabet: Alphabet) -> list[str]:  # noqa: N803
    given = door.read(column(X), alphabet, masks=False)
    if given.single:
        raise no_column(X)
    return [record.sequence for record, _ in given.sequences]


def _examples(sequences: list[str]) -> list[LabelledExample]:
    return [
        LabelledExample(f"sequence {number}", (text,), "", f"sequence {number}")
        for number, text in enumerate(sequences)
    ]


def _labels(name: str, values: Any, count: int) -> list[Any]:
    """The labels of a column, ``[N]``, as Python's own values."""
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != count:
        raise UsageError(f"{name}: got the shape {array.shape}; give one for each of the {counted(count, 'sequence')}")
    labels: list[Any] = array.tolist()
    for number, value in enumerate(labels):
        if value is None or value != value:  # noqa: PLR0124
            raise UsageError(f"{name}: value {number} is missing; leave such sequences out")
    return labels
