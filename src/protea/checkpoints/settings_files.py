"""JSON and YAML files in checkpoints, read as plain data, and the numbers among their settings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from protea.checkpoints.region import Region, damaged
from protea.errors import CheckpointError

CONFIG: Final = "config.json"

_MAX_JSON: Final = 16 << 20
_MAX_YAML: Final = 256 << 10
"""Both limits are far above what any model needs."""

_LARGEST: Final = 1 << 60
_MAX_DIGITS: Final = 40


def read_text(region: Region, most: int = _MAX_JSON) -> str:
    """The text of a file that describes a model."""
    if region.size > most:
        raise CheckpointError(f"{region.name}: {region.size:,} bytes, far beyond what describes a model; not read")
    content = region.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CheckpointError(
            f"{region.name}: is UTF-16 text, as PowerShell's > and Out-File write it; save it as UTF-8 (Set-Content "
            "-Encoding utf8)"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(region.name, "not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(read_text(Region.of_file(path)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """Reads values with Python's tags as plain data, and refuses content that can grow far beyond its text.

    Aliases are harmless, since they give the same object again. Merges can copy a mapping any number of times.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("it merges mappings (<<)")

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.YAMLError("a number has too many digits")
        return int(super().construct_yaml_int(node))

    def construct_untagged(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return str(node.value)


_Loader.add_constructor(None, _Loader.construct_untagged)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(region: Region) -> Any:
    """The content of a YAML text. Its tags run nothing."""
    try:
        return yaml.load(read_text(region, _MAX_YAML), Loader=_Loader)  # a SafeLoader
    # PyYAML checks little of what it converts: keys that cannot be hashed, impossible dates, malformed numbers.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{region.name}: cannot be read as YAML: {reason}; fetch it again") from error


def shown(value: Any) -> str:
    """A value as messages show it; of a container only the type, since its text could have any length."""
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
