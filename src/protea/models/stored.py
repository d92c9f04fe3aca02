"""How a family is stored in a checkpoint format: the names of its tensors and the content of its settings.

A table of keys maps our parameter names to a format's. ``{}`` stands for the number of a layer, ``*`` for what follows
the last dot: ``weight`` or ``bias``. If only our name has ``{}``, one tensor stacks all layers; if only the key has it,
a buffer is repeated in each layer. Names with the same key are fused in it, in the model's order. A format does not
store parameters without an entry. Nothing here reads or writes files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from protea.models.config import EncoderConfig

Keys = Mapping[str, str]


class Shapes(Protocol):
    """Shapes of stored parameters, by our names; a missing parameter is a ``CheckpointError``."""

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> tuple[int, ...]: ...


_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")


def key_of(keys: Keys, name: str) -> tuple[str, int | None] | None:
    """The key of a parameter and its index in a stack of layers; ``None`` if the format does not store it."""
    match = _LAYER.fullmatch(name)
    number = None if match is None else int(match[1])
    general = name if match is None else f"layers.{{}}.{match[2]}"
    stem, _, kind = general.rpartition(".")
    key = keys.get(general) or keys.get(f"{stem}.*")
    if key is None:
        return None
    key = key.replace("*", kind)
    if number is None or "{}" not in key:
        return key, number
    return key.replace("{}", str(number)), None


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """A family in a format.

    Attributes:
        keys: the table of keys.
        accepts: whether a file's settings mean this family; raises CheckpointError if the family lacks a setting.
        config: the configuration, from a file's settings, the sizes that all families of the format store alike, and
            the shapes of stored parameters.
        describe: the settings to write, beside those that all families of the format share.
        unsupported: why the format, or the library that reads it, cannot hold a model; ``None`` if it can.
        padded: whether padding of the vocabulary is part of the architecture and stays.
        classes: the library's classes for a model with and without its language-model head.
        prefix: required start of file names, if the library tells families apart by it.
        zeroed: rows that the library sets to 0 when it loads, by parameter.
        tokenizer: the library's tokenizer class.
    """

    keys: Keys
    accepts: Callable[[Mapping[str, Any]], bool] = lambda described: True
    config: Callable[[Mapping[str, Any], dict[str, Any], Shapes], EncoderConfig]
    describe: Callable[[Any], dict[str, Any]] = lambda config: {}
    unsupported: Callable[[Any], str | None] = lambda config: None
    padded: bool = False
    classes: tuple[str, str] | None = None
    prefix: str = ""
    zeroed: Callable[[Any], Mapping[str, int]] = lambda config: {}
    tokenizer: str = ""
