"""How a training run reports its progress, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protea.progress import Progress


class TrainingProgress(Progress):
    """Receives the progress of a training run. This class ignores it and never stops the run; subclasses may."""

    def start(self, costs: Sequence[str], steps: int, done: int) -> None:
        """Training begins.

        Args:
            costs: what the run takes, in lines of text.
            steps: of the run.
            done: steps that an earlier, unfinished run has finished.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a step."""

    def stop(self) -> bool:
        """Whether to save a checkpoint and end the run; asked after every pack."""
        return False
