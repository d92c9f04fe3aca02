"""How a training run looks while it goes: one line that changes on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from protea.cli.stop import StopRequest
from protea.train.estimate import Estimate
from protea.train.recipe import Recipe
from protea.train.watcher import Watcher

_LINE_SECONDS: Final = 10.0
"""Between lines where there is no terminal."""


class View(Watcher):
    """Shows what a run tells, and passes on the user's wish to stop."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            # What a narrow terminal has no room for is the end of this, not the columns before.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            disable=not self._terminal,
            # Minutes may lie between two logged steps; of the last 30 seconds alone, no rate would be known.
            speed_estimate_period=math.inf,
        )
        self._stop = StopRequest(self.note)
        self._task = self._progress.add_task("", total=None)
        self._steps = 0
        self._validated = ""
        self._printed = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, needs: Estimate, recipe: Recipe, step: int) -> None:
        """Tell what the run takes; from here on, a signal asks to save and leave."""
        for line in cost(needs, recipe):
            self._print(line)
        self._steps = recipe.run.steps
        self._progress.reset(self._task, total=recipe.run.steps, completed=step)
        self._stop.install()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show metrics."""
        if "validation_loss" in values:
            self._validated = f" · validation {values['validation_perplexity']:.3f}"
            if not self._terminal:
                self._print(f"step {step:,}: validation perplexity {values['validation_perplexity']:.4f}")
            return
        text = " · ".join(_parts(values)) + self._validated
        self._progress.update(self._task, completed=step, description=text)
        if not self._terminal and (time.monotonic() - self._printed > _LINE_SECONDS or step == self._steps):
            self._print(f"step {step:,}/{self._steps:,}: {text}")
            self._printed = time.monotonic()

    def note(self, message: str) -> None:
        """Print a line above."""
        self._print(f"protea: note: {message}")

    def stop(self) -> bool:
        """Whether a signal came."""
        return self._stop.asked

    def _print(self, line: str) -> None:
        # A log on a full disk, or that nobody reads any more, does not end the run.
        with suppress(OSError):
            if self._terminal:
                self._progress.console.print(line, markup=False, highlight=False)
            else:
                typer.echo(line, err=True)


def cost(needs: Estimate, recipe: Recipe) -> Iterator[str]:
    """What a run takes, in words."""
    steps, tokens = recipe.run.steps, needs.tokens
    yield (
        f"{needs.parameters:,} parameters; {steps:,} steps of {tokens:,} tokens ({needs.packs:,} packs of "
        f"{recipe.batch.pack:,}), {steps * tokens:.3g} tokens in all"
    )
    total = needs.flops * tokens * steps
    yield f"{needs.flops:.3g} FLOP a token, {total:.3g} in all: {_time(total / 4e14)} at 400 TFLOP/s"
    yield (
        f"memory: {_gigabytes(needs.state)} weights, gradients, moments; {_gigabytes(needs.activations)} a pack's "
        f"activations; {_gigabytes(needs.copies)} main memory for checkpoints"
    )


def _parts(values: Mapping[str, float]) -> Iterator[str]:
    yield f"loss {values['loss']:.4f}"
    yield f"perplexity {values['perplexity']:.3f}"
    yield f"{values['tokens_per_second']:,.0f} tokens/s"
    if "utilisation" in values:
        yield f"utilisation {values['utilisation']:.1%}"
    yield f"padding {values['padding']:.1%}"
    yield f"gradient {values['gradient_norm']:.3f}"
    yield f"lr {values['learning_rate']:.2e}"
    yield _gigabytes(values["peak_memory"])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 360 else f"{seconds:,.0f} seconds"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
