"""One SIGINT or SIGTERM ends a command as one ``KeyboardInterrupt``, wherever it arrives."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit code after a signal."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS: Final = 0.05


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into one ``KeyboardInterrupt``; later ones do not disturb the cleanup.

    Python raises it between any two lines. Code that is not written for that may fail with another error, which is
    turned into the interrupt. A finaliser or a weak reference's callback may swallow it; it is then raised again.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        for ignored in SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        raise KeyboardInterrupt

    def raise_again(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            previous(unraisable)

    previous, sys.unraisablehook = sys.unraisablehook, raise_again
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = previous
