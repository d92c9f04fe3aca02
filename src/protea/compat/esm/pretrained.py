"""fair-esm's ``esm.pretrained``: every published model that Protea has, as ``esm2_t33_650M_UR50D()``, and loaders.

All return a model and its alphabet, on the CPU in float32. Weights are looked for where fair-esm keeps them
(``torch.hub.get_dir()``), then where Protea does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints import fair_esm
from protea.checkpoints.hub import published_models, short_name
from protea.checkpoints.tensors import StoredTensor, Tensors, type_name
from protea.compat.esm.absent import STARTS, refuse, refuse_model
from protea.compat.esm.data import EsmAlphabet
from protea.compat.esm.wrapped import EsmModel, around
from protea.errors import CheckpointError, UsageError
from protea.infer.loading import load_model
from protea.limits import limit_threads

Loaded = tuple[EsmModel, EsmAlphabet]

_FILES: Final = "https://dl.fbaipublicfiles.com/fair-esm"
_ALIASES: Final = {"esm1v_t33_650M_UR90S": "esm1v_t33_650M_UR90S_1"}


def load_model_and_alphabet(model_name: str) -> Loaded:
    """Load a file, if the name ends in ``.pt``, else a model by its name."""
    return (load_model_and_alphabet_local if str(model_name).endswith(".pt") else load_model_and_alphabet_hub)(
        model_name
    )


def load_model_and_alphabet_hub(model_name: str) -> Loaded:
    """Load a model by its published name; also by a folder or repository, as ``protea.load`` takes them."""
    name = _ALIASES.get(str(model_name), str(model_name))
    refuse_model(name)
    path = _kept_file(name)
    if not path.exists() and name in published_models() and published_models()[name].format == fair_esm.NAME:
        _download(name, path)
    return _load(path if path.exists() else name)


def load_model_and_alphabet_local(model_location: str | Path) -> Loaded:
    """Load a ``.pt`` file, with the contact regression beside it if there is one."""
    refuse_model(Path(model_location).stem)
    return _load(Path(model_location))


def load_model_and_alphabet_core(
    model_name: str, model_data: Mapping[str, Any], regression_data: Mapping[str, Any] | None = None
) -> Loaded:
    """The model of what ``torch.load`` gave for a file, and for its contact regression."""
    if not isinstance(model_name, str):
        raise UsageError("load_model_and_alphabet_core takes the model's name first, as in fair-esm since version 0.5")
    refuse_model(model_name)
    limit_threads()
    path = Path(model_name)
    if not isinstance(model_data, Mapping) or not fair_esm.is_described(dict(model_data)):
        raise CheckpointError(f"{model_name}: model_data is not what torch.load gives for a file of fair-esm")
    state = dict(model_data["model"]) | dict((regression_data or {}).get("model", {}))
    tensors = Tensors([path])
    for key, value in state.items():
        if isinstance(value, Tensor):
            stored = StoredTensor(path, tuple(value.shape), type_name(value.dtype), partial(_itself, value))
            tensors.add(key, stored)
    checkpoint = fair_esm.from_settings(path, fair_esm.settings_of(model_data), tensors)
    return _finished(around(checkpoint.load(dtype=torch.float32, device=torch.device("cpu")), model_name))


def _itself(value: Tensor) -> Tensor:
    return value.detach()


def _load(model: str | Path) -> Loaded:
    loaded = load_model(model, device="cpu", trainable=True)
    return _finished(around(loaded.module, loaded.name))


def _finished(model: EsmModel) -> Loaded:
    return model, model.alphabet


def _kept_file(name: str) -> Path:
    """Where fair-esm keeps a model's file; ``torch.hub.set_dir`` and ``TORCH_HOME`` move the folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{short_name(name).replace('/', '_')}.pt"


def _download(name: str, path: Path) -> None:
    """Fetch a model's two files from Meta, as fair-esm does."""
    regression = fair_esm.regression_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for url, file in ((f"{_FILES}/regression/{regression.name}", regression), (f"{_FILES}/models/{path.name}", path)):
        try:
            if not file.exists():
                torch.hub.download_url_to_file(url, str(file))
        except OSError as error:  # also of the network
            raise CheckpointError(
                f"{name}: cannot download {url} ({error}); fetch it elsewhere and put it at {file}"
            ) from error


def _names() -> list[str]:
    """The names of Meta's models that Protea has."""
    return [name for name, known in published_models().items() if known.publisher == "Meta"]


def __getattr__(name: str) -> Callable[[], Loaded]:
    if name in _ALIASES or (not name.startswith("_") and name in _names()):
        return partial(load_model_and_alphabet_hub, name)
    if name.startswith(tuple(STARTS)):
        return partial(refuse_model, name)  # type: ignore[return-value]
    if name.startswith(("load_", "_download")):
        refuse(f"esm.pretrained.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_names(), *_ALIASES])
