"""Substitutions drawn by plotly: a panel for every row, each of which zooms along the protein on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from protea.plot.style import (
    EFFECTS,
    INK,
    MISSING,
    PAGE_BUTTONS,
    PAGE_LEGEND,
    PAGE_LINE,
    PAGE_RULE,
    SCALE,
    markup,
    page_key,
    page_title,
)

if TYPE_CHECKING:
    from protea.plot.scan_data import ScanPicture, ScanRow

_WIDE, _NARROWEST_CELL, _BROADEST_CELL, _CELL = 1120, 14, 36, 14
"""Pixels: of a row, of a cell's width, and of its height."""

_NARROWEST, _GAP, _HEADER = 600, 64, 80
"""Pixels: the least width, between rows, and for the legend."""

_ABOVE: Final = 1.2
"""Letters of the sequence stand above a panel by so many cells."""


def page(scan: ScanPicture, title: str) -> dict[str, Any]:
    """The whole picture, as plotly takes it."""
    rows = list(scan.rows())
    cell = min(_BROADEST_CELL, max(_NARROWEST_CELL, _WIDE / scan.columns))
    high = _CELL * (len(scan.letters) + _ABOVE)
    wide, tall = max(_NARROWEST, cell * scan.columns), len(rows) * (high + _GAP) - _GAP
    heading = page_title(title, int(wide))
    top = _HEADER + PAGE_LINE * heading["text"].count("<br>")
    bar: dict[str, Any] = {"title": {"text": SCALE, "side": "right"}}
    bar |= {"lenmode": "pixels", "len": high, "y": 1, "yanchor": "top"}
    layout: dict[str, Any] = {
        "template": "simple_white",
        "width": wide + 260,
        "height": tall + top + 60,
        "title": heading,
        "margin": {"l": 120, "r": 140, "t": top, "b": 60},
        "modebar": PAGE_BUTTONS,
        "dragmode": "pan",
        "legend": PAGE_LEGEND | {"y": 1 + 6 / tall},
        "coloraxis": {"colorscale": EFFECTS, "cmin": -scan.limit, "cmax": scan.limit, "colorbar": bar},
        "shapes": [],
        "annotations": [],
    }
    traces = [
        page_key(label, colour, mark="square" if colour == MISSING else "dot") for label, colour in scan.legend.items()
    ]
    for number, row in enumerate(rows):
        x, y = (f"{axis}{number + 1 if number else ''}" for axis in "xy")
        upper = 1 - number * (high + _GAP) / tall
        traces += [one | {"xaxis": x, "yaxis": y} for one in _traces(scan, row)]
        across = [0, cell * len(row.sequence) / wide]
        layout[f"xaxis{x[1:]}"] = _residues(row) | {"anchor": y, "domain": across}
        layout[f"yaxis{y[1:]}"] = _letters(scan) | {"anchor": x, "domain": [max(0.0, upper - high / tall), upper]}
        _mark_groups(scan, layout, {"xref": f"{x} domain", "yref": y})
    return {"data": traces, "layout": layout}


def _residues(row: ScanRow) -> dict[str, Any]:
    return {
        "range": [row.first - 0.5, row.first + len(row.sequence) - 0.5],
        "tickformat": "d",
        "nticks": max(10, len(row.sequence) // 8),
        "zeroline": False,
        "showline": False,
    }


def _letters(scan: ScanPicture) -> dict[str, Any]:
    return {
        "range": [len(scan.letters) - 0.5, -0.5 - _ABOVE],
        "tickvals": list(range(len(scan.letters))),
        "ticktext": [markup(letter) for letter in scan.letters],
        "tickfont": {"size": 11},
        "ticks": "",
        "zeroline": False,
        "showline": False,
        "fixedrange": True,
    }


def _mark_groups(scan: ScanPicture, layout: dict[str, Any], panel: dict[str, str]) -> None:
    """Lines between groups and their names, and below the cells the colour that gaps let through."""
    across = panel | {"x0": 0, "x1": 1}
    box = {"type": "rect", "y0": -0.5, "y1": len(scan.letters) - 0.5, "layer": "below", "line": {"width": 0}}
    layout["shapes"].append(across | box | {"fillcolor": MISSING, "opacity": 1})
    for name, start, end in scan.groups:
        layout["shapes"].append(across | {"type": "line", "y0": start - 0.5, "y1": start - 0.5} | PAGE_RULE)
        middle = {"text": name, "x": 0, "y": (start + end - 1) / 2, "showarrow": False, "font": {"size": 11}}
        layout["annotations"].append(panel | middle | {"xanchor": "right", "xshift": -24})


def _traces(scan: ScanPicture, row: ScanRow) -> list[dict[str, Any]]:
    numbers = [row.first + number for number in range(len(row.sequence))]
    wild = [f"{markup(letter)}{number}" for letter, number in zip(row.sequence, numbers, strict=True)]
    names = [[f"{residue}{markup(letter)}" for residue in wild] for letter in scan.letters]
    for residue, letter in row.wild:
        names[letter][residue] = f"{wild[residue]}, wild type"
    dots = {"x": [numbers[residue] for residue, _ in row.wild], "y": [letter for _, letter in row.wild]}
    quiet = {"type": "scatter", "hoverinfo": "skip", "showlegend": False}
    return [
        {
            "type": "heatmap",
            "z": row.scores.T,
            "x0": row.first,
            "dx": 1,
            "text": names,
            "coloraxis": "coloraxis",
            "hovertemplate": "%{text}<br>%{z:.3f}<extra></extra>",
            "hoverongaps": False,
        },
        quiet | dots | {"mode": "markers", "marker": {"color": INK, "size": 4}},
        {
            **quiet,
            "mode": "text",
            "x": numbers,
            "y": [-0.5 - _ABOVE / 2] * len(numbers),
            "textfont": {"size": 11},
            "text": [markup(letter) for letter in row.sequence],
        },
    ]
