"""The families that Protea knows: one line for each, and what is looked up among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

import numpy as np
from torch import Tensor

from protea.alphabet import Alphabet
from protea.models.config import EncoderConfig
from protea.models.encoder import Encoder

FAMILIES: Final[list[str | type[Encoder]]] = [
    "protea.models.esm2:ESM2",
    "protea.models.esm1b:ESM1b",
    "protea.models.esm1nv:ESM1nv",
]
"""A line for each: where its class is, or the class itself; a family that is added here is known to every command."""


def families() -> Iterator[type[Encoder]]:
    """All families, each imported when it is asked for: who looks for one seldom needs all."""
    for place in FAMILIES:
        if isinstance(place, type):
            yield place
        else:
            module, _, name = place.partition(":")
            yield getattr(import_module(module), name)


def family_of(config: EncoderConfig) -> type[Encoder]:
    """The family that a configuration is of.

    Raises:
        TypeError: no family has such configurations.
    """
    found = next((family for family in families() if type(config) is family.config_type), None)
    if found is None:
        raise TypeError(f"no family has a configuration of type {type(config).__name__}; add it to FAMILIES")
    return found


def build(config: EncoderConfig) -> Encoder:
    """A model without weights, on the meta device, in evaluation mode."""
    return family_of(config).build(config)


def initial_value(model: Encoder, name: str, seed: int) -> Tensor:
    """The published random initialisation of one parameter, float32 on the CPU.

    A function of the seed and the parameter's name alone, so that order, sharding, the number of parameters held at
    once and the machine change nothing. ``model`` may be on the meta device.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # NumPy's generator, since PyTorch's gives other values on processors with other vector instructions.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return model.initial_parameter(name, tuple(model.get_parameter(name).shape), generator)


def stored_in(form: str, described: Any) -> type[Encoder] | None:
    """The family that a file of some format is of, by what it says of its model.

    Raises:
        CheckpointError: it is of a family, with a setting that the family does not have.
    """
    return next((one for one in families() if form in one.stored and one.stored[form].accepts(described)), None)


def alphabets() -> dict[str, Alphabet]:
    """The alphabets of all families, by the names that options have for them."""
    return {family.config_type.alphabet.name.lower(): family.config_type.alphabet for family in families()}
