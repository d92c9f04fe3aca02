"""Signals: one that ends a command at once, and one that asks a training run to stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED: Final = 130
"""The exit code after a signal."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS: Final = 0.05


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into one ``KeyboardInterrupt``; later ones do not disturb the cleaning up.

    Python raises it between any two lines. Code that is not written for that may fail with another error, which is
    turned into the interrupt. A finaliser or a weak reference's callback may swallow it; it is then raised again.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        for ignored in _SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        raise KeyboardInterrupt

    def raise_again(unraisable: UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            previous(unraisable)

    previous, sys.unraisablehook = sys.unraisablehook, raise_again
    for number in (*_SIGNALS, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = previous


class StopRequest:
    """Turns the first signal into a request to stop soon; the next one is handled as before.

    Attributes:
        received: whether a signal came.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.received = False
        self._note = note
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle signals from now on."""
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        for handled, handler in self._before.items():
            signal.signal(handled, handler)
        # The signal may arrive while a line is printed, and Python refuses to print inside printing.
        with suppress(RuntimeError):
            self._note("stopping: saves a checkpoint first; a second signal stops at once, without saving")
