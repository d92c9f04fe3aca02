"""A trained predictor, and the folder that holds it.

``predictor.json``      what is predicted, from which layer of which model, and how sure predictions are.
``head.safetensors``    the weights of the head.
``adapter/``            LoRA's weights, in peft's own layout (``--method lora``).
``model/``              the whole encoder, as a Hugging Face folder (``--method full``).
``reference.safetensors``  vectors of training proteins, for distances.
``baselines/NAME/``     the predictors with another model below them that a run compares itself with.

The base model is not copied: the folder names it, and the SHA-256 of its weights must be the same when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from protea.checkpoints import hf
from protea.device import DTYPES, MIXED, QUANTIZED
from protea.embed.prepare import Long
from protea.errors import CheckpointError, DataError, UsageError
from protea.finetune.adapters import Adapter
from protea.finetune.calibration import Calibration
from protea.finetune.distances import Reference
from protea.finetune.features import random_twin
from protea.finetune.heads import RESIDUES, Head, HeadConfig
from protea.finetune.tasks import TASKS, Task
from protea.infer.loading import LoadedModel, ModelLoader, load_model
from protea.journal import work_path
from protea.letters import Gaps, Unknown
from protea.models.encoder import Encoder
from protea.transforms.cpu import pack_for_cpu
from protea.transforms.mixed import mix
from protea.transforms.quantized import quantize

FILE: Final = "predictor.json"
HEAD: Final = "head.safetensors"
_REFERENCE: Final = "reference.safetensors"
ADAPTER: Final = "adapter"
MODEL: Final = "model"
_BASELINES: Final = "baselines"
_FORMAT: Final = 1


@dataclass(frozen=True)
class Base:
    """The model that a predictor was made from: its name, the SHA-256 of its weight files, and its letters."""

    name: str
    files: dict[str, str]
    letters: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> Base:
        """The base that a loaded model is."""
        return cls(loaded.name, loaded.weights_sha256(), loaded.module.alphabet.residues)


@dataclass
class Predictor:
    """A head on a layer of an encoder.

    Attributes:
        head: in evaluation mode.
        classes: names of classes or labels; none for values.
        layer: number of the layer that the head reads.
        long: policy for long sequences in training; with ``unknown`` and ``gaps`` the default of predictions.
        base: the model that it was made from.
        method: frozen, lora or full; hf for a model of others.
        calibration: of probabilities, sets and intervals; ``None`` if nothing was calibrated.
        reference: the training proteins; ``None`` if they are unknown.
        encoder: the model with its final weights; ``None`` until it is loaded.
        random_seed: of the random weights that the encoder has in place of the base's; ``None`` if it has the base's.
    """

    head: Head
    classes: tuple[str, ...]
    layer: int
    long: Long
    base: Base
    method: str
    calibration: Calibration | None
    reference: Reference | None
    encoder: Encoder | None = None
    unknown: Unknown = "x"
    gaps: Gaps = "keep"
    random_seed: int | None = None

    @property
    def task(self) -> Task:
        """What is predicted."""
        return self.head.task

    @property
    def summary(self) -> str:
        """The pooling whose vectors are compared with the training proteins."""
        return "mean" if self.head.config.reads == RESIDUES else self.head.config.reads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The arrays of an embedding that a prediction needs: the head's, and the summary for distances."""
        return tuple(dict.fromkeys((self.head.config.reads, self.summary)))

    def save(self, folder: Path) -> None:
        """Write the predictor into an existing folder, without the encoder's changes."""
        numbers = {
            "format": _FORMAT,
            "task": self.task.name,
            "classes": list(self.classes),
            "method": self.method,
            "layer": self.layer,
            "random_seed": self.random_seed,
            "long": self.long,
            "unknown": self.unknown,
            "gaps": self.gaps,
            "head": self.head.config.numbers(),
            "base": {"name": self.base.name, "files": self.base.files, "letters": self.base.letters},
            "calibration": None if self.calibration is None else self.calibration.numbers(),
            "far": None if self.reference is None else self.reference.far,
        }
        (folder / FILE).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / HEAD)
        if self.reference is not None:
            arrays = {"directions": self.reference.directions, "centre": self.reference.centre}
            save_file(
                {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}, folder / _REFERENCE
            )


def is_predictor(folder: Path) -> bool:
    """Whether a folder holds a predictor."""
    return (folder / FILE).is_file()


def baseline_folder(folder: Path, name: str) -> Path:
    """Where a run keeps the predictor of a baseline."""
    return folder / _BASELINES / name.replace(" ", "-")


def predictor_files(folder: Path) -> list[Path]:
    """All files in the folder of a predictor, without those of its baselines."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.relative_to(folder).parts[0] != _BASELINES]


def read_predictor(folder: Path) -> Predictor:
    """A predictor without its encoder; ``CheckpointError`` if the folder holds none, or a damaged one."""
    numbers = _read_numbers(folder)
    try:
        if numbers["format"] != _FORMAT:
            raise CheckpointError(
                f"{folder / FILE}: format {numbers['format']}; this version reads {_FORMAT}: install a newer version"
            )
        config = HeadConfig(**numbers["head"])
        head = Head(config)
        head.load_state_dict(_tensors(folder / HEAD))
        if len(numbers["classes"]) != (0 if head.task.kind == "value" else config.outputs):
            raise ValueError(f"{len(numbers['classes'])} classes for {config.outputs} outputs")
        for name, policy in (("long", Long), ("unknown", Unknown), ("gaps", Gaps)):
            if numbers[name] not in get_args(policy):
                raise ValueError(f"{name}: {numbers[name]}")
        reference, calibrated = None, numbers["calibration"]
        if numbers["far"] is not None:
            arrays = _tensors(folder / _REFERENCE)
            reference = Reference(arrays["directions"].numpy(), arrays["centre"].numpy(), float(numbers["far"]))
        return Predictor(
            head=head.eval().requires_grad_(False),
            classes=tuple(numbers["classes"]),
            layer=numbers["layer"],
            long=numbers["long"],
            unknown=numbers["unknown"],
            gaps=numbers["gaps"],
            base=Base(**numbers["base"]),
            method=numbers["method"],
            calibration=calibrated and Calibration.from_numbers(TASKS[config.task], calibrated),
            reference=reference,
            random_seed=numbers.get("random_seed"),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError | UsageError):
            raise CheckpointError(f"{folder}: {error}") from error
        raise CheckpointError(
            f"{folder}: is damaged: {FILE} and {HEAD} do not fit ({' '.join(str(error).split())[:200]}); train again"
        ) from error


def with_encoder(predictor: Predictor, folder: Path, load: ModelLoader, model: str | None = None) -> Predictor:
    """The predictor with its encoder, ready to compute; ``model`` names the base if it has moved.

    The base must have the weights that the predictor was made from.
    """
    if predictor.method == "full":
        if model is not None:
            raise UsageError(f"{folder}: holds a whole model, all of whose weights were trained; leave out -m")
        predictor.encoder = load(str(folder / MODEL)).module
        return predictor
    name = model or predictor.base.name
    loaded = base_of(name, folder, load, plain=predictor.method == "lora")
    found = loaded.weights_sha256()
    if sorted(found.values()) != sorted(predictor.base.files.values()):
        raise CheckpointError(
            f"{folder}: was made from other weights than those of {name} (SHA-256 "
            f"{_short(predictor.base.files)}, not {_short(found)}); name the right base with -m"
        )
    encoder = loaded.module
    if predictor.method == "lora":
        Adapter.read(folder / ADAPTER).merge_into(encoder)
        convert(encoder, load.dtype)
    predictor.encoder = encoder if predictor.random_seed is None else random_twin(encoder, predictor.random_seed)
    return predictor


def convert(encoder: Encoder, dtype: str) -> None:
    """Make a plain float32 model ready to compute in a type, in place."""
    if dtype == MIXED:
        mix(encoder)
    elif dtype == QUANTIZED:
        quantize(encoder)
    else:
        encoder.to(DTYPES[dtype])
    pack_for_cpu(encoder)


def base_of(name: str, folder: Path, load: ModelLoader, *, plain: bool) -> LoadedModel:
    """The base of a predictor, ``plain`` in float32 if its weights change; an error says how to name it."""
    try:
        return load_model(name, device=load.device, trainable=True) if plain else load(name)
    except (CheckpointError, UsageError) as error:
        raise type(error)(f"{folder}: its base model cannot be loaded: {error}; name it with -m if it moved") from error


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write a whole encoder beside a predictor."""
    hf.save(encoder, folder / MODEL)


def _read_numbers(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_predictor(first := folder / "fold-1"):
            raise CheckpointError(f"{folder}: holds a predictor for each fold; name one, as in {first}") from None
        if not folder.exists():
            if work_path(folder).is_dir():
                raise CheckpointError(
                    f"{folder}: its training is unfinished; the same `protea finetune` command continues it"
                ) from None
            raise CheckpointError(f"{folder}: there is no such folder; name one that `protea finetune` wrote") from None
        raise CheckpointError(f"{folder}: holds no {FILE}; name a folder that `protea finetune` wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / FILE}: cannot be read ({error}); train again") from error
    if not isinstance(values, dict) or "format" not in values:
        raise CheckpointError(f"{folder / FILE}: is not a predictor's; name a folder that `protea finetune` wrote")
    return values


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); train again") from error


def _short(files: Mapping[str, str]) -> str:
    return ", ".join(f"{value[:12]}..." for value in files.values())
