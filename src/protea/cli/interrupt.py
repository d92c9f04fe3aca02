"""One SIGINT or SIGTERM as one KeyboardInterrupt, whatever it breaks into."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
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
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def swallowed(what: UnraisableHookArgs) -> None:
        if what.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            previous(what)

    previous, sys.unraisablehook = sys.unraisablehook, swallowed
    for number in (*_SIGNALS, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = previous


class StopRequest:
    """A signal as a wish to stop that is granted at the next good moment; another one breaks off.

    Args:
        tell: is told what was asked for.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.asked = False
        self._tell = tell
        self._before: dict[signal.Signals, signal.Handlers | int | Callable[..., object] | None] = {}

    def install(self) -> None:
        """From here on."""
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each, handler in self._before.items():
            signal.signal(each, handler)
        # It may have come amid a line that is being printed, which cannot be printed into.
        with suppress(RuntimeError):
            self._tell("stopping: saves a checkpoint first; once more breaks off at once")
