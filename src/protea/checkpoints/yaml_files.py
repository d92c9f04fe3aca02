"""YAML that describes models, as plain data: its tags are not obeyed, and it cannot grow beyond its file."""

from __future__ import annotations

from typing import Any, Final

import yaml

from protea.errors import CheckpointError

MAX_YAML_BYTES: Final = 256 << 10
"""Far above the description of any model."""

_MAX_DIGITS: Final = 40


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """YAML whose tags of Python objects mean nothing: what they mark is plain data.

    Aliases are the same object again, and cost nothing; merging one mapping into others copies it, as often as the
    file likes.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what ``<<`` names."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merges mappings (<<)", node.start_mark)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A number that can be written out in a message."""
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


def read_yaml(data: bytes) -> Any:
    """What a YAML text says.

    Raises:
        CheckpointError: it is none, or longer than any that describes a model.
    """
    if len(data) > MAX_YAML_BYTES:
        raise CheckpointError(f"more than {MAX_YAML_BYTES:,} bytes, far beyond what describes a model; not read")
    try:
        return yaml.load(data, Loader=_Loader)  # a SafeLoader
    # Unhashable keys, dates that are none, numbers that are none: the library checks little of what it converts.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
