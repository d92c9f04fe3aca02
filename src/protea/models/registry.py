"""The families that Protea knows, one line for each, and functions that look something up in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from protea.alphabet import Alphabet
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig

FAMILIES: Final[list[str | type[Encoder]]] = [
    "protea.models.esm2:ESM2",
    "protea.models.esm1b:ESM1b",
    "protea.models.esm1nv:ESM1nv",
    "protea.models.esm1:ESM1",
    "protea.models.t5:T5",
    "protea.models.carp:CARP",
    "protea.models.esmc:ESMC",
]
"""The class of each family, or its import path. Every command knows a family that is added here."""


def families() -> Iterator[type[Encoder]]:
    """All families. Each is imported only when the iterator reaches it."""
    for place in FAMILIES:
        if isinstance(place, type):
            yield place
        else:
            module, _, name = place.partition(":")
            yield getattr(import_module(module), name)


def family_of(config: EncoderConfig) -> type[Encoder]:
    """The family of a configuration; ``TypeError`` if none has such configurations."""
    for family in families():
        if type(config) is family.config_type:
            return family
    raise TypeError(f"no family has a configuration of type {type(config).__name__}; add it to FAMILIES")


def build(config: EncoderConfig) -> Encoder:
    """A model without weights, on the meta device, in evaluation mode; buffers have their values."""
    family = family_of(config)
    with torch.device("meta"):
        return family(config).eval()


def initial_value(model: Encoder, name: str, seed: int) -> Tensor:
    """The published random initialisation of one parameter, float32 on the CPU.

    It depends only on the seed and the parameter's name, not on order, sharding or the machine. ``model`` may be on the
    meta device.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # Not PyTorch's generator, whose values depend on the vector instructions of the processor.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return model.initial_parameter(name, tuple(model.get_parameter(name).shape), generator)


def stored_in(form: str, described: Any) -> type[Encoder] | None:
    """The family that the settings of a file mean; ``CheckpointError`` if the family does not support one of them."""
    stored = (family for family in families() if form in family.stored)
    return next((family for family in stored if family.stored[form].accepts(described)), None)


def families_with(*capabilities: str) -> str:
    """The usual names of the families of which a published model has all of some capabilities, for messages.

    Beside those of a model, ``any length`` is one.
    """
    names: dict[str, None] = {}
    for family in families():
        for known in family.published:
            has = {
                "attention": any(known.config.attention_heads),
                "logits": "logits" not in family.lacks,
                "contacts": known.contact_head,
                "any length": known.config.max_tokens is None,
            }
            if all(has[capability] for capability in capabilities):
                names[known.config.family] = None
    return ", ".join(names)


_UNSAVED: Final = {
    "attention": "its layers do not attend",
    "logits": "the checkpoint was saved without its language-model head (lm_head.*); load one that has it",
    "contacts": "the checkpoint was saved without its contact head; load one that has it",
}


def why_not(model: Encoder, capability: str) -> str:
    """For messages: what a model lacks, why, how to get it, and which families have it if its own does not."""
    family, reason = model.config.family, model.lacks.get(capability)
    told, heads = families_with(capability), [known for known in model.published if known.config.family == family]
    if capability == "contacts" and heads and not any(known.contact_head for known in heads):
        reason = f"{family} was published without a contact head"
    fit = f"fit one: protea fit-contacts{'' if any(model.config.attention_heads) else ' --head bilinear'}"
    if not reason:
        reason = _UNSAVED[capability] + (f", or {fit}" if capability == "contacts" else "")
    else:
        reason += f"; {fit}" if capability == "contacts" else ""
        reason += f"; families that have {capability}: {told}"
    return f"this {family} model has no {capability}: {reason}"


def alphabets() -> dict[str, Alphabet]:
    """The alphabets of all families, by their names in options."""
    return {family.config_type.alphabet.name.lower(): family.config_type.alphabet for family in families()}
