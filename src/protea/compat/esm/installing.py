"""Lets ``import esm`` mean ``protea.compat.esm``, for scripts that stay as they are.

Processes that a script starts, such as workers of a data loader, import their modules again. They find the file
``path/esm.py`` in ``sys.path``, which they get from this process.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from protea.compat.esm.absent import refuse_module
from protea.errors import UsageError

_ROOT: Final = "protea.compat.esm"
_FILES: Final = Path(__file__).with_name("path")
_REPOSITORY: Final = "facebookresearch/esm"
_PARTS: Final = (
    *("constants", "data", "model", "model.esm1", "model.esm2", "model.msa_transformer"),
    *("modules", "pretrained", "version"),
)


class _Refusing(MetaPathFinder):
    """Refuses the modules of fair-esm that Protea has not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.startswith("esm."):
            refuse_module(fullname)


def install() -> None:
    """Let ``import esm``, and ``torch.hub.load`` of fair-esm's repository, mean this package, in this process.

    A second call does nothing. ``UsageError`` if another ``esm`` is loaded.
    """
    ours, loaded = import_module(_ROOT), sys.modules.get("esm")
    if loaded is ours:
        return
    if loaded is not None and Path(str(loaded.__file__)).parent != _FILES:
        raise UsageError(
            f"import esm has loaded {loaded.__file__}; call protea.compat.esm.install() before the first import of esm"
        )
    sys.modules["esm"] = ours
    for part in _PARTS:
        found: Any = ours
        for name in part.split("."):
            found = getattr(found, name)
        sys.modules[f"esm.{part}"] = found
    sys.meta_path.insert(0, _Refusing())
    sys.path.insert(1, str(_FILES))
    # It is in the files of ESM-1, ESM-1b and ESM-1v, which scripts load themselves.
    torch.serialization.add_safe_globals([Namespace])
    _answer_hub()


def _answer_hub() -> None:
    """Let ``torch.hub.load("facebookresearch/esm:main", NAME)`` load from here; other repositories are as before."""
    original: Callable[..., Any] = torch.hub.load

    def load(repo_or_dir: str, model: str, *args: Any, **kwargs: Any) -> Any:
        if str(repo_or_dir).partition(":")[0] == _REPOSITORY and kwargs.get("source", "github") == "github":
            return import_module(f"{_ROOT}.pretrained").load_model_and_alphabet_hub(model)
        return original(repo_or_dir, model, *args, **kwargs)

    torch.hub.load = load
