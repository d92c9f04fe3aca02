"""Settings from YAML files: how they are read, and the message for a setting that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from protea.errors import UsageError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Also reads 1e-5 as a number; YAML 1.1 reads only 1.0e-5 as one."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        name: what messages call it.

    Raises:
        UsageError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    values = parse_yaml(text, name)
    if not isinstance(values, dict):
        raise UsageError(f"{name}: expected `key: value` lines")
    return values


def parse_yaml(text: str, name: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        UsageError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def explain(error: ValidationError, settings: type[BaseModel], *, noun: str = "key") -> str:
    """The first error of a validation as a message: which setting, its value, and what it must be.

    Args:
        error: as raised by pydantic.
        settings: the model that was validated; its fields may be models too.
        noun: what the message calls a setting, as in ``unknown key``.
    """
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = settings
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation or section  # type: ignore[assignment]
        return f"unknown {noun} {name!r}{suggestion(str(first['loc'][-1]), section.model_fields)}"
    if first["type"] == "missing":
        return f"no {name} given"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return f"{name} {first['input']!r} {message}" if name else message


def suggestion(name: str, known: Iterable[str]) -> str:
    """What a message says after an unknown name: the most similar known name, or all known names."""
    similar = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else f"; known are {', '.join(known)}"
