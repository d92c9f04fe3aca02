"""The process's own memory: what the C library does with freed blocks. Knows nothing of models or devices."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""Parameters of glibc's ``mallopt``."""

_SECONDS: Final = 10.0


def return_freed_memory() -> None:
    """Give the system what glibc keeps free, the holes that long-lived small blocks leave in the heap among it.

    Now and then: memory that is kept for good grows for hours, memory that is returned at once costs page faults.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


_last_returned = 0.0


def return_freed_memory_at_times() -> None:
    """The same at most every ten seconds, for whoever computes pack after pack."""
    global _last_returned  # noqa: PLW0603  the heap is the process's
    now = time.monotonic()
    if now - _last_returned >= _SECONDS:
        _last_returned = now
        return_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next pack: giving megabytes back and forth costs a page fault every 4 kB.

    One arena for all threads, since only the main one may grow without bounds.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
