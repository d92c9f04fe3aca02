"""A signal as a wish to stop, for work that can save itself first."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from protea.cli.interrupt import SIGNALS


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
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each, handler in self._before.items():
            signal.signal(each, handler)
        # It may have come amid a line that is being printed, which cannot be printed into.
        with suppress(RuntimeError):
            self._tell("stopping: saves a checkpoint first; once more breaks off at once")
