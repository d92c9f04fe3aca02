"""Files of pictures: what kind a name asks for, how a drawing becomes bytes, how the bytes get to their place.

The same drawing gives the same bytes: no dates, no random ids, nothing of the user's matplotlib settings. ``.html``
files hold all they need, plotly.js included, and load nothing.
"""

from __future__ import annotations

import html
import io
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protea.disk import replacing
from protea.errors import OutputError, UsageError
from protea.optional import extra
from protea.plot.style import INK, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS: Final = (".png", ".svg", ".html")

_SETTINGS: Final[Any] = {
    "svg.hashsalt": "protea",
    "svg.fonttype": "none",  # text stays text: found, copied, edited
    "font.size": 8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # two $ in a name are no formula
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
</head>
<body style="margin:8px">
{picture}
</body>
</html>
"""


def kind_of(path: Path) -> str:
    """The kind of picture that a name asks for: ``png``, ``svg`` or ``html``.

    Raises:
        UsageError: it ends in none of the three.
    """
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: no name of a picture; use one that ends in {', '.join(_KINDS)}")
    return path.suffix.removeprefix(".")


def check_place(path: Path) -> None:
    """Refuse a picture that cannot be made, before what it shows is computed.

    Raises:
        UsageError: the suffix names no kind of picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: there is no folder to put it in, or it is a folder itself.
    """
    library = "plotly.graph_objects" if kind_of(path) == "html" else "matplotlib.figure"
    with extra("plot", f"{path}: drawing it needs {library.partition('.')[0]}"):
        import_module(library)
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: there is no folder {path.parent}; create it first")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder; name a file")


def save_figure(path: Path, draw: Callable[[], Figure], title: str) -> None:
    """Write a drawing of matplotlib's as ``.png`` or ``.svg``.

    Args:
        path: a picture there is replaced.
        draw: makes the figure, in whose ``dpi`` a ``.png`` is written.
        title: of an ``.svg``, for those who cannot see it.

    Raises:
        OutputError: it cannot be written.
    """
    import matplotlib

    kind = kind_of(path)
    metadata: dict[str, str | None] = {"Software": None}
    if kind == "svg":
        metadata = {"Creator": None, "Date": None, "Title": printable(title)}
    stream = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks becomes a box in .png, and is itself in .svg.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        draw().savefig(stream, format=kind, dpi="figure", metadata=metadata)
    _write(path, stream.getvalue())


def save_page(path: Path, figure: dict[str, Any], title: str) -> None:
    """Write a drawing of plotly's as a page that opens without a network.

    Args:
        path: a page there is replaced.
        figure: ``data`` and ``layout``, checked by plotly.
        title: of the window.

    Raises:
        OutputError: it cannot be written.
    """
    import plotly.graph_objects
    import plotly.io

    picture = plotly.io.to_html(
        plotly.graph_objects.Figure(figure),
        config={"displaylogo": False, "responsive": False},
        include_plotlyjs=True,
        include_mathjax=False,
        full_html=False,
        div_id="picture",
    )
    _write(path, _PAGE.format(title=html.escape(printable(title)), picture=picture).encode())


def _write(path: Path, content: bytes) -> None:
    """All or nothing: whoever looks sees the old picture or the new one."""
    with replacing(path) as aside:
        aside.write_bytes(content)
