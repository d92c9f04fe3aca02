"""How a training run looks: a progress bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from protea.cli.interrupt import SIGNALS
from protea.train.metrics import TrainingProgress

_LINE_SECONDS: Final = 10.0
"""Time between two lines if standard error is not a terminal."""


class TrainingView(TrainingProgress):
    """Shows the metrics and notes of a run while its ``bar`` is open; a signal makes ``stop`` return true.

    A ``quiet`` one, for all processes of a run but the first, shows nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._quiet = quiet
        self._terminal = console.is_terminal
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            # A narrow terminal cuts the end of this column, not the columns before it.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            disable=quiet or not self._terminal,
            # The default, 30 seconds, may be shorter than the time between two logged steps.
            speed_estimate_period=math.inf,
        )
        self._task = self.bar.add_task("", total=None)
        self._stop = False
        self._handlers: dict[int, Any] = {}
        self._steps = 0
        self._validation = ""
        self._printed = 0.0

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        """Name a task in the preparation of the training data, and show how much of it is done."""
        self.note(f"training data: {task}")
        self._begin(total, done, task)

    def advance(self, amount: int = 1) -> None:
        """Move the bar of a task in the preparation."""
        self.bar.advance(self._task, amount)

    def start(self, costs: Sequence[str], steps: int, done: int) -> None:
        """Print what the run takes; from now on, a signal asks the run to stop."""
        for line in costs:
            self._print(line)
        self._steps = steps
        self._begin(steps, done)
        self._handlers = {number: signal.signal(number, self._ask_to_stop) for number in SIGNALS}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        if "validation_loss" in values:
            self._validation = f"validation {values['validation_perplexity']:.3f}"
            if not self._terminal:
                self._print(f"step {step:,}: validation perplexity {values['validation_perplexity']:.4f}")
            return
        parts = [
            f"loss {values['loss']:.4f}",
            f"perplexity {values['perplexity']:.3f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            f"utilisation {values['utilisation']:.1%}" if "utilisation" in values else "",
            f"padding {values['padding']:.1%}",
            f"gradient {values['gradient_norm']:.3f}",
            f"lr {values['learning_rate']:.2e}",
            f"{values['peak_memory'] / 1e9:,.1f} GB",
            self._validation,
        ]
        text = " · ".join(filter(None, parts))
        self.bar.update(self._task, completed=step, description=text)
        if not self._terminal and (time.monotonic() - self._printed > _LINE_SECONDS or step == self._steps):
            self._print(f"step {step:,}/{self._steps:,}: {text}")
            self._printed = time.monotonic()

    def note(self, message: str) -> None:
        """Print a line."""
        self._print(f"protea: note: {message}")

    def stop(self) -> bool:
        """Whether a signal came."""
        return self._stop

    def _begin(self, total: int | None, done: int, description: str = "") -> None:
        # Not reset(), which cannot forget a total.
        self.bar.remove_task(self._task)
        self._task = self.bar.add_task(description, total=total, completed=done)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        for handled, handler in self._handlers.items():
            signal.signal(handled, handler)
        # The signal may arrive while a line is printed, and Python refuses to print inside printing.
        with suppress(RuntimeError):
            self.note("stopping: saves a checkpoint first; a second signal stops at once, without saving")

    def _print(self, line: str) -> None:
        if self._quiet:
            return
        # A full disk or a closed pipe behind standard error must not end the run.
        with suppress(OSError):
            if self._terminal:
                self.bar.console.print(line, markup=False, highlight=False)
            else:
                typer.echo(line, err=True)
