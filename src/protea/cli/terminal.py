"""Output for people: progress bars and notes on standard error, tables on standard output."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from protea.progress import Progress
from protea.text import printable

if TYPE_CHECKING:
    import rich.progress

    from protea.letters import ReportRow


class _Manner:
    """How the command of this process tells things."""

    quiet = False
    drawn: rich.progress.Progress | None = None  # the bars that are shown


def be_quiet(quiet: bool) -> None:
    """Show no progress and no notes from now on, or show them."""
    _Manner.quiet = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the first model is downloaded


def is_quiet() -> bool:
    """Whether progress and notes are not shown."""
    return _Manner.quiet


class Bars(Progress):
    """Draws the current task of a run as a bar with rate, amount and time; notes appear above it."""

    def __init__(self, drawn: rich.progress.Progress, unit: str) -> None:
        self._drawn, self._unit = drawn, f" {unit}" if unit else ""

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        """Replace the bar by one for the new task."""
        for finished in self._drawn.task_ids:
            self._drawn.remove_task(finished)
        self._drawn.add_task(task, total=total, completed=done, unit=self._unit)

    def advance(self, amount: int = 1) -> None:
        """Move the bar."""
        for current in self._drawn.task_ids:
            self._drawn.advance(current, amount)

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        if self._drawn.disable:
            tell(message)
        else:
            self._drawn.console.print(f"protea: note: {printable(message)}", markup=False, highlight=False)


@contextmanager
def bars(unit: str = "") -> Iterator[Bars]:
    """Progress bars on standard error, with amounts in ``unit``.

    Nothing is drawn if that is not a terminal, or the command is quiet. Within others, they take the place of those.
    """
    if _Manner.drawn is not None:
        yield Bars(_Manner.drawn, unit)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(show_speed=True),
        progress.TextColumn("{task.completed:,.0f}{task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = is_quiet() or not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as drawn:
        _Manner.drawn = drawn
        try:
            yield Bars(drawn, unit)
        finally:
            _Manner.drawn = None


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; columns whose cells are numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = all(_is_number(row[number]) for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    # Rich would cut cells that do not fit; with this width nothing is cut, and terminals wrap long lines.
    Console(width=10_000, markup=False, highlight=False).print(table)


def show_json(content: object) -> None:
    """Print a value as JSON to standard output; numbers that JSON does not have, as nan, become null."""
    import json

    typer.echo(json.dumps(_without_nan(content), indent=2, allow_nan=False))


def _without_nan(content: Any) -> Any:
    match content:
        case dict():
            return {key: _without_nan(value) for key, value in content.items()}
        case list() | tuple():
            return [_without_nan(value) for value in content]
        case float():
            return content if math.isfinite(content) else None
        case _:
            return content


def _is_number(cell: str) -> bool:
    """Whether a cell starts with a number, as ``0.04 (0.02 to 0.06)``, or is a dash, which means no number."""
    try:
        float(cell.replace(",", "").partition(" ")[0] or "0")
    except ValueError:
        return cell == "-"
    return True


def tell_doubts(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Tell, in a line a kind, of records that are hardly meant; return the other rows."""
    from protea.letters import Doubts

    doubts = Doubts()
    doubts.add(rows)
    for line in doubts.lines():
        tell(line)
    return [row for row in rows if row.what not in doubts.kinds]


def tell(message: str, *, failed: bool = False) -> None:
    """Print a note to standard error; a quiet command prints it only if it says why the command ``failed``."""
    if failed or not is_quiet():
        typer.echo(f"protea: note: {printable(message)}", err=True)


def aside(line: str) -> None:
    """Print a line about the work, as opposed to its result, to standard error, unless the command is quiet."""
    if not is_quiet():
        typer.echo(line, err=True)
