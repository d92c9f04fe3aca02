"""What commands on structures share: reading them under a bar, saying what was odd, tables of precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.terminal import counted, progress_bars, tell

if TYPE_CHECKING:
    from protea.contacts.precision import ChainPrecision, Mean
    from protea.contacts.structures import Note

    Progress = Callable[[str, int, int], None]

Structures = Annotated[
    list[Path],
    typer.Argument(metavar="STRUCTURES", help="PDB or mmCIF, also .gz; files or folders.", show_default=False),
]


@contextmanager
def one_bar() -> Iterator[Progress]:
    """A bar for one thing after another."""
    with progress_bars() as bars:
        task = bars.add_task("reading", total=None)

        def show(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of)

        yield show


def tell_notes(notes: Sequence[Note], where: str) -> bool:
    """Say on standard error what was skipped, line by line, and how much else was odd.

    Args:
        notes: all there are.
        where: what to see for the others, in words.

    Returns:
        Whether anything was skipped.
    """
    for note in notes:
        if note.what == "skipped":
            tell(f"{note.name}: skipped: {note.detail}")
    left_out = Counter(note.detail for note in notes if note.what == "left out")
    for reason, count in left_out.items():
        tell(f"left out {counted(count, 'chain')}: {reason}")
    odd = Counter(note.what for note in notes if note.what not in ("skipped", "left out"))
    if odd:
        kinds = ", ".join(f"{count} {what}" for what, count in sorted(odd.items()))
        tell(f"of structures: {kinds}; {where}")
    return any(note.what == "skipped" for note in notes)


def echo_means(rows: Sequence[ChainPrecision], seed: int = 0) -> None:
    """Mean precisions with their intervals, a line a range."""
    from protea.contacts.precision import means

    found = means(rows, seed)
    parts = list(next(iter(found.values())))
    typer.echo(f"{'range':<8}{'chains':>7}  " + "".join(f"{part:<24}" for part in parts).rstrip())
    for name, cells in found.items():
        values = "".join(f"{_cell(cells[part], part):<24}" for part in parts).rstrip()
        typer.echo(f"{name:<8}{cells['chance'].chains:>7}  {values}")


def _cell(mean: Mean, part: str) -> str:
    if not mean.chains:
        return "-"
    # One chain has no interval over chains.
    interval = "" if part == "chance" or mean.chains == 1 else f" ({mean.low:.3f} to {mean.high:.3f})"
    return f"{mean.value:.3f}{interval}"
