"""Numbers of the report as words: values with their 95 % intervals, tables, and the sentence that sums them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servegym.agents.evaluation.report import METRICS, Evaluation
from servegym.agents.report.figures.differences import NAMES, UNITS
from servegym.agents.report.figures.style import MINUS, signed

Interval = Mapping[str, float | None]
_BOARD = ("ttft_s", "ttft_p99_s", "tpot_s", "e2e_s", "throughput_rps")


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: the value.
        interval: its 95 % interval, empty where one run cannot tell.
        value: as a number, for sorting; None where unknown.
        best: the best of its column.
        note: second line, with its own interval.
        clear: whether the interval of a difference excludes 0.
    """

    text: str
    interval: str = ""
    value: float | None = None
    best: bool = False
    note: str = ""
    clear: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: a policy, what it is, and its entries."""

    policy: str
    kind: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: the headings of its columns, each with a unit, and its rows."""

    headings: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]


def board_grid(board: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the leaderboard; the best of a column is marked where it is clearly better than the baseline."""
    headings = [*((NAMES[metric], "%") for metric in _BOARD)]
    headings += [("TTFT to best heuristic", "%"), ("chosen by other seeds", "%"), ("worst cell", "%")]
    headings += [("cells won", "%"), ("cells lost", "%")]
    candidates = [row for row in board if row["kind"] != "oracle"]
    best = {
        metric: _best([row["versus_baseline"][metric]["value"] for row in candidates], METRICS[metric][4])
        for metric in _BOARD
    }
    lines = []
    for row in board:
        gaps = [row["versus_baseline"][metric] for metric in _BOARD]
        entries = [
            _difference(gap, best=row["kind"] != "oracle" and gap["value"] == best[metric] and _clear(gap))
            for metric, gap in zip(_BOARD, gaps, strict=True)
        ]
        entries.append(_difference(row["versus_best_heuristic"]["ttft_s"]))
        chosen = row["versus_chosen_heuristic"]
        entries.append(Entry("-") if chosen is None else _difference(chosen["ttft_s"]))
        entries.append(Entry(signed(row["worst_cell"]), value=row["worst_cell"]))
        entries += [Entry(f"{100 * row[share]:.0f}", value=row[share]) for share in ("cells_won", "cells_lost")]
        lines.append(Line(row["policy"], row["kind"], tuple(entries)))
    return Grid(tuple(headings), tuple(lines))


def part_grids(board: Sequence[Mapping[str, Any]]) -> dict[str, Grid]:
    """Return tables of TTFT by scenario and by number of engines, where there are several."""
    found = {}
    for title, key, unit in (("scenario", "scenarios", ""), ("number of engines", "sizes", " engines")):
        parts = list(board[0][key])
        best = {part: min(row[key][part] for row in board if row["kind"] != "oracle") for part in parts}
        lines = [
            Line(
                row["policy"],
                row["kind"],
                tuple(
                    Entry(signed(gap), value=gap, best=row["kind"] != "oracle" and gap == best[part])
                    for part, gap in row[key].items()
                ),
            )
            for row in board
        ]
        if len(parts) > 1:
            found[title] = Grid(tuple((f"{part}{unit}", "%") for part in parts), tuple(lines))
    return found


def condition_grids(
    result: Evaluation, statistics: Sequence[Mapping[str, Any]], board: Sequence[Mapping[str, Any]]
) -> dict[str, Grid]:
    """Return a table per workload and load: means, and the paired differences to the baseline."""
    config = result.config
    kinds = {row["policy"]: row["kind"] for row in board}
    found = {}
    for workload, level in result.conditions:
        rows = [row for row in statistics if (row["workload"], row[config.level_name]) == (workload, level)]
        best = {
            metric: _best([row["metrics"][metric]["mean"]["value"] for row in rows], METRICS[metric][4])
            for metric in METRICS
        }
        lines = [
            Line(
                row["policy"],
                kinds[row["policy"]],
                tuple(_mean(metric, row["metrics"][metric], best[metric]) for metric in METRICS),
            )
            for row in sorted(rows, key=lambda row: row["metrics"]["ttft_s"]["mean"]["value"] or 0.0)
        ]
        headings = tuple((NAMES[metric], UNITS[metric]) for metric in METRICS)
        found[f"{workload}, {level_text(config.level_name, level)}"] = Grid(headings, tuple(lines))
    return found


def level_text(name: str, level: float) -> str:
    """Return a load or rate in words."""
    return f"load {level:g}" if name == "load" else f"{level:g} requests/s"


def finding(board: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Return what the leaderboard says, a sentence; the interval is in percent like the value."""
    first = next(row for row in board if row["kind"] != "oracle")
    gap = first["versus_baseline"]["ttft_s"]
    if first["policy"] == baseline or gap["value"] is None:
        apart = ", oracles apart" if any(row["kind"] == "oracle" for row in board) else ""
        return f"No policy has a lower TTFT than {baseline}{apart}."
    size = f"{signed(-gap['value'])[1:]} %"
    if gap["low"] is None:
        return f"{first['policy']} has the lowest TTFT, {size} below {baseline}; one seed gives no interval."
    interval = f"[{signed(-gap['high'])}, {signed(-gap['low'])}]".replace("+", "")
    clear = "" if gap["high"] < 0 else "; the interval includes 0, so this is no clear difference"
    return f"{first['policy']} has the lowest TTFT: {size} {interval} below {baseline} on the same requests{clear}."


def _best(values: Sequence[float | None], lower: bool) -> float | None:
    known = [value for value in values if value is not None]
    return (min if lower else max)(known, default=None)


def _mean(metric: str, entry: Mapping[str, Interval], best: float | None) -> Entry:
    _, _, factor, decimals, _ = METRICS[metric]
    mean, gap = entry["mean"], entry["difference"]
    value, low, high = mean["value"], mean["low"], mean["high"]
    if value is None:
        return Entry("-")
    interval = (
        ""
        if low is None or high is None
        else f"[{factor * low:.{decimals}f}, {factor * high:.{decimals}f}]".replace("-", MINUS)
    )
    note = (
        ""
        if gap["value"] is None or gap["low"] == gap["high"] == 0.0
        else f"{signed(gap['value'])} % {_interval(gap)}".rstrip()
    )
    return Entry(f"{factor * value:.{decimals}f}", interval, value, value == best, note, _clear(gap))


def _difference(gap: Interval, best: bool = False) -> Entry:
    value = gap["value"]
    return Entry("-") if value is None else Entry(signed(value), _interval(gap), value, best, clear=_clear(gap))


def _interval(gap: Interval) -> str:
    low, high = gap["low"], gap["high"]
    return "" if low is None or high is None or low == high else f"[{signed(low)}, {signed(high)}]"


def _clear(gap: Interval) -> bool:
    low, high = gap["low"], gap["high"]
    return low is not None and high is not None and (low > 0 or high < 0)
