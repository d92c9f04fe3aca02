"""Models of others: predictors from what transformers and peft save.

A folder of ``EsmForSequenceClassification`` or ``EsmForTokenClassification``, or of peft's LoRA adapter of one of
them. Names of labels and the kind of the task are those of its ``config.json``: ``id2label`` and ``problem_type``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor

from protea.checkpoints.formats import has_weights, open_checkpoint
from protea.checkpoints.settings_files import CONFIG, read_json
from protea.checkpoints.vocabulary import VOCABULARY, check_vocabulary
from protea.errors import CheckpointError, ProteaWarning, UsageError, warn
from protea.finetune.adapters import CLASSIFIER, Adapter, has_class
from protea.finetune.adapters import CONFIG as ADAPTER_CONFIG
from protea.finetune.adapters import WEIGHTS as ADAPTER_WEIGHTS
from protea.finetune.heads import HF, Head, HeadConfig
from protea.finetune.predictor import FILE, Base, Predictor, base_of, convert
from protea.finetune.tasks import Kind, Task, Unit
from protea.infer.loading import LoadedModel, ModelLoader
from protea.output import sha256
from protea.text import counted


class Counterpart(NamedTuple):
    """transformers' class for a unit of prediction, and what peft calls its task."""

    name: str
    task_type: str


COUNTERPARTS: Final[Mapping[Unit, Counterpart]] = {
    "sequence": Counterpart("EsmForSequenceClassification", "SEQ_CLS"),
    "residue": Counterpart("EsmForTokenClassification", "TOKEN_CLS"),
}
PROBLEMS: Final[Mapping[Kind, str]] = {
    "class": "single_label_classification",
    "value": "regression",
    "labels": "multi_label_classification",
}
"""transformers' ``problem_type`` for each kind of task."""

_NAMED: Final = ("id2label", "num_labels")
_CLASSIFIER_LEFT_OUT: Final = r".* outside the encoder left out: (classifier\.[\w.]+(, )?)+; "
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.")
_OTHER_BASE: Final = "name the right base with -m"


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, and not a predictor of ``protea finetune``."""
    return not (folder / FILE).exists() and any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def stored_names(head: Head) -> dict[str, str]:
    """The keys of a head's tensors in transformers' class, and their names in the head's body."""
    linear = "out_proj." if head.task.unit == "residue" else ""
    return {CLASSIFIER + name.removeprefix(linear): name for name, _ in head.body.named_parameters()}


def read_foreign(folder: Path, load: ModelLoader, base: str | None = None) -> Predictor:
    """The predictor that a folder of transformers or peft holds, with its encoder; ``base`` is an adapter's."""
    if (folder / ADAPTER_CONFIG).is_file():
        if has_weights(folder):
            raise CheckpointError(f"{folder}: holds a whole model and an adapter; move one of them elsewhere")
        return _adapted(folder, load, base)
    if base is not None:
        raise UsageError(f"{folder}: holds a whole model; leave out -m, which names the base of an adapter")
    described = read_json(folder / CONFIG)
    unit = _unit(folder, described)
    with _reading_classifiers():
        with open_checkpoint(folder) as checkpoint:
            stored = checkpoint.tensors
            tensors = {key: stored[key].float().clone() for key in stored if key.startswith(CLASSIFIER)}
        loaded = load(str(folder))
    source = f"the labels and the hidden size in {CONFIG}"
    task, names = _labels(folder / CONFIG, unit, described)
    return _predictor(folder, task, names, tensors, loaded, (folder / CONFIG,), source)


@contextmanager
def _reading_classifiers() -> Iterator[None]:
    """Without the warning that a classifier is left out of the encoder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _CLASSIFIER_LEFT_OUT, ProteaWarning)
        yield


def _unit(folder: Path, described: Mapping[str, Any]) -> Unit:
    named = described.get("architectures") or ["nothing"]
    for unit, (name, _) in COUNTERPARTS.items():
        if name in named:
            return unit
    classes = " or ".join(name for name, _ in COUNTERPARTS.values())
    raise CheckpointError(
        f"{folder}: nothing to predict with: it holds no {FILE}, and architectures in {CONFIG} is {named[0]}, not "
        f"{classes}; train a head with `protea finetune DATA -m {folder}`"
    )


def _adapted(folder: Path, load: ModelLoader, base: str | None) -> Predictor:
    path, config = folder / ADAPTER_CONFIG, read_json(folder / ADAPTER_CONFIG)
    tensors: dict[str, Tensor] = {}
    adapter = Adapter.read(folder, tensors)
    unit = next((unit for unit, (_, kind) in COUNTERPARTS.items() if kind == config.get("task_type")), None)
    if unit is None:
        raise CheckpointError(
            f"{path}: task_type {config.get('task_type')} has no head to predict with; name the folder that `protea "
            "finetune` wrote, or an adapter of task_type SEQ_CLS or TOKEN_CLS"
        )
    count = next((len(value) for key, value in tensors.items() if key.endswith(".bias") and "dense" not in key), 0)
    if not count:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS}: holds no classifier; save the adapter with modules_to_save=['classifier']"
        )
    name = base or config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise CheckpointError(f"{path}: names no base model (base_model_name_or_path); name it with -m")
    loaded = base_of(name, folder, load, plain=True)
    encoder = loaded.module
    if not has_class(encoder):
        raise CheckpointError(f"{folder}: is of no {encoder.config.family} model, as {name} is; {_OTHER_BASE}")
    check_vocabulary(folder / VOCABULARY, encoder.alphabet)
    task, names = _labels(*_described(folder, unit, loaded, count))
    source = f"the labels and the hidden size {encoder.config.hidden_size} of {name}"
    files = [file for file in (path, folder / ADAPTER_WEIGHTS, folder / CONFIG) if file.exists()]
    predictor = _predictor(folder, task, names, tensors, loaded, files, source, f"; {_OTHER_BASE}")
    # Contacts change no hidden state.
    inside = {key: value for key, value in adapter.tensors.items() if not key[0].startswith("contact_head.")}
    _check_layers(folder, config, {int(each[1]) for key, _ in inside if (each := _LAYER.match(key))}, loaded)
    try:
        Adapter(adapter.config, inside).merge_into(encoder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}; {_OTHER_BASE}") from error
    convert(encoder, load.dtype)
    return predictor


def _check_layers(folder: Path, config: Mapping[str, Any], layers: set[int], loaded: LoadedModel) -> None:
    """Refuse a base with more layers than the adapter, unless the adapter itself chooses layers."""
    targets, count = config.get("target_modules") or (), loaded.module.config.num_hidden_layers
    chosen = config.get("layers_to_transform") is not None or any(map(str.isdigit, "".join(targets)))
    if not chosen and max(layers, default=-1) + 1 < count:
        raise CheckpointError(
            f"{folder}: the adapter changes {counted(len(layers), 'layer')}, and {loaded.name} has {count}; "
            f"{_OTHER_BASE}"
        )


def _described(folder: Path, unit: Unit, loaded: LoadedModel, count: int) -> tuple[Path, Unit, dict[str, Any]]:
    """An adapter's labels and the file that names them: beside it, or in its base's folder if their number fits."""
    if (folder / CONFIG).is_file():
        return folder / CONFIG, unit, read_json(folder / CONFIG)
    path = loaded.path / CONFIG
    described = read_json(path) if path.is_file() else {}
    if any(name in described for name in _NAMED) and len(_names(path, described)) == count:
        warn(f"{folder}: has no {CONFIG}; its labels are those of its base, {path}")
        return path, unit, described
    problem = PROBLEMS["value" if count == 1 else "class"]
    warn(
        f"{folder}: neither the adapter nor its base describes {counted(count, 'label')}: taken for {problem}, and "
        f"called LABEL_0 and so on; put {CONFIG} with id2label and problem_type beside the adapter"
    )
    return folder / CONFIG, unit, {"num_labels": count, "problem_type": problem}


def _predictor(
    folder: Path,
    task: Task,
    names: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    loaded: LoadedModel,
    files: Iterable[Path],
    source: str,
    advice: str = "",
) -> Predictor:
    """The predictor of a classifier's ``tensors``; ``source`` says in messages what asks for their shapes."""
    encoder = loaded.module
    head = Head(HeadConfig(kind=HF, task=task.name, width=encoder.config.hidden_size, outputs=len(names)))
    places = stored_names(head)
    if strange := sorted(places.keys() ^ tensors.keys()):
        what = "needs" if strange[0] in places else "has no"
        raise CheckpointError(
            f"{folder}: {COUNTERPARTS[task.unit].name} {what} {strange[0]}; save the model again with transformers"
        )
    for key, name in places.items():
        parameter, found = head.body.get_parameter(name), tensors[key]
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {key} has shape {list(found.shape)}, {source} ask for {list(parameter.shape)}{advice}"
            )
        parameter.data = found
    hashes = loaded.weights_sha256() | {path.name: sha256(path) for path in files}
    return Predictor(
        head=head.eval().requires_grad_(False),
        classes=() if task.kind == "value" else names,
        layer=encoder.config.num_hidden_layers,
        long="truncate",
        base=Base(loaded.name, hashes, encoder.alphabet.residues),
        method=HF,
        calibration=None,
        reference=None,
        encoder=encoder,
    )


def _labels(path: Path, unit: Unit, described: Mapping[str, Any]) -> tuple[Task, tuple[str, ...]]:
    """The task and the names of labels that a ``config.json`` describes."""
    names = _names(path, described)
    return Task(unit, _kind(path, unit, described, len(names))), names


def _names(path: Path, described: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of labels by their numbers; without them, there are two, as in transformers."""
    given, count = (described.get(name) for name in _NAMED)
    try:
        if given is None:
            given = {number: f"LABEL_{number}" for number in range(2 if count is None else count)}
        names = {int(number): str(name) for number, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if not names or sorted(names) != list(range(len(names))) or count not in (None, len(names)):
        raise CheckpointError(
            f"{path}: id2label must name the labels 0, 1, ..., as many as num_labels says; got {given!r}"
            + ("" if count is None else f" and num_labels {count!r}")
        )
    ordered = tuple(names[number] for number in range(len(names)))
    if twice := next((name for name in ordered if ordered.count(name) > 1), None):
        raise CheckpointError(f"{path}: id2label names {twice!r} twice; give each label a name of its own")
    return ordered


def _kind(path: Path, unit: Unit, described: Mapping[str, Any], count: int) -> Kind:
    """The task of a model with so many labels, by transformers' rules."""
    problem = described.get("problem_type")
    if problem is None:
        problem = PROBLEMS["value" if count == 1 else "class"]
        if count > 1 and unit == "sequence":
            warn(f"{path}: names no problem_type; {counted(count, 'label')} are taken for {problem}")
    kind = next((kind for kind, name in PROBLEMS.items() if name == problem), None)
    if kind is None:
        raise CheckpointError(f"{path}: problem_type {problem!r} is unknown; use {', '.join(PROBLEMS.values())}")
    if (kind == "value") != (count == 1) and kind != "labels":
        raise CheckpointError(
            f"{path}: problem_type {problem} of {counted(count, 'label')} is not supported; values have one label, "
            "classes at least two"
        )
    if kind == "labels" and unit == "residue":
        raise CheckpointError(f"{path}: problem_type {problem} of residues is not supported; train one model a label")
    return kind
