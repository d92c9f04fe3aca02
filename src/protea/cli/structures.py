"""What the commands on contacts share: options, notes on chains, tables of precision, the places of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protea.cli.terminal import show_table, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.contacts.precision import ChainPrecision, Mean
    from protea.letters import ReportRow

Structures = Annotated[
    list[Path],
    typer.Argument(metavar="STRUCTURES", help="PDB or mmCIF files, also .gz, or folders.", show_default=False),
]


def tell_rows(rows: Sequence[ReportRow], report: str) -> bool:
    """Tell which files and chains were skipped, and count the other rows; return whether anything was skipped."""
    for row in rows:
        if row.what == "skipped":
            tell(f"{row.id}: skipped: {row.detail}")
    for reason, count in Counter(row.detail for row in rows if row.what == "left out").items():
        tell(f"left out {counted(count, 'chain')}: {reason}")
    if odd := Counter(row.what for row in rows if row.what not in ("skipped", "left out")):
        tell(f"structures: {', '.join(f'{count} {what}' for what, count in sorted(odd.items()))}; {report}")
    return any(row.what == "skipped" for row in rows)


def show_means(chains: Sequence[ChainPrecision], seed: int = 0) -> None:
    """Print mean precisions with their intervals, a line a range."""
    from protea.contacts.precision import means

    by_range = means(chains, seed)
    parts = list(next(iter(by_range.values())))
    rows = [
        [name, str(cells["chance"].chains), *(_cell(cells[part], part) for part in parts)]
        for name, cells in by_range.items()
    ]
    show_table(["range", "chains", *parts], rows)


def _cell(mean: Mean, part: str) -> str:
    # One chain has no interval over chains.
    interval = "" if part == "chance" or mean.chains < 2 else f" ({mean.low:.3f} to {mean.high:.3f})"
    return f"{decimals(mean.value)}{interval}"


def decimals(value: float) -> str:
    """A number for a table; a dash for nan."""
    return "-" if isnan(value) else f"{value:.3f}"


def picture_paths(plot: Path, names: Sequence[str], *, overwrite: bool) -> dict[str, Path]:
    """Where each protein's picture goes: the named file, or a PNG in a folder, which is created.

    Raises:
        UsageError: a file is named for several proteins, or its suffix is not that of a picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: a picture exists, or cannot be written.
    """
    from protea.embed.names import file_name
    from protea.output import check_output, write_failure
    from protea.plot import check_place

    if not names:
        return {}
    if plot.suffix and not plot.is_dir():
        if len(names) > 1:
            raise UsageError(f"--plot {plot}: there are {len(names):,} proteins; name a folder for their maps")
        check_place(plot)
        paths = {names[0]: plot}
    else:
        check_place(Path("any.png"))  # before the folder is made
        try:
            plot.mkdir(exist_ok=True)
        except OSError as error:
            raise write_failure(error, plot) from error
        paths = {name: plot / f"{file_name(name)}.png" for name in names}
    for path in paths.values():
        check_output(path, overwrite=overwrite)
    return paths
