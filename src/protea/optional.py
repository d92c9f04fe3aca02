"""Libraries of the optional parts of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protea.errors import MissingExtraError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Explain a failed import: say ``what``, as in ``--plot needs matplotlib``, and how to install part ``name``."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{what}: pip install 'protea[{name}]'") from error
