"""A validation: its cells, which an interrupted run leaves for the next one, and what they say together."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from servegym.agents.progress import Bar
from servegym.envs.profiles.profile import load_profile
from servegym.envs.validation.agreement import kendall, spearman
from servegym.envs.validation.config import Bounds, Cell, ValidationConfig
from servegym.errors import InputError

Row = dict[str, Any]

METRICS = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS = ("mean", "p50", "p95", "p99")
SIDES = ("simulated", "at_speed")
_RANKED = 3


def validate(config: ValidationConfig, profile: str, out: Path | None = None, *, progress: bool = True) -> Validation:
    """Run the cells of a validation that an earlier run has not finished.

    Args:
        config: what to compare.
        profile: of the live engines.
        out: folder for the results of finished cells.
        progress: show a bar on stderr, where a person looks on.

    Raises:
        InputError: ``out`` holds another validation, or as :class:`~servegym.envs.validation.run.Validator`.
        EngineError: a live request failed.
    """
    # Only here: it needs the extra "live".
    from servegym.envs.validation.run import Validator

    done = _finished(config, profile, out)
    cells = config.cells
    missing = [cell for cell in cells if cell not in done]
    if missing:
        with (
            Validator(config, profile) as validator,
            Bar("validating", len(cells), unit="cells", done=len(done), quiet=not progress) as bar,
        ):
            for cell in missing:
                bar.update(text=f"{cell.scenario}, load {cell.load:g}, {cell.policy}")
                done[cell] = validator.run(cell)
                bar.advance()
                if out is not None:
                    with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"cell": asdict(cell), "row": done[cell]}) + "\n")
    return Validation(config, tuple(done[cell] for cell in cells))


def _finished(config: ValidationConfig, profile: str, out: Path | None) -> dict[Cell, Row]:
    """Read the cells that an earlier run of the same config and profile has finished; a line cut short is left out."""
    step_time = load_profile(profile).model_dump_json()
    if out is None:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((config.digest() + step_time).encode()).hexdigest()
    stamp, path = out / "config.sha256", out / "cells.jsonl"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() != digest:
        raise InputError(str(out), "", "holds another validation, or one of another profile; allowed: a new folder")
    stamp.write_text(digest + "\n", encoding="utf-8")
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[Cell(**entry["cell"])] = entry["row"]
    return done


@dataclass(frozen=True, slots=True)
class Compared:
    """All repetitions of one scenario, load and policy.

    Attributes:
        scenario, load, policy: which.
        rows: a row per repetition.
    """

    scenario: str
    load: float
    policy: str
    rows: tuple[Row, ...]

    def live(self, metric: str, statistic: str) -> float:
        """Return the median over the live runs, seconds."""
        return _median(_value(row, "live", metric, statistic) for row in self.rows)

    @property
    def sides(self) -> tuple[str, ...]:
        """What is compared with live: the simulation, and the one at the machine's speed where that is known."""
        return tuple(side for side in SIDES if all(side in row for row in self.rows))

    def simulated(self, metric: str, statistic: str, side: str = "simulated") -> float:
        """Return the median over the simulations, seconds."""
        return _median(_value(row, side, metric, statistic) for row in self.rows)

    def error(self, metric: str, statistic: str, side: str = "simulated") -> float:
        """Return the median over repetitions of simulated / live - 1."""
        return _median(
            _value(row, side, metric, statistic) / _value(row, "live", metric, statistic) - 1 for row in self.rows
        )

    def repeat_error(self, metric: str, statistic: str) -> float | None:
        """Return the median over pairs of live runs of what they differ by: no simulator can be relied on for less."""
        values = [_value(row, "live", metric, statistic) for row in self.rows]
        apart = [abs(a / b - 1) for a, b in itertools.permutations(values, 2)]
        return _median(apart) if apart else None

    def drift(self, metric: str, statistic: str) -> tuple[float, float] | None:
        """Return the medians over the simulations of a machine as fast, and as slow, as its drift lets expect."""
        if not all("faster" in row and "slower" in row for row in self.rows):
            return None
        ends = [self.simulated(metric, statistic, side) for side in ("faster", "slower")]
        return min(ends), max(ends)

    def within_drift(self, metric: str, statistic: str) -> bool | None:
        """Whether the live runs lie between the two; None where the drift is not known."""
        ends = self.drift(metric, statistic)
        return None if ends is None else ends[0] <= self.live(metric, statistic) <= ends[1]

    def queue_error(self, side: str = "simulated") -> float:
        """Return the median over repetitions of the mean absolute error of the queue's length, over its mean."""
        return _median(row["queue"]["error"][side] for row in self.rows)

    @property
    def machine(self) -> float | None:
        """Median over repetitions of how long the engines' steps took over what the profile says of them."""
        engines = [engine for row in self.rows for engine in row.get("step_time", [])]
        known = [engine["measured_over_profile"] for engine in engines if engine["steps"]]
        return statistics.median(known) if known else None

    def misses(self, bounds: Bounds, side: str = "simulated") -> list[str]:
        """Name the errors that are not small."""
        limits = {
            **{("ttft_s", statistic): bounds.ttft for statistic in ("mean", "p50")},
            **{("tpot_s", statistic): bounds.tpot for statistic in ("mean", "p50")},
            **{(metric, "p95"): bounds.p95 for metric in METRICS},
        }
        return [
            f"{metric.removesuffix('_s').upper()} {statistic} {self.error(metric, statistic, side):+.1%}"
            for (metric, statistic), limit in limits.items()
            if abs(self.error(metric, statistic, side)) > limit
        ]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Mean TTFT of several policies on the same requests.

    Attributes:
        scenario, load: which requests.
        policies: labels.
        live, simulated: mean TTFT of each, seconds, medians over repetitions.
        repeats: mean TTFT of each in each live repetition, shape (repetitions, policies).
        at_speed: as ``simulated``, at the speed that the machine had in each live run; None where that is not known.
    """

    scenario: str
    load: float
    policies: tuple[str, ...]
    live: tuple[float, ...]
    simulated: tuple[float, ...]
    repeats: tuple[tuple[float, ...], ...]
    at_speed: tuple[float, ...] | None = None

    def agreement(self) -> dict[str, float | None]:
        """Return rank correlations of simulated with live, and of live runs with each other (median over pairs)."""
        pairs = list(itertools.combinations(self.repeats, 2))
        return {
            "spearman": spearman(self.live, self.simulated),
            "kendall": kendall(self.live, self.simulated),
            "spearman_at_speed": None if self.at_speed is None else spearman(self.live, self.at_speed),
            "kendall_at_speed": None if self.at_speed is None else kendall(self.live, self.at_speed),
            "spearman_repeat": statistics.median(spearman(a, b) for a, b in pairs) if pairs else None,
            "kendall_repeat": statistics.median(kendall(a, b) for a, b in pairs) if pairs else None,
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """A finished validation.

    Attributes:
        config: what was compared.
        rows: of each cell.
    """

    config: ValidationConfig
    rows: tuple[Row, ...]

    @property
    def compared(self) -> list[Compared]:
        """The repetitions of each cell together."""
        groups: dict[tuple[str, float, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row["scenario"], row["load"], row["policy"]), []).append(row)
        return [Compared(*key, tuple(rows)) for key, rows in groups.items()]

    @property
    def rankings(self) -> list[Ranking]:
        """Scenarios and loads under several policies."""
        groups: dict[tuple[str, float], list[Compared]] = {}
        for one in self.compared:
            groups.setdefault((one.scenario, one.load), []).append(one)
        return [
            Ranking(
                *key,
                policies=tuple(one.policy for one in found),
                live=tuple(one.live("ttft_s", "mean") for one in found),
                simulated=tuple(one.simulated("ttft_s", "mean") for one in found),
                repeats=tuple(zip(*([r["live"]["ttft_s"]["mean"] for r in one.rows] for one in found), strict=True)),
                at_speed=tuple(one.simulated("ttft_s", "mean", "at_speed") for one in found)
                if all("at_speed" in one.sides for one in found)
                else None,
            )
            for key, found in groups.items()
            if len(found) >= _RANKED
        ]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        bounds = self.config.bounds
        compared = [
            {
                "scenario": one.scenario,
                "load": one.load,
                "policy": one.policy,
                "repetitions": len(one.rows),
                "live": _by_metric(one.live),
                "repeat_error": _by_metric(one.repeat_error),
                "measured_over_profile": one.machine,
                "within_drift": _by_metric(one.within_drift),
                **{side: _side(one, side, bounds) for side in one.sides},
            }
            for one in self.compared
        ]
        rankings = [asdict(ranking) | ranking.agreement() for ranking in self.rankings]
        return {"name": self.config.name, "bounds": bounds.model_dump(), "cells": compared, "rankings": rankings}


def _side(one: Compared, side: str, bounds: Bounds) -> dict[str, Any]:
    return {
        **_by_metric(partial(one.simulated, side=side)),
        "error": _by_metric(partial(one.error, side=side)),
        "queue_error": one.queue_error(side),
        "misses": one.misses(bounds, side),
    }


def summarise(errors: Iterable[float]) -> tuple[float, float]:
    """Return median and largest absolute error.

    >>> summarise([0.1, -0.3, 0.2])
    (0.2, 0.3)
    """
    size = np.abs(np.fromiter(errors, dtype=np.float64))
    return float(np.median(size)), float(size.max())


def _median(values: Iterable[Any]) -> float:
    return float(statistics.median(values))


def _by_metric(read: Callable[[str, str], float | None]) -> dict[str, dict[str, float | None]]:
    return {metric: {statistic: _known(read(metric, statistic)) for statistic in STATISTICS} for metric in METRICS}


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _value(row: Row, side: str, metric: str, statistic: str) -> float:
    """NaN where there is none: TPOT of outputs of one token."""
    value = row[side][metric][statistic]
    return math.nan if value is None else float(value)
