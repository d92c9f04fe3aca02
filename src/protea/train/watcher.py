"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Mapping

from protea.train.estimate import Estimate
from protea.train.recipe import Recipe


class Watcher:
    """Is told how a run goes, and says when to stop; this one takes no notice and never does."""

    def begin(self, needs: Estimate, recipe: Recipe, step: int) -> None:
        """Training begins after a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def stop(self) -> bool:
        """Whether to save and leave; asked after every pack."""
        return False
