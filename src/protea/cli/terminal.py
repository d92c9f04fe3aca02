"""What people read: notes and bars on standard error, numbers of things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bars(unit: str = "", *, remaining: bool = True) -> Iterator[Progress]:
    """Rich's bars with rate, amount and time; nothing at all where standard error is no terminal.

    Args:
        unit: of the amounts.
        remaining: show the time left, for work whose size is known, or the time that has passed.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed:,.0f}" + (f" {unit}" if unit else "")),
        TimeRemainingColumn() if remaining else TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def advancing(progress: Progress, what: str, total: float | None) -> Callable[[float], None]:
    """A new bar, as a function that moves it on."""
    bar = progress.add_task(what, total=total)
    return lambda done: progress.advance(bar, done)


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 chain``, ``2,400 chains``; the noun's plural has an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tell(message: str) -> None:
    """A line that people should read, on standard error."""
    typer.echo(f"protea: note: {printable(message)}", err=True)


def printable(message: str) -> str:
    """One line without what terminals obey: files have names of any characters, and so have tensors in them."""
    line = " ".join(message.splitlines())
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
