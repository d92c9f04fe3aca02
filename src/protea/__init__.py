"""Protein language models of the ESM family: embed, score, train, convert.

>>> import protea
>>> model = protea.load("esm2_t6_8M_UR50D")        # doctest: +SKIP
>>> model.embed(["MKTAYIAK"])[0].shape              # doctest: +SKIP
(8, 320)

Importing this package has no side effects and does not import torch; the first use of a name below does.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protea.client import Client
    from protea.embed.reading import StoredEmbeddings, read_embeddings
    from protea.errors import ProteaError, ProteaWarning
    from protea.language_model import LanguageModel, load
    from protea.trained import TrainedPredictor, load_predictor

__all__ = [
    "Client",
    "LanguageModel",
    "ProteaError",
    "ProteaWarning",
    "StoredEmbeddings",
    "TrainedPredictor",
    "__version__",
    "load",
    "load_predictor",
    "read_embeddings",
]

if sys.version_info < (3, 11):  # noqa: UP036  # pip refuses older ones; who runs the sources sees this
    raise ImportError(f"Protea needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")

__version__ = "0.2.0"

_HOME = {
    "Client": "protea.client",
    "LanguageModel": "protea.language_model",
    "ProteaError": "protea.errors",
    "ProteaWarning": "protea.errors",
    "StoredEmbeddings": "protea.embed.reading",
    "TrainedPredictor": "protea.trained",
    "load": "protea.language_model",
    "load_predictor": "protea.trained",
    "read_embeddings": "protea.embed.reading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        if not name.startswith("Protea"):  # errors need no PyTorch
            importlib.import_module("protea.supported").check_torch()
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
