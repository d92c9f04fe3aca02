"""fair-esm's interface over Protea's models: ``import protea.compat.esm as esm``.

``python -m protea.compat.esm SCRIPT.py`` runs a script that says ``import esm`` without changes, and ``install()`` does
the same for a notebook. ``docs/from-fair-esm.md`` says what differs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

from torch.nn import LayerNorm

from protea.compat.esm import data, head_modules, pretrained
from protea.compat.esm.absent import MSATransformer, refuse, refuse_module
from protea.compat.esm.data import Alphabet, BatchConverter, FastaBatchedDataset
from protea.compat.esm.installing import install
from protea.compat.esm.wrapped import ProteinBertModel, RotaryModel
from protea.compat.esm.wrapped import RotaryModel as ESM2  # noqa: N814  # its name in fair-esm

__all__ = ["ESM2", "Alphabet", "BatchConverter", "FastaBatchedDataset", "MSATransformer", "ProteinBertModel"]
__all__ += ["constants", "data", "install", "model", "modules", "pretrained", "version"]

__version__ = "2.0.0"
"""The version of fair-esm whose interface this is."""


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(f"{__name__}.{name}")
    vars(made).update(content)
    return made


def _no_layer(name: str) -> NoReturn:
    if not name[:1].isupper():  # all layers of fair-esm are classes
        raise AttributeError(f"module {__name__ + '.modules'!r} has no attribute {name!r}")
    refuse(f"esm.modules.{name}", "layers")


constants = _module("constants", proteinseq_toks={"toks": Alphabet.from_architecture("ESM-1b").standard_toks})
version = _module("version", version=__version__)
model = _module(
    "model",
    esm1=_module("model.esm1", ProteinBertModel=ProteinBertModel),
    esm2=_module("model.esm2", ESM2=RotaryModel),
    msa_transformer=_module("model.msa_transformer", MSATransformer=MSATransformer),
)
modules = _module(
    "modules", **{name: getattr(head_modules, name) for name in head_modules.SHARED}, ESM1bLayerNorm=LayerNorm
)
vars(modules)["__getattr__"] = _no_layer


def __getattr__(name: str) -> Any:
    if name in ("inverse_folding", "esmfold"):
        refuse_module(f"esm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
