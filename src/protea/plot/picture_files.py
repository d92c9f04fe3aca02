"""Picture files: what a suffix means, how a drawing becomes bytes, how the bytes reach the disk.

The same drawing gives the same bytes: files hold no dates and no random ids, and ignore the user's matplotlib settings.
An ``.html`` file holds all that it needs, plotly.js included, and loads nothing.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protea.errors import UsageError
from protea.optional import extra
from protea.output import check_output, staged
from protea.plot.style import INK, clean_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS: Final = (".png", ".svg", ".html")

_SETTINGS: Final[Any] = {
    "svg.hashsalt": "protea",
    "svg.fonttype": "none",  # text stays text, so that it can be found, copied and edited
    "font.size": 8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "legend.borderpad": 0,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # two $ in a name are not a formula
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


def is_page(path: Path) -> bool:
    """Whether the suffix asks for a page; otherwise it asks for a figure, or is refused."""
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: this suffix is not that of a picture; use {', '.join(_KINDS)}")
    return path.suffix == ".html"


def check_place(path: Path) -> None:
    """Refuse a picture that cannot be made, before its content is computed.

    Raises:
        UsageError: the suffix is not that of a picture.
        MissingExtraError: the library that draws it is not installed.
        OutputError: the folder is missing, the path is a folder, or its name is too long.
    """
    library = "plotly.graph_objects" if is_page(path) else "matplotlib.figure"
    with extra("plot", f"{path}: drawing it needs {library.partition('.')[0]}"):
        import_module(library)
    check_output(path, overwrite=True)


def save(path: Path, title: str, *, figure: Callable[[], Figure], page: Callable[[], dict[str, Any]]) -> None:
    """Write a picture. It replaces an older one in one step.

    Args:
        path: checked by ``check_place``.
        title: of the page's window, and of an ``.svg`` for those who cannot see it.
        figure: draws with matplotlib; its ``dpi`` is that of a ``.png``.
        page: describes a plotly figure by ``data`` and ``layout``.

    Raises:
        OutputError: the file cannot be written.
    """
    content = _page_bytes(page(), title) if is_page(path) else _figure_bytes(figure, path.suffix[1:], title)
    with staged(path, overwrite=True) as aside:
        aside.write_bytes(content)


def _figure_bytes(draw: Callable[[], Figure], kind: str, title: str) -> bytes:
    import matplotlib

    metadata: dict[str, str | None] = {"Software": None}
    if kind == "svg":
        metadata = {"Creator": None, "Date": None, "Title": clean_title(title)}
    stream = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks becomes a box in a .png and stays itself in an .svg.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        draw().savefig(stream, format=kind, dpi="figure", metadata=metadata)
    return stream.getvalue()


def _page_bytes(described: dict[str, Any], title: str) -> bytes:
    import plotly.graph_objects
    import plotly.io

    picture = plotly.io.to_html(
        plotly.graph_objects.Figure(described),
        config={"displaylogo": False, "responsive": False},
        include_plotlyjs=True,
        include_mathjax=False,
        full_html=False,
        div_id="picture",
    )
    return _PAGE.format(title=html.escape(clean_title(title)), picture=picture).encode()
