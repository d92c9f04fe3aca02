"""Options of the Python interface, checked against their annotations before anything computes.

An annotation says what an option accepts: a class, a ``Literal``, a list of such values, or any of several of these.
``Annotated[str, NAMES]`` accepts the names of a table; ``Annotated[hint, "..."]`` puts a hint into words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from protea.errors import UsageError
from protea.text import shown

P = ParamSpec("P")
R = TypeVar("R")


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
    """Raise a ``UsageError`` that says what the argument accepts if its value does not fit the hint."""
    if not _fits(hint, value):
        raise UsageError(f"{name}={shown(value)}: use {_words(hint)}")


def check_fields(settings: Any) -> None:
    """``check`` each field of a dataclass."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        check(f"{type(settings).__name__}.{name}", getattr(settings, name), hint)


def _is_path(value: object) -> bool:
    """Whether the system could have a file of that name."""
    try:
        return isinstance(value, str | Path) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


_KINDS: Final[Mapping[Any, tuple[str, Callable[[Any], bool]]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, str)),
    Path: ("a path", _is_path),
    NoneType: ("None", lambda value: value is None),
}
"""For each class, the words for messages and the check of a value."""

_UNIONS: Final = (Union, UnionType)
_NO_LISTS: Final = {Sequence: (str, bytes, Mapping, Set), Collection: (str, bytes, Mapping)}
"""For each kind of list, the classes that are iterable but are refused; a ``Collection`` may be a set."""


def _fits(hint: Any, value: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is Annotated:
        return _fits(parts[0], value) and (isinstance(parts[1], str) or value in parts[1])
    if origin in _NO_LISTS:
        try:
            return not isinstance(value, _NO_LISTS[origin]) and len(value) == sum(_fits(parts[0], v) for v in value)
        except TypeError:  # it has no length, or no items
            return False
    return _KINDS[hint][1](value) if hint in _KINDS else isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return ", or ".join(map(_words, parts))
    if origin is Annotated and isinstance(parts[1], str):
        return parts[1]
    if origin in (Literal, Annotated):
        return ", ".join(parts if origin is Literal else parts[1])
    return _KINDS[hint][0] if hint in _KINDS else f"a {hint.__name__}"
