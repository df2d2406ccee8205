"""Experts over time: which are popular, and what each policy's placement makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.agents.report.detail import Detail, DetailRun
from servegym.agents.report.figures.style import HEAT, INK, Figure, Look, Versions, figure, line, rounded
from servegym.envs.simulator.recording import ExpertSeries

Array = npt.NDArray[Any]

_MOST_SAMPLES = 100


def balance_figure(detail: Detail, shown: Mapping[str, Look]) -> Figure:
    """Return the load of the heaviest rank over time, mean over layers, a line per policy."""
    data = [
        {
            "type": "scatter",
            "x": rounded(run.series.time_s),
            "y": rounded(_experts(run).heaviest.mean(axis=1)),
            "name": run.label,
            "mode": "lines",
            "line": line(shown[run.label]),
            "hovertemplate": f"<b>{run.label}</b><br>%{{x}} s<br>%{{y:.3f}}<extra></extra>",
        }
        for run in detail.runs
    ]
    return figure(data, height=360, x={"title": "time, s"}, y={"title": "heaviest rank / mean rank"})


def rank_figures(detail: Detail) -> Versions:
    """Return a heat map per policy: the load of the heaviest rank by layer over time, and the re-placements."""
    every = _thinned(detail.runs)
    most = float(np.quantile(np.concatenate([_experts(run).heaviest.ravel() for run in detail.runs]), 0.995))
    found: Versions = {}
    for run in detail.runs:
        experts, time = _experts(run), run.series.time_s
        begun = np.flatnonzero(np.diff(experts.replacements, prepend=0) > 0)
        layers = experts.heaviest.shape[1]
        heat = _heat(time[::every], experts.heaviest[::every].T, 1.0, most, "layer %{y}", "heaviest / mean rank: %{z}")
        marks = {
            "type": "scatter",
            "x": rounded(time[begun]),
            "y": [layers + 0.6] * len(begun),
            "mode": "markers",
            "marker": {"symbol": "triangle-down", "size": 9, "color": INK[0]},
            "hovertemplate": "re-placement<br>%{x} s<extra></extra>",
        }
        y = {"title": "layer", "range": [-0.5, layers + 1.5]}
        found[run.label,] = figure([heat, marks], height=420, x={"title": "time, s"}, y=y, showlegend=False)
    return found


def popularity_figures(detail: Detail) -> Versions:
    """Return a heat map of the experts' popularity over time for three layers: with most, median and least change.

    What is popular is the requests', not the policy's: the first run stands for all.
    """
    run = detail.runs[0]
    popularity = _experts(run).popularity
    order = np.argsort(popularity.std(axis=0).sum(axis=1))
    every = _thinned(detail.runs)
    layers = dict.fromkeys(int(order[place]) for place in (-1, len(order) // 2, 0))
    most = float(np.quantile(popularity[:, list(layers)], 0.995))
    found: Versions = {}
    for layer in layers:
        values = popularity[::every, layer].T
        heat = _heat(run.series.time_s[::every], values, 0.0, most, "expert %{y}", "%{z} x the mean")
        found[f"layer {layer}",] = figure([heat], height=420, x={"title": "time, s"}, y={"title": "logical expert"})
    return found


def _heat(time: Array, values: Array, low: float, high: float, row: str, text: str) -> dict[str, Any]:
    """A heat map of values of shape (rows, times)."""
    return HEAT | {
        "type": "heatmap",
        "x": rounded(time),
        "y": list(range(len(values))),
        "z": rounded(values, 3),
        "zmin": low,
        "zmax": max(high, low + 0.001),
        "hovertemplate": f"{row}<br>%{{x}} s<br>{text}<extra></extra>",
    }


def _experts(run: DetailRun) -> ExpertSeries:
    assert run.series.experts is not None
    return run.series.experts


def _thinned(runs: Sequence[DetailRun]) -> int:
    return max(1, max(len(run.series.time_s) for run in runs) // _MOST_SAMPLES)
