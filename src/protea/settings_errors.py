"""Settings from YAML files: how they are read, and the message for a setting that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from protea.errors import UsageError

Settings = TypeVar("Settings", bound=BaseModel)


class Section(BaseModel):
    """What all settings share: unknown keys are errors, values never change, and true is not the number 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, "bool"):
            raise ValueError("must not be true or false")
        return value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Also reads 1e-5 as a number; YAML 1.1 reads only 1.0e-5 as one."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected `key: value` lines")
    return values


def parse_yaml(text: str, name: str) -> Any:
    """The value that a YAML text stands for; ``name`` is what messages call the text."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def validate(
    kind: type[Settings], values: Mapping[str, Any], source: str, *, noun: str = "key", changes: Sequence[str] = ()
) -> Settings:
    """Settings from plain values; an error names the source, the setting, its value and what it must be.

    ``noun`` is what messages call a setting, as in ``unknown key``. ``changes`` are what a user gave beside the source,
    as ``key=value``; an error about such a key names that too.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        message, given = _explain(error, kind, noun), []
        for change in changes:
            key = re.escape(change.partition("=")[0].strip())
            section = key.partition(r"\.")[0]
            if re.search(rf"(?<![\w.])({key}\b|{section}(?![\w.]))", message):
                given.append(change)
        raise UsageError(f"{source}{' with ' if given else ''}{', '.join(given)}: {message}") from error


def _explain(error: ValidationError, section: type[BaseModel], noun: str) -> str:
    first = error.errors()[0]
    name = ".".join(part for part in first["loc"] if isinstance(part, str))  # leaves out the place in a list
    if first["type"] == "extra_forbidden":
        *sections, last = first["loc"]
        for part in sections:
            section = section.model_fields[str(part)].annotation or section  # type: ignore[assignment]
        return f"unknown {noun} {name!r}{suggestion(str(last), section.model_fields)}"
    if first["type"] == "missing":
        return f"no {name} given"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return f"{name} {first['input']!r} {message}" if name else message


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known name, or all known names."""
    known = list(known)
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else f"; known are {', '.join(known)}"
