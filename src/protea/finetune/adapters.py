"""LoRA adapters: put into a model by peft, kept in peft's own layout, and merged into the weights for predictions.

An adapted matrix is W + s·B·A, with s = alpha / rank (Hu et al. 2022). With DoRA (Liu et al. 2024), each row of that
matrix is scaled to the length that a trained vector gives it.

On disk, modules have the names of transformers' class, such as ``EsmModel``, so that peft and transformers load an
adapter onto it unchanged. Families that transformers has no class for have names of the same kind, which only Protea
reads. The head stays outside: it is not one of transformers' heads. Merging needs neither library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from protea.checkpoints.hf_config import NAME
from protea.checkpoints.settings_files import read_json, write_json
from protea.checkpoints.tensors import Planned, open_safetensors, write_safetensors
from protea.errors import CheckpointError, UsageError
from protea.models.encoder import Encoder
from protea.models.family import key_of
from protea.optional import extra

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
TASK_TYPE: Final = "FEATURE_EXTRACTION"
CLASSIFIER: Final = "classifier."
"""How the names of a head begin in transformers' classes."""

_TARGET: Final = re.compile(r"layers\.\d+\.(?:self_attn\.(?:q_proj|k_proj|v_proj|out_proj)|fc1|fc2)")
_ROOT: Final = "base_model.model."
_NAME: Final = "default"  # peft's name of a model's only adapter
_KINDS: Final = {
    "lora_A": f"lora_A.{_NAME}.weight",
    "lora_B": f"lora_B.{_NAME}.weight",
    "lora_magnitude_vector": f"lora_magnitude_vector.{_NAME}.weight",
}
"""The tensors of an adapted matrix: their names in files, and in peft's modules. Only DoRA has the last one."""

_STORED: Final = re.compile(r"base_model\.model\.(?:esm\.)?(.+?)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_OTHER_ARITHMETIC: Final = ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora")
"""Settings of peft's, besides those that are read here, with which an adapted matrix is another one."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: peft's settings, and float32 matrices on the CPU by module and kind (``_KINDS``).

    Modules are named as in ``EsmModel``: ``encoder.layer.0.attention.self.query``.
    """

    config: dict[str, Any]
    tensors: dict[tuple[str, str], Tensor]

    @classmethod
    def of(cls, model: Encoder, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Adapter:
        """The adapter of trained parameters, by their names in a model that ``insert`` changed."""
        names = _modules(model)
        parts = {
            (module, kind): tensors[f"{name}.{ending}"].detach().float().cpu()
            for name, module in names.items()
            for kind, ending in _KINDS.items()
            if f"{name}.{ending}" in tensors
        }
        # Without the number of the layer; peft compares the end of a module's name.
        targets = sorted({module.split(".", 3)[3] for module in names.values()})
        return cls({**settings, "target_modules": targets}, parts)

    @property
    def scale(self) -> float:
        """The factor of B·A."""
        alpha, rank = float(self.config["lora_alpha"]), float(self.config["r"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def write(
        self, folder: Path, base_name: str, task_type: str = TASK_TYPE, classifier: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``adapter_config.json``, which names the model as ``base_name``, and the tensors beside it.

        With a ``classifier``, tensors by their names in transformers' class of this ``task_type``, it is of that class.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "base_model_name_or_path": base_name, "task_type": task_type, "inference_mode": True}
        if classifier:
            config["modules_to_save"] = [CLASSIFIER.removesuffix(".")]
        write_json(folder / CONFIG, dict(sorted(config.items())))
        inside = "esm." if classifier else ""
        named = {
            f"{inside}{module}.{kind}" + (".weight" if kind != "lora_magnitude_vector" else ""): tensor
            for (module, kind), tensor in self.tensors.items()
        }
        named |= classifier or {}
        write_safetensors(folder / WEIGHTS, planned({_ROOT + key: value for key, value in named.items()}))

    @classmethod
    def read(cls, folder: Path, classifier: dict[str, Tensor] | None = None) -> Adapter:
        """Read an adapter that ``write`` or peft wrote, for ``EsmModel`` or a class around it.

        ``classifier`` receives the tensors of the class's classifier, in float32; without it, such tensors are refused.
        """
        config, path = read_json(folder / CONFIG), folder / WEIGHTS
        if config.get("peft_type") != "LORA" or any(config.get(name) for name in _OTHER_ARITHMETIC):
            wrong = next((name for name in _OTHER_ARITHMETIC if config.get(name)), "peft_type")
            raise CheckpointError(
                f"{folder / CONFIG}: {wrong} {config.get(wrong)!r} is not supported; merge the adapter with peft "
                "(merge_and_unload), and name the merged model"
            )
        for name in ("r", "lora_alpha"):
            if not isinstance(config.get(name), int | float) or not config[name] > 0:
                raise CheckpointError(f"{folder / CONFIG}: {name} must be a number above 0, got {config.get(name)!r}")
        tensors = open_safetensors({path: set()})
        parts = {}
        for key in tensors:
            match = _STORED.fullmatch(key)
            if match is None and classifier is not None and key.startswith(_ROOT + CLASSIFIER):
                classifier[key.removeprefix(_ROOT)] = tensors[key].float().clone()
                continue
            if match is None:
                raise CheckpointError(f"{path}: {key} is no part of a LoRA adapter of the encoder; leave it out")
            parts[match[1], match[2]] = tensors[key].float().clone()
        return cls(config, parts)

    def merge_into(self, model: Encoder) -> None:
        """Change a plain float32 model's weights, in place, to the adapted ones."""
        places = {module: name for name, module in _modules(model).items()}
        modules = dict.fromkeys(module for module, _ in self.tensors)
        if strange := next((module for module in modules if module not in places), None):
            raise CheckpointError(f"the adapter changes {strange}, which this {model.config.family} model lacks")
        with torch.no_grad():
            for module in modules:
                self._merge(module, model.get_parameter(f"{places[module]}.weight"))

    def _merge(self, module: str, weight: Tensor) -> None:
        a, b = self.tensors.get((module, "lora_A")), self.tensors.get((module, "lora_B"))
        length = self.tensors.get((module, "lora_magnitude_vector"))
        fits = a is not None and b is not None and (b.shape[0], a.shape[1]) == tuple(weight.shape)
        if not fits or (length is None) == bool(self.config.get("use_dora")):
            raise CheckpointError(f"the adapter's tensors of {module} are incomplete, or do not fit this model")
        assert a is not None
        assert b is not None
        adapted = weight + self.scale * (b.to(weight.device) @ a.to(weight.device))
        if length is not None:
            adapted *= length.to(weight.device)[:, None] / adapted.norm(dim=1, keepdim=True)
        weight.data = adapted  # not in place: weights may be mapped from a file


def has_class(model: Encoder) -> bool:
    """Whether transformers has a class for a model."""
    stored = type(model).stored.get(NAME)
    return stored is not None and stored.classes is not None


def insert(
    model: Encoder, *, rank: int, alpha: int, dora: bool = False, dropout: float = 0.0, seed: int
) -> dict[str, Any]:
    """Put untrained adapters into the layers of a plain model, in place; returns peft's settings.

    Afterwards the adapters alone require gradients. A is random by the ``seed``, B is 0, so that outputs stay the same.
    """
    if not any(_TARGET.fullmatch(name) for name, _ in model.named_modules()):
        raise UsageError(f"--method lora: this {model.config.family} model has no layers that LoRA could adapt")
    with extra("finetune", "--method lora needs peft"):
        from peft import LoraConfig, inject_adapter_in_model
    options = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_dora": dora, "bias": "none"}
    config = LoraConfig(target_modules=_TARGET.pattern, **options)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)
    return dict(json.loads(json.dumps(config.to_dict(), default=_plain)))  # type: ignore[no-untyped-call]


def train_adapters(model: nn.Module, *, training: bool) -> None:
    """Switch the dropout of adapters, and of nothing else."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.train(training)


def planned(tensors: Mapping[str, Tensor]) -> list[Planned]:
    """Tensors to write, by their keys."""
    return [Planned(key, tuple(value.shape), value.dtype, partial(_same, value)) for key, value in tensors.items()]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def _modules(model: Encoder) -> dict[str, str]:
    """The modules of a plain or adapted model that LoRA adapts, and their names on disk."""
    return dict(_named(model))


def _named(model: Encoder) -> Iterator[tuple[str, str]]:
    keys = type(model).stored[NAME].keys
    for name, _ in model.named_modules():
        if _TARGET.fullmatch(name) and (key := key_of(keys, f"{name}.weight")):
            yield name, key[0].removeprefix("esm.").removesuffix(".weight")
