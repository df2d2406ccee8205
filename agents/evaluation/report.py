"""The result of an evaluation: paired statistics as a table, as JSON and as Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import servegym
from servegym.agents.evaluation.config import EvaluationConfig
from servegym.agents.evaluation.leaderboard import leaderboard, leaderboard_tables
from servegym.agents.evaluation.published import compare, published_table
from servegym.agents.statistics import (
    Interval,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
    relative_difference,
    stratified_bootstrap,
)
from servegym.agents.tables import report_table
from servegym.errors import InputError

# Metric -> (heading, path in a row, unit factor, decimals, whether lower is better).
METRICS: dict[str, tuple[str, tuple[str, ...], float, int, bool]] = {
    "ttft_s": ("TTFT\nms", ("ttft_s", "mean"), 1e3, 1, True),
    "ttft_p99_s": ("TTFT p99\nms", ("ttft_s", "p99"), 1e3, 1, True),
    "tpot_s": ("TPOT\nms", ("tpot_s", "mean"), 1e3, 2, True),
    "e2e_s": ("E2E\ns", ("e2e_s", "mean"), 1.0, 3, True),
    "throughput_rps": ("req/s\n", ("throughput_rps",), 1.0, 2, False),
    "goodput_rps": ("good\n/s", ("goodput_rps",), 1.0, 2, False),
}


@dataclass(frozen=True)
class Evaluation:
    """All cells of an evaluation.

    Attributes:
        config: what was evaluated.
        rows: a row per cell and policy: workload, load or rate_rps, seed, policy and the metrics of the run.
    """

    config: EvaluationConfig
    rows: list[dict[str, Any]]

    @cached_property
    def _rows(self) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
        found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["policy"], row["workload"], row[self.config.level_name]), []).append(row)
        return found

    def values(self, metric: str, policy: str, workload: str, level: float) -> list[float]:
        """Return the values of a metric over the seeds, in order of the seeds."""
        path = METRICS[metric][1]
        found = []
        for row in self._rows.get((policy, workload, level), ()):
            value: Any = row
            for key in path:
                value = value[key]
            found.append(np.nan if value is None else float(value))
        return found

    @property
    def conditions(self) -> list[tuple[str, float]]:
        """Pairs of workload and load, or rate."""
        return [(one.label, level) for one in self.config.conditions for level in self.config.levels]

    def statistics(self) -> list[dict[str, Any]]:
        """Return a mapping per condition and policy: mean and paired difference of each metric, with intervals."""
        found = []
        for workload, level in self.conditions:
            for policy in self.config.policies:
                metrics = {}
                for metric in METRICS:
                    mine = self.values(metric, policy, workload, level)
                    other = self.values(metric, self.config.baseline, workload, level)
                    metrics[metric] = {
                        "mean": _plain(mean_interval(mine)),
                        "difference": _plain(_difference(mine, other)),
                    }
                found.append(
                    {"workload": workload, self.config.level_name: level, "policy": policy, "metrics": metrics}
                )
        return found

    def summary(self) -> dict[str, Any]:
        """Return, per policy, what all conditions together say of mean TTFT against the baseline.

        Keys: ``ratio_iqm``, the interquartile mean of TTFT ratios with its stratified bootstrap interval;
        ``probability_of_improvement``; ``worse_share``, the share of conditions more than 2 % worse; ``worst_ratio``.
        """
        result = {}
        for policy in self.config.policies:
            ratios, mine, other = [], [], []
            for workload, level in self.conditions:
                mine.append(self.values("ttft_s", policy, workload, level))
                other.append(self.values("ttft_s", self.config.baseline, workload, level))
                ratios.append(np.divide(mine[-1], other[-1]))
            means = [float(ratio.mean()) for ratio in ratios]
            interval = stratified_bootstrap(ratios, lambda cells: interquartile_mean(np.concatenate(cells)))
            result[policy] = {
                "ratio_iqm": _plain(interval),
                "probability_of_improvement": probability_of_improvement(mine, other),
                "worse_share": float(np.mean([mean > 1.02 for mean in means])),
                "worst_ratio": max(means),
            }
        return result

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data; numbers that do not exist are None."""
        return {
            "name": self.config.name,
            "config_sha256": self.config.digest(),
            "version": servegym.__version__,
            "seeds": list(self.config.seed_list),
            "baseline": self.config.baseline,
            "statistics": self.statistics(),
            "summary": self.summary(),
            "leaderboard": leaderboard(self),
            "published": compare(self),
            "cells": self.rows,
        }

    def tables(self) -> list[Table]:
        """Return a table per workload and load: means, and below them the paired difference to the baseline.

        Of scenarios, the leaderboard in their place. The last one compares with the published figures, if the config
        has any.
        """
        if self.config.scenarios:
            return leaderboard_tables(self)
        found = [self._table(workload, level) for workload, level in self.conditions]
        return [*found, published_table(self)] if self.config.published else found

    def _level(self, level: float) -> str:
        return f"load {level:g}" if self.config.level_name == "load" else f"{level:g} requests/s"

    def _table(self, workload: str, level: float) -> Table:
        count = len(self.config.seed_list)
        table = report_table(
            f"{workload}, {self._level(level)}, {count} seed{'s' if count > 1 else ''}",
            f"Mean over seeds; below it the difference to {self.config.baseline} on the same requests, in %,"
            f" with half its 95 % interval. * the interval excludes 0. Bold: the best.{self._trouble(workload, level)}",
        )
        best: dict[str, str] = {}
        for metric, (heading, _, _, _, lower) in METRICS.items():
            table.add_column(heading, justify="right", no_wrap=True)
            means = {p: np.mean(self.values(metric, p, workload, level)) for p in self.config.policies}
            best[metric] = min(means, key=means.__getitem__) if lower else max(means, key=means.__getitem__)
        for policy in self.config.policies:
            table.add_row(policy, *(self._entry(metric, policy, workload, level, best[metric]) for metric in METRICS))
        return table

    def _trouble(self, workload: str, level: float) -> str:
        """Say what went wrong on live engines; empty if nothing did."""
        found = []
        for policy in self.config.policies:
            rows = [
                row
                for row in self.rows
                if (row["policy"], row["workload"], row[self.config.level_name]) == (policy, workload, level)
            ]
            for key, what in (("failed", "failed requests"), ("fallbacks", "decisions by a heuristic in its place")):
                count = sum(row.get(key, 0) for row in rows)
                if count:
                    found.append(f"\n{policy}: {count} {what}.")
        return "".join(found)

    def _entry(self, metric: str, policy: str, workload: str, level: float, best: str) -> str:
        _, _, factor, decimals, _ = METRICS[metric]
        mine = self.values(metric, policy, workload, level)
        text = f"{np.mean(mine) * factor:.{decimals}f}"
        text = f"[bold]{text}[/bold]" if policy == best else text
        if policy == self.config.baseline:
            return text
        gap = _difference(mine, self.values(metric, self.config.baseline, workload, level))
        half = "" if np.isnan(gap.low) else f"±{50 * (gap.high - gap.low):.1f}"
        return f"{text}\n{100 * gap.value:+.1f}{half}{'*' if gap.excludes_zero else ' '}"

    def write_parquet(self, path: Path) -> None:
        """Write the cells, one row per cell and policy, nested metrics with dots in their names.

        Raises:
            InputError: pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise InputError(str(path), "", "Parquet needs pyarrow; install servegym[train]") from None
        flat = []
        for row in self.rows:
            entry: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, dict):
                    entry |= {f"{key}.{name}": item for name, item in value.items()}
                elif not isinstance(value, list):
                    entry[key] = value
            flat.append(entry)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), path)


def _difference(mine: list[float], other: list[float]) -> Interval:
    values = np.array([mine, other])
    if not (np.isfinite(values) & (values > 0)).all():
        return Interval(np.nan, np.nan, np.nan)
    return relative_difference(mine, other)


def _plain(interval: Interval) -> dict[str, float | None]:
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
