"""Published figures beside their reproduction: the same direction or not, and how far apart.

A reproduced value is the paired relative change of a metric against the baseline. As a paper averages over its
workloads, so does this: a change per workload, with the rates of the ladder pooled as a ratio per seed, then their
arithmetic mean, per seed; the interval is Student's t over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from rich.table import Table

from servegym.agents.statistics import Interval, mean_interval
from servegym.agents.tables import report_table
from servegym.configuration import Config

if TYPE_CHECKING:
    from servegym.agents.evaluation.report import Evaluation

Metric = Literal["ttft_s", "ttft_p99_s", "tpot_s", "e2e_s", "throughput_rps", "goodput_rps"]


class PublishedFigure(Config):
    """One figure of a paper: how much lower a metric is than the baseline's, in the mean over its workloads."""

    policy: str = Field(description="label of the policy that stands for the paper's")
    metric: Metric = Field(description="metric of the evaluation that the figure is about")
    statistic: Literal["mean_reduction_percent"] = Field(
        default="mean_reduction_percent",
        description="what value is: the reduction against the baseline, averaged over workloads, percent",
    )
    value: float = Field(description="percent; negative: the metric rises")
    source: str = Field(description="where it is published")
    note: str = Field(default="", description="what differs from the paper's set-up")
    level: float | None = Field(default=None, description="one of the evaluation's loads or rates; default: all")
    baseline: str | None = Field(default=None, description="label of the paper's baseline; default: the evaluation's")


def reproduced_reduction(result: Evaluation, figure: PublishedFigure) -> Interval:
    """Return the reduction in percent with its 95 % interval; NaN where a value is missing or the seed is the only one.

    Args:
        result: a finished evaluation.
        figure: whose policy, metric and baseline are meant.
    """
    baseline = figure.baseline or result.config.baseline
    workloads = []
    for condition in result.config.conditions:
        logs = [
            _log(result.values(figure.metric, figure.policy, condition.label, level))
            - _log(result.values(figure.metric, baseline, condition.label, level))
            for level in (result.config.levels if figure.level is None else (figure.level,))
        ]
        workloads.append(-100 * np.expm1(np.mean(logs, axis=0)))
    return mean_interval(np.mean(workloads, axis=0))


def _log(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    data = np.asarray(values, dtype=np.float64)
    return np.log(np.where(data > 0, data, np.nan))


def compare(result: Evaluation) -> list[dict[str, Any]]:
    """Return a mapping per published figure of the config, in its order.

    Keys beside the figure's own: ``reproduced`` (``value``, ``low``, ``high`` in percent, None where unknown),
    ``same_direction`` (None where unknown) and ``distance``, reproduced minus published in percentage points.
    """
    rows = []
    for figure in result.config.published:
        mine = reproduced_reduction(result, figure)
        known = bool(np.isfinite(mine.value))
        rows.append(
            figure.model_dump()
            | {
                "baseline": figure.baseline or result.config.baseline,
                "reproduced": {
                    name: float(end) if np.isfinite(end) else None
                    for name, end in (("value", mine.value), ("low", mine.low), ("high", mine.high))
                },
                "same_direction": _same_direction(mine, figure.value) if known else None,
                "distance": float(mine.value - figure.value) if known else None,
            }
        )
    return rows


def _same_direction(mine: Interval, value: float) -> bool | None:
    """Whether both have one sign; of no change, whether the interval contains it, None without an interval."""
    if value != 0:
        return bool(np.sign(mine.value) == np.sign(value))
    return not mine.excludes_zero if np.isfinite(mine.low) else None


def published_table(result: Evaluation) -> Table:
    """Return the published figures and their reproduction as a table."""
    table = report_table(
        "Published and reproduced: reduction against the baseline in %, mean over workloads",
        "In brackets the 95 % interval over seeds. Distance: reproduced minus published, percentage points.",
    )
    table.add_column("metric")
    for heading in ("published", "reproduced", "distance"):
        table.add_column(heading, justify="right")
    table.add_column("direction")
    for row in compare(result):
        table.add_row(
            f"{row['policy']} / {row['baseline']}",
            row["metric"],
            f"{row['value']:.1f}",
            _text(row["reproduced"]),
            "-" if row["distance"] is None else f"{row['distance']:+.1f}",
            {True: "same", False: "other", None: "-"}[row["same_direction"]],
        )
    return table


def _text(reproduced: dict[str, float | None]) -> str:
    value, low, high = (reproduced[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} [{low:.1f}, {high:.1f}]"
