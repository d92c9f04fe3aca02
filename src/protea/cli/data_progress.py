"""Progress bars of ``protea data``."""

from __future__ import annotations

import typer
from rich.progress import Progress, TaskID

from protea.data.work import Watcher


class Bars(Watcher):
    """Draws one bar, of the stage that is under way."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, what: str, total: int | None = None) -> None:
        """Replace the bar by that of the next stage."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def advance(self, amount: int) -> None:
        """Advance it."""
        if self._task is not None:
            self._progress.advance(self._task, amount)

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        if self._progress.disable:
            typer.echo(f"protea: {message}", err=True)
        else:
            self._progress.console.print(f"protea: {message}", markup=False, highlight=False)
