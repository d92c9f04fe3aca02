"""A progress that remembers its tasks."""

from __future__ import annotations

from protea.progress import Progress


class Recorded(Progress):
    """Keeps of each task its name, its total and how much was done."""

    def __init__(self) -> None:
        self.tasks: list[list[object]] = []
        self._done = 0

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        self.tasks.append([task, total, done])
        self._done = done

    def advance(self, amount: int = 1) -> None:
        assert amount >= 0
        self._done += amount
        self.tasks[-1][2] = self._done

    @property
    def complete(self) -> list[object]:
        """The names of the tasks whose total was known and reached."""
        return [task for task, total, done in self.tasks if total is not None and total == done]
