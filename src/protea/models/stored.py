"""How a family is kept in a checkpoint format: its tensors' names there, and what a file says beside them.

A table of keys maps our parameter names to a format's. ``{}`` stands for the number of a layer, ``*`` for what follows
the last dot: ``weight`` or ``bias``. A key without ``{}`` for a name with it is one tensor that stacks all layers; a
key with ``{}`` for a name without is a buffer that is repeated in each layer. Several names of one key are fused into
it, in the model's order. A parameter without a line has no place in the format. Nothing here reads or writes files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from protea.models.config import EncoderConfig

Keys = Mapping[str, str]
"""Our names to a format's, as the module says."""


class Shapes(Protocol):
    """Shapes of stored parameters, by our names."""

    def __contains__(self, name: object) -> bool:
        """Whether a parameter is stored."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Its shape; raises CheckpointError where it is missing."""


_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")


def key_of(keys: Keys, name: str) -> tuple[str, int | None] | None:
    """Where a table keeps a parameter: its key, and its entry in a stack of layers.

    Args:
        keys: of a format.
        name: of the parameter.

    Returns:
        ``None`` if the format has no place for it.
    """
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


def _no_reason(config: EncoderConfig) -> None:
    return None


def _nothing(config: EncoderConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """A family in a format.

    Attributes:
        keys: the table of names.
        accepts: whether what a file says of its model means this family; raises CheckpointError where it means the
            family with a setting that it does not have.
        config: the configuration, from what a file says, the sizes that all families of the format spell alike, and
            the shapes of stored parameters.
        describe: what a file says of a model beside what the format says of all families alike.
        unsupported: why the format, or the library that reads it, cannot hold a model of the family.
        padded: the vocabulary's padding is part of the architecture, and stays.
        classes: the library's classes for the model with its language-model head and without; none if it has none.
        prefix: what names of files begin with, where the library goes by them.
        zeroed: rows that the library sets to 0 as it loads, by parameter.
        tokenizer: the library's tokenizer class.
    """

    keys: Keys
    accepts: Callable[[Mapping[str, Any]], bool] = lambda described: True
    config: Callable[[Mapping[str, Any], dict[str, Any], Shapes], EncoderConfig]
    describe: Callable[[Any], dict[str, Any]] = _nothing
    unsupported: Callable[[Any], str | None] = _no_reason
    padded: bool = False
    classes: tuple[str, str] | None = None
    prefix: str = ""
    zeroed: Callable[[Any], Mapping[str, int]] = _nothing
    tokenizer: str = ""
