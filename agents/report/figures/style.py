"""What the pictures share: colours for both themes, marks that tell lines apart without colour, axes.

A figure is drawn in the colours of the light theme. The page has a table from each of them to its counterpart in the
dark theme, so that a figure changes with the theme of the reader's system; nothing else in a figure names a colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INK = ("#1c2430", "#e6eaf0")
MUTED = ("#5b6675", "#9aa6b5")
GRID = ("#e3e7ec", "#2b333e")
BAND = ("#eef1f5", "#1f2630")
# After Okabe and Ito, darkened for white and lightened for black, so that each keeps a contrast of 3 to the ground.
SERIES = (
    ("#0072b2", "#56b4e9"),
    ("#c85200", "#ff9a4d"),
    ("#00805e", "#2fd0a0"),
    ("#a3477f", "#e79cc6"),
    ("#7a6a00", "#e8d84a"),
    ("#5a4fcf", "#b0a6ff"),
)
PALETTE = dict([INK, MUTED, GRID, BAND, *SERIES])
"""Light colour -> dark colour."""

Figure = dict[str, Any]
"""``data`` and ``layout`` of plotly. Tests check them by plotly's own classes, which are slow."""
Versions = dict[tuple[str, ...], Figure]
"""A picture's figures by what a reader chooses between, an entry per choice."""

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
MINUS = "\N{MINUS SIGN}"
# Monotone in lightness: it reads the same in grey.
HEAT = {"colorscale": "Cividis", "colorbar": {"thickness": 12, "outlinewidth": 0}}


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is drawn: colour, dash and marker differ together."""

    color: str
    dash: str
    marker: str


def look(number: int) -> Look:
    """Return the look of the series with a number; they repeat after six."""
    place = number % len(SERIES)
    return Look(SERIES[place][0], _DASHES[place], _MARKERS[place])


def looks(labels: Sequence[str], baseline: str) -> dict[str, Look]:
    """Return the look of each policy, the same in all pictures; the baseline is grey, with a dash of its own."""
    others = [label for label in labels if label != baseline]
    found = {label: look(number) for number, label in enumerate(others)}
    return found | {baseline: Look(MUTED[0], "5px,1px,1px,1px", "x")}


def figure(
    data: Sequence[Mapping[str, Any]],
    *,
    height: int,
    x: Mapping[str, Any] | None = None,
    y: Mapping[str, Any] | None = None,
    **layout: Any,
) -> Figure:
    """Return a figure in the style of the report.

    Args:
        data: traces.
        height: pixels; the width follows the page.
        x: what the x axis has beside the common style.
        y: the same of the y axis.
        layout: further entries of plotly's layout.
    """
    style: dict[str, Any] = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK[0]},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "xanchor": "left"},
        "hoverlabel": {"bgcolor": BAND[0], "bordercolor": MUTED[0], "font": {"color": INK[0]}},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED[0], "activecolor": INK[0]},
        "xaxis": axis(**(x or {})),
        "yaxis": axis(**(y or {})),
    }
    return {"data": list(data), "layout": style | layout}


def axis(*, title: str = "", **more: Any) -> dict[str, Any]:
    """Return an axis in the style of the report."""
    style = {"gridcolor": GRID[0], "linecolor": MUTED[0], "zeroline": False, "automargin": True, "showline": True}
    return style | {"title": {"text": title, "font": {"size": 13}, "standoff": 8}} | more


def rule(*, x: float | None = None, y: float | None = None) -> dict[str, Any]:
    """Return a dotted line across the picture, at an x or at a y, as a shape."""
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    if x is None:
        ends = {"x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y}
    return ends | {"type": "line", "line": {"color": MUTED[0], "width": 1, "dash": "dot"}}


def line(style: Look, width: float = 2.0, **more: Any) -> dict[str, Any]:
    """Return the line of a series."""
    return {"color": style.color, "dash": style.dash, "width": width} | more


def marker(style: Look) -> dict[str, Any]:
    """Return the marks of a series."""
    return {"symbol": style.marker, "size": 9, "color": style.color}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Return a logarithmic axis with ticks at round numbers, all of them written out.

    Args:
        low: least value shown, positive.
        high: largest.

    >>> log_axis(30, 300)["ticktext"]
    ['50', '100', '200']
    """
    start, end = math.log10(low), math.log10(max(high, 1.05 * low))
    pad = 0.04 * (end - start)
    decades = range(math.floor(start) - 1, math.ceil(end) + 1)
    ticks: list[float] = []
    for leading in ((1, 10), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8), np.arange(1, 10, 0.2).tolist()):
        found = {round(digit * 10.0**decade, 12) for decade in decades for digit in leading}
        ticks = sorted(tick for tick in found if start - pad <= math.log10(tick) <= end + pad)
        if len(ticks) >= 3:
            break
    return {
        "type": "log",
        "range": (start - pad, end + pad),
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def percent_axis(low: float, high: float, most: int = 8) -> dict[str, Any]:
    """Return a logarithmic axis of ratios whose ticks are relative differences in percent.

    On it -50 % and +100 % are equally far from 0, as the statistics have it, which average logarithms.

    Args:
        low: least relative difference shown.
        high: largest.
        most: ticks at most.

    >>> percent_axis(-0.5, 1.0)["ticktext"]
    ['-50 %', '-20 %', '0 %', '+50 %', '+100 %']
    """
    low, high = min(low, -0.01), max(high, 0.01)
    start, end = math.log10(max(1 + low, 1e-4)), math.log10(1 + high)
    pad = 0.1 * (end - start)
    ends = (start - pad, end + pad)
    down = [-99, -98, -95, -90, -80, -70, -60, -50, -40, -30, -20, -15, -10, -5, -2, -1]
    up = [1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000]
    places = {percent: math.log10(1 + percent / 100) for percent in (0, *down, *up)}
    inside = [percent for percent, place in places.items() if ends[0] <= place <= ends[1]]
    gap, ticks = (ends[1] - ends[0]) / (most + 1), [0]
    for percent in sorted(inside, key=lambda one: (_roundness(one), abs(one))):
        if all(abs(places[percent] - places[tick]) >= gap for tick in ticks):
            ticks.append(percent)
    ticks.sort()
    return {
        "type": "log",
        "range": ends,
        "tickvals": [1 + tick / 100 for tick in ticks],
        "ticktext": [f"{tick:+d} %" if tick else "0 %" for tick in ticks],
    }


def _roundness(percent: int) -> int:
    size = abs(percent)
    return 0 if size in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) else 1


def signed(value: float) -> str:
    """Return a relative difference in percent with its sign; below 1 % with a second decimal.

    >>> signed(0.123), signed(0.00234), signed(0.0)
    ('+12.3', '+0.23', '0')
    """
    percent = 100 * value
    text = f"{percent:+.1f}" if abs(percent) >= 1 else f"{percent:+.2f}"
    return "0" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


def rounded(values: Any, digits: int = 4) -> list[Any]:
    """Return an array as nested lists of numbers with so many significant digits, which keeps the page small."""
    data = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.where(data != 0, np.floor(np.log10(np.abs(data))), 0.0)
    scale = np.power(10.0, digits - 1 - np.nan_to_num(magnitude, posinf=0.0, neginf=0.0))
    plain: list[Any] = np.where(np.isfinite(data), np.round(data * scale) / scale, np.nan).tolist()
    return plain
