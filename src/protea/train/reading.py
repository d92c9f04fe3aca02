"""Recipes from YAML files and from what users type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from protea.errors import UsageError
from protea.settings_errors import explain, parse_yaml, read_yaml, suggestion
from protea.train.recipe import Recipe

RECIPES: Final = Path(__file__).parents[1] / "recipes"
"""The recipes that come with the package."""


def read_recipe(source: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or by the name of one that comes with the package.

    Args:
        source: a path, or a name.
        changes: ``section.key=value`` each, with values as in YAML.

    Raises:
        UsageError: the source or a change cannot be read; names the key, its value and what it must be.
    """
    path = _recipe_path(source)
    values = read_yaml(path, str(path))
    for change in changes:
        _apply(change, values)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from plain values.

    Raises:
        UsageError: a value is wrong; names the source, the key, its value and what it must be.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(f"{source}: {explain(error, Recipe)}") from error


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def list_recipes() -> Iterator[tuple[str, str]]:
    """Name and title of each recipe that comes with the package."""
    for name in recipe_names():
        yield name, str(read_yaml(RECIPES / f"{name}.yaml", name)["name"])


def _recipe_path(source: str) -> Path:
    path, names = Path(source), recipe_names()
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise UsageError(f"{source}: there is no such file; recipes that come with Protea: {', '.join(names)}")
        return path
    if source not in names:
        raise UsageError(f"{source}: is neither a file nor the name of a recipe{suggestion(source, names)}")
    return RECIPES / f"{source}.yaml"


def _apply(change: str, values: dict[str, Any]) -> None:
    name, equals, value = change.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{change!r}: expected key=value, as in optimizer.lr=1e-3")
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = values = dict(inner) if isinstance(inner, dict) else {}
    values[key] = parse_yaml(value, repr(change))
