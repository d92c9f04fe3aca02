"""What fair-esm has and Protea has not: errors that say so by name, with the way out."""

from __future__ import annotations

from typing import Final, NoReturn

from protea.errors import AbsentModuleError, CapabilityError

_FAIR: Final = (
    "use fair-esm in an environment of its own (pip install fair-esm; on PyTorch 2.6 and newer, set "
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 to let it load its files)"
)

_WAYS: Final = {
    "msa": f"Protea has no MSA Transformer; {_FAIR}, or an ESM-2 model, which needs no alignment",
    "if": f"Protea has no inverse folding (ESM-IF1); {_FAIR}",
    "fold": "Protea predicts no structures (ESMFold); use transformers: "
    "EsmForProteinFolding.from_pretrained('facebook/esmfold_v1')",
    "layers": "Protea computes packed sequences, with layers of its own; call the whole model, as in "
    f"model(tokens, repr_layers=[...], need_head_weights=True), or {_FAIR}",
    "hooks": "Protea would not run this hook as fair-esm does. Forward hooks work on layers, their linear layers and "
    "norms, embed_tokens and lm_head; need_head_weights=True gives attention, return_contacts=True contacts; for any "
    f"other hook {_FAIR}",
    "esm3": "this is a module of EvolutionaryScale's esm 3, not of fair-esm; Protea loads ESM C by its name: "
    "protea.load('esmc_300m')",
    "other": f"Protea does not offer it; {_FAIR}",
}

STARTS: Final = {"esm_msa": "msa", "esm_if": "if", "esmfold": "fold"}
"""How the names of models begin that Protea has not."""

_MODULES: Final = {
    "inverse_folding": "if",
    "esmfold": "fold",
    "axial_attention": "msa",
    **dict.fromkeys(("multihead_attention", "rotary_embedding"), "layers"),
    **dict.fromkeys(("models", "sdk", "tokenization", "utils", "layers"), "esm3"),
}


def refuse(what: str, kind: str = "other") -> NoReturn:
    """Raise the error for something of fair-esm that Protea has not."""
    raise CapabilityError(f"{what}: {_WAYS[kind]}")


def refuse_model(name: str) -> None:
    """Raise the error for the name of a model that fair-esm has and Protea has not; any other passes."""
    for start, kind in STARTS.items():
        if name.startswith(start):
            refuse(name, kind)


def refuse_module(name: str) -> NoReturn:
    """Raise the error for a module of ``esm`` that Protea has not, such as ``esm.inverse_folding.util``."""
    raise AbsentModuleError(f"{name}: {_WAYS[_MODULES.get(name.split('.')[1], 'other')]}")


class MSATransformer:
    """fair-esm's class, for ``isinstance``; no model of Protea is one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        refuse("MSATransformer", "msa")
