"""Arguments of the Python interface, checked against their annotations before anything computes.

An annotation says what an argument accepts: a class, a ``Literal``, a list of such values, or one of several of these.
``Annotated[str, NAMES]`` accepts the names of a table; ``Annotated[hint, "..."]`` says in words what a hint accepts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from protea.errors import UsageError
from protea.text import shown

_UNIONS: Final = (Union, UnionType)
_LISTS: Final = (Sequence, Collection)  # an annotation with Collection accepts sets too

P = ParamSpec("P")
R = TypeVar("R")


class _Kind(NamedTuple):
    """Values of one class: which they are, and the words for one and for several."""

    accepts: Callable[[Any], bool]
    one: str
    several: str


def _is_path(value: object) -> bool:
    """Whether the system could have a file of that name."""
    try:
        return isinstance(value, str | Path) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


_KINDS: Final[Mapping[Any, _Kind]] = {
    bool: _Kind(lambda value: isinstance(value, bool | np.bool_), "True or False", "booleans"),
    int: _Kind(lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number", "numbers"),
    float: _Kind(lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number", "numbers"),
    str: _Kind(lambda value: isinstance(value, str), "a string", "strings"),
    Path: _Kind(_is_path, "a path", "paths"),
    NoneType: _Kind(lambda value: value is None, "None", ""),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that refuses an option, which is a keyword-only argument, if its annotation does not accept it.

    Options that are NumPy's scalars arrive as Python's.
    """
    names = [item.name for item in signature(function).parameters.values() if item.kind is item.KEYWORD_ONLY]
    # Not earlier than the first call: annotations may name what is defined later.
    hints = cache(lambda: get_type_hints(function, include_extras=True))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in names:
            if name in kwargs:
                value = kwargs[name]
                check(name, value, hints()[name])
                kwargs[name] = value.item() if isinstance(value, np.generic) else value
        return function(*args, **kwargs)

    return call


def check(name: str, value: object, hint: Any) -> None:
    """Raise a ``UsageError`` with the argument's name, its value and the accepted values if the hint does not fit."""
    if not _accepts(hint, value):
        raise UsageError(f"{name}={shown(value)}: use {_words(hint)}")


def check_fields(settings: Any) -> None:
    """``check`` each field of a dataclass; messages begin with the name of its class."""
    for field, hint in get_type_hints(type(settings), include_extras=True).items():
        check(f"{type(settings).__name__}.{field}", getattr(settings, field), hint)


def _accepts(hint: Any, value: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_accepts(part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is Annotated:
        return _accepts(parts[0], value) and (isinstance(parts[1], str) or value in parts[1])
    if origin in _LISTS:
        no_list = (str, bytes, Mapping) if origin is Collection else (str, bytes, Mapping, Set)
        return not isinstance(value, no_list) and all(_accepts(parts[0], item) for item in _items(value))
    return _KINDS[hint].accepts(value) if hint in _KINDS else isinstance(value, hint)


def _items(value: Any) -> list[Any]:
    """The items of what can be read many times; of anything else, one that no hint accepts."""
    try:
        len(value)
        return list(value)
    except TypeError:
        return [object()]


def _words(hint: Any, *, several: bool = False) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return ", or ".join(_words(part, several=several) for part in parts)
    if origin is Annotated and isinstance(parts[1], str):
        return parts[1]
    if origin is Literal or origin is Annotated:
        return ", ".join(parts if origin is Literal else parts[1])
    if origin in _LISTS:
        return f"a list of {_words(parts[0], several=True)}"
    if hint in _KINDS:
        return _KINDS[hint].several if several else _KINDS[hint].one
    return f"a {hint.__name__}"
