"""How a run reports its progress. The command line draws bars from it; other callers may ignore it."""

from __future__ import annotations

from typing import Final


class Progress:
    """Receives the progress of a run. This class ignores it; subclasses show it."""

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        """Start a task, as in ``embedding``, in place of the one before; ``done`` units are finished already."""

    def advance(self, amount: int = 1) -> None:
        """Add finished units of work to the current task."""

    def note(self, message: str) -> None:
        """Tell the user something that does not stop the run."""


SILENT: Final = Progress()
"""Ignores all progress."""
