"""YAML files in checkpoints, read as plain data, and numbers in settings of any spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import yaml

from protea.checkpoints.region import Region
from protea.errors import CheckpointError

_LARGEST: Final = 1 << 60

_MAX_BYTES: Final = 256 << 10
"""Far more than describes any model."""

_MAX_DIGITS: Final = 40


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """Reads what Python's tags mark as plain data.

    Aliases are harmless, since they give the same object again. Merges are refused: they copy a mapping as often as
    the file asks.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merges mappings (<<)", node.start_mark)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "has a number of too many digits", node.start_mark)
        return int(super().construct_yaml_int(node))


def _untagged(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return str(node.value)


_Loader.add_constructor(None, _untagged)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(region: Region) -> Any:
    """The content of a YAML text. Its tags run nothing, and it cannot grow larger than the text."""
    if region.size > _MAX_BYTES:
        raise CheckpointError(f"{region.name}: {region.size:,} bytes, far beyond what describes a model; not read")
    try:
        return yaml.load(region.read(), Loader=_Loader)  # a SafeLoader
    # PyYAML checks little of what it converts: keys that cannot be hashed, impossible dates, malformed numbers.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{region.name}: cannot be read as YAML: {reason}; fetch it again") from error


def shown(value: Any) -> str:
    """A value as messages show it; containers could have any size once written out."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else repr(value)[:100]


def number(settings: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A number among the settings; the default where it is absent, or refers to another setting (``${...}``)."""
    value = settings.get(key)
    if value is None or (isinstance(value, str) and value.startswith("${")):
        value = default
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LARGEST:
        raise CheckpointError(f"{key} is {shown(settings.get(key))}, not a number")
    return value


def count(settings: Mapping[str, Any], key: str, default: Any = None) -> int:
    """A whole number among the settings, or the default."""
    value = number(settings, key, default)
    if value != int(value):
        raise CheckpointError(f"{key} is {value}, not a whole number")
    return int(value)
