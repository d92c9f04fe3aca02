"""Progress bars of a run."""

from __future__ import annotations

from rich.progress import Progress, TaskID

from protea.cli.terminal import printable, tell
from protea.embed.run import Watcher
from protea.embed.survey import Totals


class Bars(Watcher):
    """Draws what a run reports: one bar while it checks, another while it computes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def surveyed(self, residues: int) -> None:
        """Advance the first bar."""
        if self._task is None:
            self._task = self._progress.add_task("checking ", total=None)
        self._progress.advance(self._task, residues)

    def begun(self, total: Totals | None, done: Totals) -> None:
        """Replace it by the second."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        if done.records:
            self.note(f"going on after {done.records:,} records of an unfinished run")
        self._task = self._progress.add_task(
            "embedding", total=None if total is None else total.residues, completed=done.residues
        )

    def embedded(self, residues: int) -> None:
        """Advance the second bar."""
        if self._task is not None:
            self._progress.advance(self._task, residues)

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        if self._progress.disable:
            tell(message)
        else:
            self._progress.console.print(f"protea: note: {printable(message)}", markup=False, highlight=False)
