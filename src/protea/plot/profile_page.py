"""Profiles drawn by plotly: two panels that share the axis of residues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from protea.plot.style import FAINT, INK, PAGE_BUTTONS, PAGE_LEGEND, PAGE_LINE, STRONG, TRUE, markup, page_title

if TYPE_CHECKING:
    from protea.plot.profile_data import Panel, Profile

_WIDTH, _PANEL, _BETWEEN, _TOP, _BOTTOM = 1000, 240, 50, 80, 60
"""Pixels: of panels, between and around them."""

_DOTS: Final = 2000
"""Residues beyond which dots make a page slow; lines remain."""


def page(shown: Profile, title: str) -> dict[str, Any]:
    """The whole picture, as plotly takes it."""
    heading = page_title(title, _WIDTH)
    top = _TOP + PAGE_LINE * heading["text"].count("<br>")
    tall = 2 * _PANEL + _BETWEEN
    axis = {"tickformat": "d", "zeroline": False, "title": {"text": "residue"}}
    layout: dict[str, Any] = {
        "template": "simple_white",
        "width": _WIDTH + 140,
        "height": tall + top + _BOTTOM,
        "title": heading,
        "margin": {"l": 80, "r": 60, "t": top, "b": _BOTTOM},
        "modebar": PAGE_BUTTONS,
        "hovermode": "x",
        "hoversubplots": "axis",
        "dragmode": "zoom",
        "xaxis": axis | {"anchor": "y2", "range": list(shown.limits)},
    }
    traces: list[dict[str, Any]] = []
    for number, panel in enumerate(shown.panels):
        suffix = str(number + 1) if number else ""
        upper = 1 - number * (_PANEL + _BETWEEN) / tall
        limits = np.log10(panel.limits).tolist() if panel.logarithmic else list(panel.limits)
        layout[f"yaxis{suffix}"] = {
            "domain": [max(0.0, upper - _PANEL / tall), upper],
            "range": limits,
            "title": {"text": panel.label},
            **({"type": "log", "tickvals": panel.ticks, "exponentformat": "none"} if panel.logarithmic else {}),
            "zeroline": False,
            "fixedrange": True,
        }
        layout[f"legend{suffix}"] = PAGE_LEGEND | {"x": 1, "xanchor": "right", "y": upper}
        traces += [one | {"yaxis": f"y{suffix}", "legend": f"legend{suffix}"} for one in _traces(shown, panel)]
    return {"data": traces, "layout": layout}


def _traces(shown: Profile, panel: Panel) -> list[dict[str, Any]]:
    places = shown.positions
    text = [
        f"{markup(letter)}{place}<br>likeliest {markup(likeliest)}" if likeliest else f"{markup(letter)}{place}"
        for letter, place, likeliest in zip(shown.sequence, places.tolist(), shown.likeliest, strict=True)
    ]
    few = len(places) <= _DOTS
    thick = {"width": 1.5 if panel.mean is None else 0.7, "color": STRONG if panel.mean is None else FAINT}
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if few else "lines",
            "x": places,
            "y": panel.values,
            "line": thick,
            "marker": {"size": 4},
            "text": text,
            "showlegend": False,
            "hovertemplate": f"%{{text}}<br>{panel.label} %{{y:.3f}}<extra></extra>",
        }
    ]
    quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    if panel.mean is not None:
        line = {"x": places, "y": panel.mean, "line": {"color": STRONG, "width": 1.5}}
        traces.append(quiet | line | {"name": f"mean of {shown.mean_over} residues"})
    for (label, value), colour, dash in zip(panel.guides, (INK, TRUE), ("dot", "dash"), strict=False):
        line = {"x": list(shown.limits), "y": [value, value], "line": {"color": colour, "width": 1, "dash": dash}}
        traces.append(quiet | line | {"name": label})
    return traces
