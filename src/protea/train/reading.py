"""Recipes from YAML files and from what users type, and what differs between two of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from protea.errors import UsageError
from protea.train.recipe import Recipe, near

RECIPES: Final = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or by the name of one that comes with the package.

    Args:
        source: a path, or a name.
        overrides: ``section.key=value`` each, values as YAML spells them.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """
    path = _found(source)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected sections as `name:` lines with keys under them")
    for override in overrides:
        _override(values, override)
    return parse(values, str(path))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def list_recipes() -> Iterator[tuple[str, str]]:
    """Name and title of each recipe that comes with the package."""
    for name in recipe_names():
        yield name, str(yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["name"])


def parse(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from values.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(_explain(error, origin)) from error
    try:
        recipe.check()
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error
    return recipe


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two recipes as shown: ``run.steps: 100, now 200``."""
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}: {_typed(a)}, now {_typed(b)}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads 1e-5 as a number, which YAML 1.1 wants spelled 1.0e-5."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _typed(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _found(source: str) -> Path:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise UsageError(f"{source}: no such file; the recipes that come along are {', '.join(recipe_names())}")
        return path
    if source not in recipe_names():
        raise UsageError(
            f"{source}: neither a recipe's file nor its name{near(source, recipe_names())}; "
            f"the names are {', '.join(recipe_names())}"
        )
    return RECIPES / f"{source}.yaml"


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{text!r}: expected key=value, as in optimizer.lr=1e-3")
    try:
        parsed = yaml.load(value, _Loader) if value.strip() else None
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    *sections, key = name.strip().split(".")
    place = values
    for section in sections:
        inner = place.get(section)
        place[section] = place = dict(inner) if isinstance(inner, dict) else {}
    place[key] = parsed


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation or section  # type: ignore[assignment]
        names = list(section.model_fields)
        return f"{origin}: unknown key {where!r}{near(str(first['loc'][-1]), names)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
    return f"{origin}: {where} {first['input']!r} {message}"
