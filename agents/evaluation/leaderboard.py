"""All cells of an evaluation in one table: who leads, by how much, and where not.

A policy's figure is the mean over cells (condition and load) of the logarithm of a ratio on the same requests, taken
per seed, with Student's t interval over the seeds. Two ratios count: to the baseline, and to the best heuristic of each
cell, which is the other heuristic with the lowest mean TTFT there. Chosen on the very seeds that are reported, it
flatters the heuristics: the lowest of many noisy means is lower than what it stands for. So there is a second figure,
against the heuristic that the other seeds would choose for each seed and cell, which favours nobody. Oracles, which
know output lengths, are rivals of nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.table import Table

from servegym.agents.statistics import Interval, mean_interval
from servegym.agents.tables import report_table
from servegym.baselines.policy_spec import LAYERS
from servegym.baselines.registry import names, policy_class
from servegym.envs.simulation import Policies

if TYPE_CHECKING:
    from servegym.agents.evaluation.report import Evaluation

_METRICS = ("ttft_s", "ttft_p99_s", "tpot_s", "e2e_s", "throughput_rps")
_MARGIN = 0.02  # what is lost by less matters to nobody
Logs = npt.NDArray[np.float64]
Key = TypeVar("Key")


def kind(policies: Policies) -> str:
    """Return ``oracle``, ``heuristic`` or, of bundles and a user's own code, ``contestant``."""
    specs = [(layer, getattr(policies, layer)) for layer in LAYERS]
    if any(spec.name not in names(layer) for layer, spec in specs):
        return "contestant"
    oracle = any(getattr(policy_class(layer, spec.name), "needs_oracle", False) for layer, spec in specs)
    return "oracle" if oracle else "heuristic"


def leaderboard(result: Evaluation) -> list[dict[str, Any]]:
    """Return a mapping per policy, the lowest TTFT first.

    Keys: ``policy``, ``kind``; ``versus_baseline``, ``versus_best_heuristic``: per metric ``value``, ``low``, ``high``
    of the relative difference, None where unknown; ``worst_cell``: the largest mean relative difference of TTFT to the
    best heuristic of a cell; ``versus_chosen_heuristic`` and ``worst_cell_chosen``: the same against the heuristic that
    the other seeds choose, None with a single seed; ``cells_won``: share of cells with a lower mean TTFT than any
    heuristic of its own; ``cells_lost``: share of cells behind the best heuristic by more than 2 %, beyond doubt: the
    95 % interval over the seeds lies above that (0 with a single seed); ``scenarios`` and ``sizes``: mean relative
    difference of TTFT to the baseline by scenario and by number of engines, ``sizes_versus_best_heuristic`` that to the
    best heuristic of each cell.
    """
    config = result.config
    kinds = {label: kind(policies) for label, policies in config.policies.items()}
    logs = {metric: {label: log_values(result, metric, label) for label in kinds} for metric in _METRICS}
    means = {label: np.exp(logs["ttft_s"][label]).mean(axis=1) for label in kinds}
    scenario = [condition.scenario for condition in config.conditions for _ in config.levels]
    size = [condition.cluster.size for condition in config.conditions for _ in config.levels]
    rows = []
    for label in kinds:
        rivals = [other for other in kinds if kinds[other] == "heuristic" and other != label] or [config.baseline]
        mine = {metric: logs[metric][label] for metric in _METRICS}
        theirs = {metric: np.array([logs[metric][other] for other in rivals]) for metric in _METRICS}
        hindsight = _of(theirs, np.argmin([means[other] for other in rivals], axis=0)[:, None])
        chosen = _of(theirs, _chosen_by_others(theirs["ttft_s"])) if len(config.seed_list) > 1 else None
        behind = mine["ttft_s"] - hindsight["ttft_s"]
        to_best = behind.mean(axis=1)
        gaps = np.expm1(to_best)
        to_baseline = (mine["ttft_s"] - logs["ttft_s"][config.baseline]).mean(axis=1)
        rows.append(
            {
                "policy": label,
                "kind": kinds[label],
                "versus_baseline": _versus(mine, {metric: logs[metric][config.baseline] for metric in _METRICS}),
                "versus_best_heuristic": _versus(mine, hindsight),
                "worst_cell": float(gaps.max()),
                "versus_chosen_heuristic": None if chosen is None else _versus(mine, chosen),
                "worst_cell_chosen": None
                if chosen is None
                else float(np.expm1((mine["ttft_s"] - chosen["ttft_s"]).mean(axis=1)).max()),
                "cells_won": float((gaps < 0).mean()),
                "cells_lost": _lost(behind),
                "scenarios": _by(scenario, to_baseline),
                "sizes": _by(size, to_baseline),
                "sizes_versus_best_heuristic": _by(size, to_best),
            }
        )
    return sorted(rows, key=lambda row: row["versus_baseline"]["ttft_s"]["value"])


def _versus(mine: dict[str, Logs], theirs: dict[str, Logs]) -> dict[str, dict[str, float | None]]:
    return {metric: _plain(mine[metric] - theirs[metric]) for metric in _METRICS}


def _of(theirs: dict[str, Logs], rival: npt.NDArray[np.intp]) -> dict[str, Logs]:
    """Return each metric, shape (rivals, cells, seeds), of the rival that is told for each cell and seed."""
    return {metric: np.take_along_axis(values, rival[None], axis=0)[0] for metric, values in theirs.items()}


def _chosen_by_others(ttft: Logs) -> npt.NDArray[np.intp]:
    """Return the rival with the lowest mean over the other seeds, shape (cells, seeds)."""
    seconds = np.exp(ttft)
    return np.asarray(np.argmin(seconds.sum(axis=-1, keepdims=True) - seconds, axis=0))


def _lost(to_best: Logs) -> float:
    return float(np.mean([mean_interval(cell).low > np.log1p(_MARGIN) for cell in to_best]))


def leaderboard_tables(result: Evaluation) -> list[Table]:
    """Return the leaderboard, TTFT by scenario, and TTFT by number of engines where those differ."""
    rows, config = leaderboard(result), result.config
    cells = len(config.conditions) * len(config.levels)
    first = report_table(
        f"{config.name}: {cells} cells, {len(config.seed_list)} seeds, config {config.digest()}",
        f"Difference to {config.baseline} on the same requests in %, geometric mean over cells, with half its 95 %"
        " interval over seeds; rival: the best other heuristic of each cell, by mean TTFT, in hindsight, or as"
        " the other seeds choose it; lost: cells where it is behind that of hindsight by more than"
        f" {100 * _MARGIN:.0f} %, beyond doubt. * the interval excludes 0.",
    )
    for heading in (
        "TTFT",
        "TTFT p99",
        "TPOT",
        "E2E",
        "TTFT to\nrival",
        "as others\nchoose",
        "worst\ncell",
        "cells\nwon",
        "lost",
    ):
        first.add_column(heading, justify="right", no_wrap=True)
    tables = [first]
    for key, title, unit in (
        ("scenarios", "TTFT by scenario, mean over sizes and loads", ""),
        ("sizes", "TTFT by number of engines, mean over scenarios and loads", " engines"),
    ):
        columns = list(rows[0][key])
        if key == "scenarios" or len(columns) > 1:
            table = report_table(f"{title}, difference to {config.baseline} in %", "")
            for name in columns:
                table.add_column(f"{name}{unit}", justify="right", no_wrap=True)
            best = {name: min(row[key][name] for row in rows if row["kind"] != "oracle") for name in columns}
            for row in rows:
                table.add_row(
                    _label(row),
                    *(
                        f"[bold]{100 * gap:+.1f}[/bold]" if gap <= best[name] else f"{100 * gap:+.1f}"
                        for name, gap in row[key].items()
                    ),
                )
            tables.append(table)
    for row in rows:
        mine, rival, chosen = (row[f"versus_{who}"] for who in ("baseline", "best_heuristic", "chosen_heuristic"))
        first.add_row(
            _label(row),
            *(_entry(mine[metric]) for metric in ("ttft_s", "ttft_p99_s", "tpot_s", "e2e_s")),
            _entry(rival["ttft_s"]),
            "-" if chosen is None else _entry(chosen["ttft_s"]),
            f"{100 * row['worst_cell']:+.1f}",
            f"{100 * row['cells_won']:.0f} %",
            f"{100 * row['cells_lost']:.0f} %",
        )
    return tables


def _by(group: Sequence[Key], logs: Logs) -> dict[Key, float]:
    """Return the mean relative difference of each group of cells."""
    return {
        name: float(np.expm1(np.mean([gap for gap, own in zip(logs, group, strict=True) if own == name])))
        for name in dict.fromkeys(group)
    }


def _label(row: dict[str, Any]) -> str:
    name = f"[bold]{row['policy']}[/bold]" if row["kind"] == "contestant" else str(row["policy"])
    return f"{name} (oracle)" if row["kind"] == "oracle" else name


def log_values(result: Evaluation, metric: str, label: str) -> Logs:
    """Return the logarithms of a metric, shape (cells, seeds); NaN where there is none."""
    values = np.array([result.values(metric, label, *condition) for condition in result.conditions])
    return np.log(np.where(values > 0, values, np.nan))


def _plain(logs: Logs) -> dict[str, float | None]:
    interval: Interval = mean_interval(logs.mean(axis=0))
    ends = np.expm1([interval.value, interval.low, interval.high]).tolist()
    return {name: end if np.isfinite(end) else None for name, end in zip(("value", "low", "high"), ends, strict=True)}


def _entry(gap: dict[str, float | None]) -> str:
    value, low, high = gap["value"], gap["low"], gap["high"]
    if value is None:
        return "-"
    if low is None or high is None or low == high:
        return f"{100 * value:+.1f}"
    return f"{100 * value:+.1f}±{50 * (high - low):.1f}{'*' if low > 0 or high < 0 else ' '}"
