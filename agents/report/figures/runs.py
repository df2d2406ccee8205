"""Pictures of recorded runs: how latencies are distributed, and the engines over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.agents.report.detail import Detail, DetailRun
from servegym.agents.report.figures.style import (
    HEAT,
    Figure,
    Look,
    Versions,
    axis,
    figure,
    line,
    log_axis,
    look,
    marker,
    rounded,
    rule,
)
from servegym.envs.simulation import Objectives
from servegym.envs.simulator.config import Fault

Float = npt.NDArray[np.float64]

_LEVELS = np.concatenate([np.linspace(0.002, 0.9, 120), 1 - np.geomspace(0.1, 0.001, 60)])
_MARKED = np.array([0.5, 0.9, 0.99])
_MOST_LINES = 6
_PANEL, _GAP = 0.28, 0.08
_PANELS = (
    ("waiting", "waiting requests", 1.0),
    ("running", "running requests", 1.0),
    ("kv_usage", "KV blocks in use, %", 100.0),
)


def distribution_figures(detail: Detail, shown: Mapping[str, Look], objectives: Objectives) -> dict[str, Versions]:
    """Return, for TTFT and for TPOT, two views: the cumulative share, and the tail.

    Args:
        detail: recorded runs.
        shown: looks of the policies.
        objectives: drawn as a line.
    """
    found: dict[str, Versions] = {}
    for key, name, objective in (
        ("ttft_s", "TTFT", objectives.ttft_s),
        ("tpot_s", "TPOT", objectives.tpot_s),
    ):
        samples = {run.label: _finite(getattr(run.outcome, key)[run.counted]) for run in detail.runs}
        found[name] = {
            ("all requests",): _distribution(samples, shown, name, objective, tail=False),
            ("the slowest",): _distribution(samples, shown, name, objective, tail=True),
        }
    return found


def _finite(values: Float) -> Float:
    return values[np.isfinite(values)]


def _distribution(
    samples: Mapping[str, Float], shown: Mapping[str, Look], name: str, objective: float, tail: bool
) -> Figure:
    known = {label: values for label, values in samples.items() if len(values)}
    data = [trace for label, values in known.items() for trace in _curve(label, values, shown[label], tail)]
    x: dict[str, Any] = {"title": f"{name}, ms"}
    if known:
        low = min(float(np.quantile(values, 0.5 if tail else 0.01)) for values in known.values())
        high = max(float(np.quantile(values, 1 - max(0.001, 1 / len(values)))) for values in known.values())
        x |= log_axis(1e3 * low, 1e3 * high)
    if tail:
        y = {"title": "share that takes longer, %", "type": "log", "range": [-1.05, 2]}
        y |= {"tickvals": [100, 10, 1, 0.1], "ticktext": ["100", "10", "1", "0.1"]}
    else:
        y = {"title": "share so fast, %", "range": [0, 101]}
    return figure(data, height=400, x=x, y=y, shapes=[rule(x=1e3 * objective)])


def _curve(label: str, values: Float, style: Look, tail: bool) -> list[dict[str, Any]]:
    """A policy's line, the marks in it at p50, p90 and p99, and the entry of the legend, which shows both."""
    common = {"type": "scatter", "name": label, "legendgroup": label}
    hover = f"<b>{label}</b> p%{{text}}<br>%{{x:.4g}} ms<extra></extra>"
    drawn = []
    for levels, mode, look_of in (
        (_LEVELS, "lines", {"line": line(style)}),
        (_MARKED, "markers", {"marker": marker(style)}),
    ):
        there = levels[(1 - levels) * len(values) >= 1]
        shares = 100 * (1 - there) if tail else 100 * there
        points = {"x": rounded(1e3 * np.quantile(values, there)), "y": rounded(shares), "text": rounded(100 * there)}
        drawn.append(common | points | look_of | {"mode": mode, "showlegend": False, "hovertemplate": hover})
    entry = {"x": [None], "y": [None], "mode": "lines+markers", "line": line(style), "marker": marker(style)}
    return [*drawn, common | entry]


def timeline_figures(detail: Detail) -> Versions:
    """Return a figure per policy: queue, batch and KV use of each engine over time, on the same axes."""
    most = [
        max(4.0, *(factor * float(getattr(run.series, name).max(initial=0.0)) for run in detail.runs))
        for name, _, factor in _PANELS
    ]
    faults = detail.condition.cluster.faults
    return {(run.label,): _timeline(run, most, faults) for run in detail.runs}


def _timeline(run: DetailRun, most: Sequence[float], faults: Sequence[Fault]) -> Figure:
    lines = run.series.waiting.shape[1] <= _MOST_LINES
    time = rounded(run.series.time_s)
    data, layout, notes = [], {}, []
    for place, ((name, title, factor), top) in enumerate(zip(_PANELS, most, strict=True)):
        # From above; plotly numbers the axes from 1, and leaves the first number out.
        number = "" if place == 0 else str(place + 1)
        high = 1 - place * (_PANEL + _GAP)
        low = max(high - _PANEL, 0.0)
        last = place == len(_PANELS) - 1
        values = getattr(run.series, name) * factor
        traces = _lines(values, title, place == 0) if lines else [_rows(values, title, top, 0.5 * (low + high))]
        data += [trace | {"x": time, "xaxis": f"x{number}", "yaxis": f"y{number}"} for trace in traces]
        y = {"range": [0, 1.05 * top]} if lines else {"title": "engine", "autorange": "reversed"}
        shared = {"matches": "x"} if number else {}
        layout[f"xaxis{number}"] = axis(
            title="time, s" if last else "", anchor=f"y{number}", showticklabels=last, **shared
        )
        layout[f"yaxis{number}"] = axis(domain=[low, high], anchor=f"x{number}", **y)
        notes.append({"text": title, "x": 0, "y": high, "yanchor": "bottom", "xanchor": "left"})
    marked = {"xref": "x", "y": 1, "yanchor": "top", "xanchor": "left", "textangle": -90}
    notes += [marked | {"text": f"{fault.kind} {fault.engine}", "x": fault.at_s} for fault in faults]
    common = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 13}}
    return figure(
        data,
        height=640,
        **layout,
        shapes=[rule(x=fault.at_s) for fault in faults],
        annotations=[common | note for note in notes],
        margin={"l": 8, "r": 12, "t": 60, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom", "xanchor": "left"},
    )


def _lines(values: Float, title: str, legend: bool) -> list[dict[str, Any]]:
    """A line per engine."""
    return [
        {
            "type": "scatter",
            "y": rounded(values[:, engine], 3),
            "name": f"engine {engine}",
            "legendgroup": str(engine),
            "showlegend": legend,
            "mode": "lines",
            "line": line(look(engine), 1.5, shape="hv"),
            "hovertemplate": f"engine {engine}<br>%{{x}} s<br>{title}: %{{y}}<extra></extra>",
        }
        for engine in range(values.shape[1])
    ]


def _rows(values: Float, title: str, most: float, middle: float) -> dict[str, Any]:
    """A heat map with a row per engine: lines of many engines nobody tells apart."""
    return HEAT | {
        "type": "heatmap",
        "y": list(range(values.shape[1])),
        "z": rounded(values.T, 3),
        "zmin": 0,
        "zmax": most,
        "colorbar": {"len": 0.28, "y": middle, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"engine %{{y}}<br>%{{x}} s<br>{title}: %{{z}}<extra></extra>",
    }
