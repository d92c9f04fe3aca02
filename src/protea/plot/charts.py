"""Small charts as SVG inside a page of HTML: bars, points and lines, squares of shades. They need no other library.

Colours are classes of ``STYLE``, so that a page follows the reader's choice of light or dark. They are Okabe and Ito's;
series also differ in their marks. Points that are not finite are left out.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from math import ceil, floor, isfinite, log10
from typing import Final, NamedTuple

from protea.text import printable

STYLE: Final = """
:root{color-scheme:light dark;--page:#fff;--ink:#222;--faint:#6a6a6a;--rule:#ddd;--one:#0072b2;--two:#d55e00;--bar:#aaa}
@media(prefers-color-scheme:dark){:root{
--page:#16181c;--ink:#e8e8e8;--faint:#a5a5a5;--rule:#3a3d42;--one:#56b4e9;--two:#e69f00;--bar:#6b6f76}}
svg{max-width:100%;height:auto;font:13px sans-serif}svg text{fill:var(--ink)}svg .faint{fill:var(--faint)}
.rule{stroke:var(--rule);fill:none}.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}.bar{fill:var(--bar)}
.ours,.shade{fill:var(--one)}.shade{stroke:var(--rule)}svg .over{fill:var(--page)}
.line{fill:none;stroke:var(--two);stroke-width:2}.dots{fill:none;stroke-width:5;stroke-linecap:round;stroke-opacity:.6}
.s0{stroke:var(--one)}.s1{stroke:var(--two);stroke-dasharray:7 4}.dots.s1{stroke-dasharray:none}
.guide{stroke:var(--faint);stroke-dasharray:3 4;fill:none}
"""

_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW, _ROW = 460, 340, 70, 34, 50, 26
_LONGEST: Final = 34  # letters of a name
_LARGEST: Final = 1e150  # of a number on an axis; beyond, differences could overflow
_NUMBERED: Final = 12  # classes, at most, whose squares hold numbers
_LETTER: Final = 7.5  # pixels


class Markup(str):
    """Text that is HTML already; all other text is escaped."""

    __slots__ = ()


class Bar(NamedTuple):
    """A value with its interval, or without."""

    name: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    ours: bool = False


class Series(NamedTuple):
    """Points by ``x`` and ``y``. ``form`` is ``dots``, ``line``, ``both``, or ``guide`` (a dashed line)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    form: str = "line"


def element(tag: str, *inside: object, **attributes: object) -> Markup:
    """An element of HTML or SVG; ``_`` at the end of an attribute's name is left out, and elsewhere is ``-``."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"' for name, value in attributes.items()
    )
    return Markup(f"<{tag}{shown}>{''.join(map(_inner, inside))}</{tag}>")


def bars(title: str, axis: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars on an axis from 0, or lower, to 1, or higher, with whiskers for intervals."""
    low, high = _range([0.0, 1.0, *(number for row in rows for number in row[1:4])])
    left = 20 + _LETTER * min(_LONGEST, max(len(row.name) for row in rows))
    width, bottom = 420.0, len(rows) * _ROW + 6.0
    scale = width / (high - low)
    drawn: list[Markup] = []
    for tick in _ticks(low, high):
        drawn += _tick(left + (tick - low) * scale, bottom, 0, tick)
    for place, row in enumerate(rows):
        middle = place * _ROW + _ROW / 2 + 3
        drawn.append(_label(row.name, x=left - 8, y=middle + 4, text_anchor="end"))
        if not isfinite(row.value):
            drawn.append(element("text", "not defined", x=left + 6 - low * scale, y=middle + 4, class_="faint"))
            continue
        ends = sorted((left - low * scale, left + (row.value - low) * scale))
        shape = {"x": ends[0], "y": middle - 9, "width": ends[1] - ends[0], "height": 18}
        drawn.append(element("rect", _title(row.name), class_="ours" if row.ours else "bar", **shape))
        if isfinite(row.low) and isfinite(row.high):
            a, b = (left + (end - low) * scale for end in (row.low, row.high))
            path = f"M{_text(a)} {_text(middle - 4)}v8m0 -4H{_text(b)}m0 -4v8"
            drawn.append(element("path", d=path, class_="whisker"))
        drawn.append(element("text", number_text(*row[1:4]), x=left + width + 12, y=middle + 4))
    drawn.append(element("text", axis, x=left + width / 2, y=bottom + 38, text_anchor="middle"))
    return _svg(title, f"Bars of {axis}", left + width + 190, bottom + 46, drawn)


def plot(title: str, x: str, y: str, series: Sequence[Series], *, equal: bool = False) -> Markup:
    """Points and lines; ``x`` and ``y`` are titles of the axes, which have one range if they are ``equal``."""
    across, up = _range([a for of in series for a in of.x]), _range([b for of in series for b in of.y])
    if equal:
        across = up = min(across[0], up[0]), max(across[1], up[1])
    right, bottom = _WIDTH - 10, _HEIGHT - _BELOW

    def at(a: float, b: float) -> tuple[float, float]:
        return (
            _LEFT + (a - across[0]) / (across[1] - across[0]) * (right - _LEFT),
            bottom - (b - up[0]) / (up[1] - up[0]) * (bottom - _TOP),
        )

    drawn: list[Markup] = []
    for tick in _ticks(*across):
        drawn += _tick(at(tick, 0)[0], bottom, _TOP, tick)
    for tick in _ticks(*up):
        level = at(0, tick)[1]
        drawn.append(element("path", d=f"M{_LEFT} {_text(level)}H{right}", class_="rule"))
        drawn.append(element("text", f"{tick:.6g}", x=_LEFT - 6, y=level + 4, text_anchor="end", class_="faint"))
    place = float(_LEFT)
    for number, of in enumerate(series):
        points = [at(a, b) for a, b in zip(of.x, of.y, strict=True) if _shown(a) and _shown(b)]
        drawn += _marks(points, of.form, number)
        if of.name:
            drawn += _marks([(place, 14), (place + 24, 14)], of.form, number)
            drawn.append(element("text", of.name, x=place + 32, y=18))
            place += 52 + _LETTER * len(of.name)
    drawn.append(_label(x, x=(_LEFT + right) / 2, y=_HEIGHT - 10, text_anchor="middle"))
    turned = f"translate(14 {(_TOP + bottom) / 2}) rotate(-90)"
    drawn.append(_label(y, transform=turned, text_anchor="middle"))
    return _svg(title, f"{y} by {x}", _WIDTH, _HEIGHT, drawn)


def shades(title: str, rows: str, columns: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """A square of counts; shades are shares of a row."""
    side = max(18.0, min(52.0, 540 / len(names)))
    room = _LETTER * min(_LONGEST, max(map(len, names)))
    left = top = room + 36
    end = left + side * len(names)
    drawn = [
        element("text", columns, x=left, y=14),
        element("text", rows, transform=f"translate(14 {_text(end)}) rotate(-90)"),
    ]
    for place, (name, of_row) in enumerate(zip(names, counts, strict=True)):
        middle = left + (place + 0.5) * side
        turned = f"translate({_text(middle)} {_text(top - 8)})" + (" rotate(-90)" if room > side else "")
        drawn.append(_label(name, transform=turned, text_anchor="start" if room > side else "middle"))
        drawn.append(_label(name, x=left - 6, y=middle + 4, text_anchor="end"))
        for column, count in enumerate(of_row):
            share = count / max(1, sum(of_row))
            x, y = left + column * side, middle - side / 2
            told = [_title(f"{name}, predicted as {names[column]}: {count:,} ({share:.0%})")] if count else []
            shape = {"x": x, "y": y, "width": side, "height": side, "fill_opacity": f"{share:.2f}"}
            drawn.append(element("rect", *told, class_="shade", **shape))
            if count and len(names) <= _NUMBERED:
                over = "over" if share > 0.5 else "under"
                drawn.append(
                    element("text", f"{count:,}", x=x + side / 2, y=middle + 4, class_=over, text_anchor="middle")
                )
    return _svg(title, f"{rows} by {columns}", end + 6, end + 6, drawn)


def _svg(title: str, description: str, width: float, height: float, drawn: Sequence[Markup]) -> Markup:
    described = (_title(title), element("desc", description))
    box = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", *described, *drawn, viewBox=box, width=f"{width:.0f}", height=f"{height:.0f}", role="img")


def _marks(points: Sequence[tuple[float, float]], form: str, number: int) -> list[Markup]:
    """A path for the line and one for the dots, which are lines without length with round ends."""
    found, ends = [], [f"{_text(x)} {_text(y)}" for x, y in points]
    if form != "dots" and ends:
        found.append(element("path", d="M" + "L".join(ends), class_="guide" if form == "guide" else f"line s{number}"))
    if form in ("dots", "both") and ends:
        found.append(element("path", d="".join(f"M{end}h0" for end in ends), class_=f"dots s{number}"))
    return found


def _tick(x: float, bottom: float, top: float, value: float) -> list[Markup]:
    line = element("path", d=f"M{_text(x)} {_text(top)}V{_text(bottom)}", class_="rule")
    return [line, element("text", f"{value:.6g}", x=x, y=bottom + 18, text_anchor="middle", class_="faint")]


def _label(name: str, **attributes: object) -> Markup:
    """A name, which is whole in its title if it is cut."""
    if len(name) <= _LONGEST:
        return element("text", name, **attributes)
    return element("text", _title(name), f"{name[: _LONGEST - 1]}…", **attributes)


def _title(text: str) -> Markup:
    return element("title", text)


def number_text(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A number with its interval, if it has one."""
    if isfinite(low) and isfinite(high):
        return f"{number_text(value)} ({number_text(low)} to {number_text(high)})"
    if not isfinite(value):
        return "infinite" if abs(value) == float("inf") else "-"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest, a little apart if they are the same."""
    shown = [value for value in values if _shown(value)] or [0.0]
    low, high = min(shown), max(shown)
    return (low, high) if high - low > 1e-9 * abs(high) else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of the range, about five."""
    power = 10.0 ** floor(log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    return [place * step for place in range(ceil(low / step), floor(high / step) + 1)]


def _shown(value: float) -> bool:
    return isfinite(value) and abs(value) < _LARGEST


def _inner(part: object) -> str:
    return part if isinstance(part, Markup) else html.escape(_text(part))


def _text(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else printable(str(value))
