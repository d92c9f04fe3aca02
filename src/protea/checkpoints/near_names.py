"""Suggestions for a mistyped name: published models, or files and folders on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Final

from protea.models.family import Published

_MOST: Final = 3
"""The largest number of suggestions."""

_ALIKE: Final = 0.5
"""Names that are less alike than this are not offered."""

_FAMILY: Final = re.compile(r"esm[-_ ]?(1nv|2nv|1b|1v|2)")
_SIZE: Final = re.compile(r"(?<!\d)\d+[mb](?![a-z\d])")
_LAYERS: Final = re.compile(r"(?<![a-z\d])t\d+(?!\d)")


def near_models(name: str, models: Iterable[Published]) -> list[str]:
    """The models that a name may mean: those whose family, size and depth it says, else those with a similar name."""
    typed = _features(name)
    near: list[tuple[int, bool, float, str]] = []
    for model in models:
        features = _features(model.name)
        points = sum(1 if features.get(kind) == value else -1 for kind, value in typed.items())
        alike = SequenceMatcher(None, name.lower(), model.name.lower()).ratio()
        if points > 0 or alike >= _ALIKE:
            near.append((max(points, 0), points > 0 and model.publisher == "Meta", alike, model.name))
    near.sort(key=lambda row: row[:3], reverse=True)
    return [model for points, *_, model in near if points == near[0][0]][:_MOST]


def _features(name: str) -> dict[str, str]:
    """The family, size and depth that a name states; a kind that it does not state is absent."""
    text = name.lower()
    family = _FAMILY.search(text)
    rest = text if family is None else f"{text[: family.start()]} {text[family.end() :]}"
    matches = {"size": _SIZE.search(rest), "layers": _LAYERS.search(rest)}
    features = {kind: match[0] for kind, match in matches.items() if match}
    return features if family is None else features | {"family": family[1]}


def near_paths(path: Path) -> str:
    """In words, the existing names that are similar to the first part of a path that does not exist."""
    try:
        folder = next(folder for folder in path.parents if folder.is_dir())
        wanted = path.relative_to(folder).parts[0]
        names = {entry.name.lower(): entry.name for entry in sorted(folder.iterdir()) if entry.name != wanted}
    except (OSError, StopIteration):
        return ""  # the folder cannot be read
    near = [names[name] for name in get_close_matches(wanted.lower(), names, _MOST)]
    return f"{'this folder' if folder == Path() else folder} has {', '.join(near)}" if near else ""
