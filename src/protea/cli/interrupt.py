"""One SIGINT or SIGTERM as one KeyboardInterrupt, whatever it breaks into."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""What ends a command."""

_AGAIN_SECONDS: Final = 0.05

INTERRUPTED: Final = 130
"""The exit code of what a signal ended."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end what is within; what follows is cleaning up, which another signal does not break off.

    Python raises between any two lines. Two things can go wrong with that, and neither is the user's business: code
    not written to be left there fails in its turn, which becomes the interrupt it came from; and a finaliser or the
    callback of a weak reference swallows what is raised within it, in which case it is raised again a moment later.
    """
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def swallowed(what: UnraisableHookArgs) -> None:
        if what.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            previous(what)

    previous, sys.unraisablehook = sys.unraisablehook, swallowed
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = previous
