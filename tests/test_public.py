"""The public names of Protea with their signatures: ``public.txt``, which a change must change on purpose.

``PROTEA_WRITE_PUBLIC=1 pytest -n 0 tests/test_public.py`` writes the file again. ``docs/versions.md`` says what may
change in which version.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import protea
import protea.sklearn
from protea import errors

PUBLIC = Path(__file__).with_name("public.txt")
ERRORS = (protea.ProteaError, protea.ProteaWarning)


def parameters(function: Any) -> str:
    """The signature without quotes around annotations, which differ between versions of Python."""
    shown, keyword_only = [], False
    for one in inspect.signature(function).parameters.values():
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            shown, keyword_only = [*shown, "*"], True
        text = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "") + one.name
        text += "" if one.annotation is one.empty else f": {annotation(one.annotation)}"
        shown.append(text if one.default is one.empty else f"{text} = {one.default!r}")
        keyword_only |= one.kind is one.VAR_POSITIONAL
    returned = inspect.signature(function).return_annotation
    return f"({', '.join(shown)})" + ("" if returned is inspect.Signature.empty else f" -> {annotation(returned)}")


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def lines(module: ModuleType) -> Iterator[str]:
    """One line for each public name of a module, and for each public method and attribute of its classes."""
    for name in sorted(module.__all__):
        value = getattr(module, name)
        place = f"{module.__name__}.{name}"
        if not callable(value):
            yield place
        elif not inspect.isclass(value) or value in ERRORS:
            yield place + ("" if inspect.isclass(value) else parameters(value))
        else:
            yield place + parameters(value)
            yield from sorted(f"{place}.{member}" for member in members(value))


def members(kind: type) -> Iterator[str]:
    """Attributes, properties and methods that Protea's own code gives to a class."""
    found: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if base.__module__.startswith("protea")]):
        found |= dict.fromkeys(assigned(base)) | dict.fromkeys(inspect.get_annotations(base)) | vars(base)
    for name, value in found.items():
        if name.startswith("_") or re.fullmatch("set_.*_request", name):  # the latter are scikit-learn's
            continue
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        yield name + (parameters(plain) if inspect.isfunction(plain) else "")


def assigned(kind: type) -> Iterator[str]:
    """The attributes that the methods of a class assign."""
    for node in ast.walk(ast.parse(inspect.getsource(kind))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_public_names_and_signatures() -> None:
    found = "".join(f"{line}\n" for module in (protea, protea.sklearn) for line in lines(module))
    found += "".join(f"{line}\n" for line in error_lines())
    if os.environ.get("PROTEA_WRITE_PUBLIC"):
        PUBLIC.write_text(found, encoding="utf-8")
    known = PUBLIC.read_text(encoding="utf-8").splitlines()
    gone = [line for line in known if line not in found.splitlines()]
    new = [line for line in found.splitlines() if line not in known]
    assert (gone, new) == ([], []), "the public interface changed; PROTEA_WRITE_PUBLIC=1 accepts it"


def error_lines() -> Iterator[str]:
    """Errors by what they can be caught as, since scripts may catch each of them."""
    for name, kind in sorted(vars(errors).items()):
        if inspect.isclass(kind) and issubclass(kind, ERRORS):
            yield f"protea.errors.{name}({', '.join(base.__name__ for base in kind.__bases__)})"


def test_signatures_as_they_are_listed() -> None:
    def plain(a: int, b: str = "x", *rest: float, c: bool = False, **others: object) -> None: ...

    def keyword(a: list[int] | None = None, *, b: Any) -> list[int]: ...

    assert parameters(plain) == "(a: int, b: str = 'x', *rest: float, c: bool = False, **others: object) -> None"
    assert parameters(keyword) == "(a: list[int] | None = None, *, b: Any) -> list[int]"


@pytest.mark.parametrize("module", [protea, protea.sklearn], ids=lambda module: module.__name__)
def test_every_public_class_and_function_says_what_it_does(module: ModuleType) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or (value.__doc__ or "").strip(), name
