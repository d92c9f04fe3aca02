"""How the C library handles the process's freed memory."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any, Final

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_SECONDS: Final = 10.0
_last_returned = 0.0


def return_freed_memory(*, between_packs: bool = False) -> None:
    """Return freed memory to the system, also from holes in the heap between small blocks that live long.

    Args:
        between_packs: do it at most every ten seconds, for callers that compute one pack after another. If memory is
            never returned, it grows for hours; returned after each pack, it costs page faults.
    """
    global _last_returned  # noqa: PLW0603  the process has one heap
    now = time.monotonic()
    if between_packs and now - _last_returned < _SECONDS:
        return
    _last_returned = now
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pack: memory that comes back from the system costs page faults."""
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)  # only the main arena may grow without bounds


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
