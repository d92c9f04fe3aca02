"""Libraries of the optional parts of this package, and what is said when one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protea.errors import MissingExtraError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Imports within need an optional part.

    Args:
        name: of the part, as pip is told.
        what: needs which library, as in ``--plot needs matplotlib``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{what}: pip install 'protea[{name}]'") from error
