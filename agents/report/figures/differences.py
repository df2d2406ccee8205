"""Who leads and by how much: paired differences with their intervals, and metrics over the ladder of loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servegym.agents.evaluation.report import METRICS, Evaluation
from servegym.agents.report.figures.style import (
    INK,
    MUTED,
    SERIES,
    Figure,
    Look,
    Versions,
    figure,
    line,
    log_axis,
    marker,
    percent_axis,
    rule,
    signed,
)

NAMES = {
    "ttft_s": "TTFT",
    "ttft_p99_s": "TTFT p99",
    "tpot_s": "TPOT",
    "e2e_s": "E2E",
    "throughput_rps": "throughput",
    "goodput_rps": "goodput",
}
UNITS = dict.fromkeys(("ttft_s", "ttft_p99_s", "tpot_s"), "ms")
UNITS |= {"e2e_s": "s", "throughput_rps": "requests/s", "goodput_rps": "requests/s"}


def difference_figures(board: Sequence[Mapping[str, Any]], baseline: str) -> Versions:
    """Return a figure per metric and per side of the comparison.

    Args:
        board: the leaderboard.
        baseline: label of the baseline.
    """
    sides = {"versus_baseline": baseline, "versus_best_heuristic": "the best heuristic of each cell"}
    return {
        (NAMES[metric], other): _forest(board, key, metric, other)
        for key, other in sides.items()
        for metric in board[0][key]
        if any(row[key][metric]["value"] is not None for row in board)
    }


def _forest(board: Sequence[Mapping[str, Any]], key: str, metric: str, other: str) -> Figure:
    rows = [row for row in board if row[key][metric]["value"] is not None]
    ends = [end for row in rows for end in row[key][metric].values() if end is not None]
    title = f"{NAMES[metric]}, difference to {other}<br>{_better(metric)}"
    return figure(
        [trace for row in rows for trace in _estimate(row, row[key][metric], other)],
        height=100 + 25 * len(rows),
        x=percent_axis(min(ends), max(ends)) | {"title": title},
        y={"autorange": "reversed", "showgrid": False, "showline": False},
        showlegend=False,
        margin={"l": 8, "r": 52, "t": 8, "b": 8},
        shapes=[rule(x=1.0)],
    )


def _estimate(row: Mapping[str, Any], gap: Mapping[str, float | None], other: str) -> list[dict[str, Any]]:
    """A policy's mark with its interval, and the number at that end of it which is farther from 0."""
    value, low, high = gap["value"], gap["low"], gap["high"]
    assert value is not None
    up = down = 0.0
    clear, interval = False, ""
    if low is not None and high is not None:
        up, down, clear = high - value, value - low, low > 0 or high < 0
        interval = f" [{signed(low)}, {signed(high)}]"
    color = {"contestant": SERIES[0][0], "oracle": MUTED[0]}.get(row["kind"], INK[0])
    name, text = axis_name(row), "" if row["policy"] == other else f" {signed(value)} "
    end, side = (value - down, "middle left") if value < 0 else (value + up, "middle right")
    symbol, fill = "diamond" if row["kind"] == "contestant" else "circle", color if clear else "rgba(0,0,0,0)"
    bar = {"type": "data", "array": [up], "arrayminus": [down], "color": color, "thickness": 1.6, "width": 4}
    return [
        {
            "type": "scatter",
            "x": [1 + value],
            "y": [name],
            "mode": "markers",
            "marker": {"symbol": symbol, "size": 9, "color": fill, "line": {"color": color, "width": 1.6}},
            "error_x": bar,
            "hovertemplate": f"<b>{row['policy']}</b><br>{signed(value)}{interval} %<extra></extra>",
        },
        {
            "type": "scatter",
            "x": [1 + end],
            "y": [name],
            "mode": "text",
            "text": [text],
            "textposition": side,
            "textfont": {"size": 11, "color": color},
            "cliponaxis": False,
            "hoverinfo": "skip",
        },
    ]


def axis_name(row: Mapping[str, Any]) -> str:
    """Return a policy's name with what it is: bold for contestants."""
    name = str(row["policy"])
    return f"<b>{name}</b>" if row["kind"] == "contestant" else f"{name} (oracle)" if row["kind"] == "oracle" else name


def _better(metric: str) -> str:
    return f"{'lower' if METRICS[metric][4] else 'higher'} is better"


def ladder_figures(result: Evaluation, statistics: Sequence[Mapping[str, Any]], shown: Mapping[str, Look]) -> Versions:
    """Return figures over the loads or rates, per condition, metric and view; nothing for a single load.

    Args:
        result: the evaluation.
        statistics: its statistics.
        shown: the policies drawn and their looks.
    """
    config = result.config
    found: Versions = {}
    for condition in config.conditions if len(config.levels) > 1 else ():
        rows = [row for row in statistics if row["workload"] == condition.label]
        for metric in METRICS:
            key = condition.label, NAMES[metric]
            found[*key, f"difference to {config.baseline}"] = _ladder(result, rows, metric, shown, paired=True)
            found[*key, "mean"] = _ladder(result, rows, metric, shown, paired=False)
    return found


def _ladder(
    result: Evaluation, rows: Sequence[Mapping[str, Any]], metric: str, shown: Mapping[str, Look], *, paired: bool
) -> Figure:
    name = result.config.level_name
    data, ends = [], []
    for label, style in shown.items():
        points = [_point(row, name, metric, paired) for row in rows if row["policy"] == label]
        known = [point for point in points if point is not None]
        if not known:
            continue
        levels, values, up, down, hover = zip(*known, strict=True)
        ends += [value - less for value, less in zip(values, down, strict=True)]
        ends += [value + more for value, more in zip(values, up, strict=True)]
        data.append(
            {
                "type": "scatter",
                "x": levels,
                "y": values,
                "name": label,
                "text": hover,
                "mode": "lines+markers",
                "line": line(style),
                "marker": marker(style),
                "error_y": {"type": "data", "array": up, "arrayminus": down, "thickness": 1, "width": 3},
                "hovertemplate": f"<b>{label}</b><br>load %{{x}}<br>%{{text}}<extra></extra>",
            }
        )
    unit = "share of capacity" if name == "load" else "requests/s"
    title = f"{NAMES[metric]}, {f'difference to {result.config.baseline}' if paired else UNITS[metric]}"
    positive = [end for end in ends if end > 0] or [1.0]
    low, high = min(positive), max(positive)
    y = percent_axis(low - 1, high - 1) if paired else log_axis(low, high)
    return figure(
        data,
        height=400,
        x={"title": f"load, {unit}", "tickvals": list(result.config.levels)},
        y=y | {"title": f"{title}<br>{_better(metric)}"},
        shapes=[rule(y=1.0)] if paired else [],
    )


def _point(
    row: Mapping[str, Any], level_name: str, metric: str, paired: bool
) -> tuple[float, float, float, float, str] | None:
    """Return load, value, the lengths of its error bar, and what a pointer shows; None where there is no value.

    The value of a paired difference is a ratio.
    """
    entry = row["metrics"][metric]["difference" if paired else "mean"]
    if entry["value"] is None:
        return None
    scale, shift = (1.0, 1.0) if paired else (METRICS[metric][2], 0.0)
    value, low, high = (None if end is None else scale * end + shift for end in entry.values())
    assert value is not None
    up, down = (0.0, 0.0) if low is None or high is None else (high - value, value - low)
    text = f"{signed(value - 1)} %" if paired else f"{value:.4g} {UNITS[metric]}"
    return row[level_name], value, up, down, text
