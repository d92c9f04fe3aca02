"""Where the contact maps of one protein or many are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from protea.disk import check_new
from protea.errors import OutputError, UsageError

MapPlot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="PICTURE", help="A map as .png, .svg or .html; or a folder for one of each protein."
    ),
]


def map_places(plot: Path, names: Sequence[str], *, overwrite: bool) -> dict[str, Path]:
    """Where each protein's picture goes: the file that was named, or a folder of PNGs, which is made.

    Args:
        plot: as it was named.
        names: of the proteins.
        overwrite: pictures may exist.

    Raises:
        UsageError: a file is named for several, or its suffix is no picture's.
        MissingExtraError: what draws it is not installed.
        OutputError: one exists, or cannot be written there.
    """
    from protea.embed.names import file_name
    from protea.plot import check_place

    if not names:
        return {}
    if plot.suffix and not plot.is_dir():
        if len(names) > 1:
            raise UsageError(f"--plot {plot}: there are {len(names):,} proteins; name a folder for their maps")
        check_place(plot)
        check_new(plot, overwrite=overwrite)
        return {names[0]: plot}
    check_place(Path("any.png"))  # that something can draw, before the folder is made
    try:
        plot.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{plot}: cannot be made: {error.strerror or error}") from error
    places = {name: plot / f"{file_name(name)}.png" for name in names}
    for place in places.values():
        check_new(place, overwrite=overwrite)
    return places
