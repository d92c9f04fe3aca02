"""Libraries of the optional parts of this package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote

from protea.errors import MissingExtraError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Explain a failed import: say ``what``, as in ``--plot needs matplotlib``, and how to install part ``name``."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{what}: {install(f'protea[{name}]')}") from error


def install(package: str) -> str:
    """The command that installs a package for this Python, whose environment need not contain pip."""
    return f"pip --python {quote(sys.executable)} install {quote(package)}"
