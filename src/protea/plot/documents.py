"""A page of text, tables and small charts (``charts.py``) in one file, which loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protea.plot import charts
from protea.plot.charts import Markup, element

_HEAD: Final = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)
"""The page's letters are UTF-8, and the browser loads nothing."""

_STYLE: Final = """
body{background:var(--page);color:var(--ink);font:16px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em}
.headline{font-size:1.2em;border-left:6px solid var(--one);padding-left:.8em}a{color:var(--one)}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1em 0;font-size:.9em}
td,th{border-bottom:1px solid var(--rule);padding:.3em .9em .3em 0;text-align:left;vertical-align:top}
small{display:block;color:var(--faint);max-width:24em}pre{overflow-x:auto;border:1px solid var(--rule);padding:.8em}
"""


def document(title: str, parts: Sequence[Markup | None]) -> str:
    """The text of a page: its title, and the parts that are there."""
    head = element("head", Markup(_HEAD), element("title", title), element("style", Markup(charts.STYLE + _STYLE)))
    body = element("body", element("h1", title), *(part for part in parts if part is not None))
    text = f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
    return text.replace("</section>", "</section>\n")


def section(title: str, told: str, *parts: Markup | None) -> Markup:
    """A part of a page: its title, a sentence or more, and what they are about."""
    inside = [element("h2", title), *([element("p", told)] if told else [])]
    return element("section", *inside, *(part for part in parts if part is not None))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table, with or without a header; nothing without rows."""
    if not rows:
        return Markup()
    lines = [element("tr", *(element("th", name) for name in header))] if header else []
    lines += [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", *lines), class_="wide")
