"""Tune contestants with Optuna: the same trials for each, on the same cells.

A trial's cost is the weighted mean, over cells and seeds, of the logarithm of a metric's ratio to the evaluation's
baseline on the same requests, and :data:`EXCESS` times what a metric is beyond its limit. Finished trials lie in a
SQLite file, and the sampler of a trial is seeded by its number alone, so that an interrupted search ends as an
uninterrupted one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from servegym.agents.evaluation.config import Cell, EvaluationConfig, Row
from servegym.agents.evaluation.report import METRICS
from servegym.agents.evaluation.run import run_cell
from servegym.agents.execution import Executor, open_executor
from servegym.agents.tuning.config import Contestant, Range, TuneConfig
from servegym.envs.simulation import Policies
from servegym.errors import InputError

EXCESS = 10.0
_LABEL = "candidate"
_FEW = 20
"""Finished trials that an estimate of importance needs at least."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the search found for a contestant.

    Attributes:
        label: of the contestant.
        trials: finished ones.
        first: cost of the first trial, all values as they were.
        best: lowest cost.
        values: those of the best trial, by key of the space; empty if the first was the best.
        policies: the best trial's.
        importance: share of each key in what the best trials have in common (PED-ANOVA); empty after few trials.
    """

    label: str
    trials: int
    first: float
    best: float
    values: dict[str, Any]
    policies: Policies
    importance: dict[str, float]


def tune(
    config: TuneConfig,
    out: Path,
    *,
    processes: int | None = None,
    progress: Callable[[int, str], None] = lambda done, message: None,
) -> list[Tuned]:
    """Run the trials that are missing.

    Args:
        config: what to tune.
        out: folder of the trials and of what they find; an earlier search with the same config goes on.
        processes: in place of the workers of ``config.backend``. The result does not depend on it.
        progress: called after each trial with the number of finished ones and a line about it.

    Raises:
        InputError: ``out`` holds another search, or a trial's values are not allowed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _claim(config, out)
    judged = config.judged()
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'trials.db'}")
    found, done = [], 0
    with open_executor(config.backend, processes) as executor:
        judge = _Judge(config, judged, executor)
        for label, contestant in config.contestants.items():
            study = optuna.create_study(storage=storage, study_name=label, load_if_exists=True)
            for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(left.number, state=TrialState.FAIL)
            for number in range(len(_finished(study)), config.trials):
                trial, values = _ask(study, contestant, number, config.seed)
                try:
                    policies = _policies(contestant, values, out / "runs" / label / f"{number:04d}", executor)
                    cost = judge.cost(policies)
                except BaseException:
                    study.tell(trial, state=TrialState.FAIL)
                    raise
                trial.set_user_attr("policies", policies.model_dump(mode="json"))
                study.tell(trial, cost)
                progress(
                    done + number + 1, f"{label} {number + 1}: {_percent(cost)}, best {_percent(study.best_value)}"
                )
            done += config.trials
            found.append(_result(label, study))
            _write(out, found)
    return found


class _Judge:
    """Runs policies on the cells, and compares with the baseline's metrics there."""

    def __init__(self, config: TuneConfig, cells: EvaluationConfig, executor: Executor) -> None:
        self._config, self._cells, self._executor = config, cells, executor
        self._baseline: dict[Cell, Row] | None = None

    def cost(self, policies: Policies) -> float:
        """Return the mean weighted log ratio, and what is beyond a limit."""
        if self._baseline is None:
            self._baseline = self._run(self._cells.policies[self._cells.baseline])
        mine, baseline = self._run(policies), self._baseline

        def mean_log_ratio(metric: str) -> float:
            path = METRICS[metric][1]
            ratios = [_value(mine[cell], path) / _value(baseline[cell], path) for cell in self._cells.cells]
            return float(np.mean(np.log(ratios)))

        total = sum(weight * mean_log_ratio(metric) for metric, weight in self._config.objective.items())
        excess = (max(0.0, math.exp(mean_log_ratio(name)) - limit) for name, limit in self._config.limits.items())
        return total + EXCESS * sum(excess)

    def _run(self, policies: Policies) -> dict[Cell, Row]:
        alone = self._cells.model_copy(update={"policies": {_LABEL: policies}, "baseline": _LABEL, "published": ()})
        return {cell: rows[0] for cell, rows in self._executor.run(run_cell, alone, alone.cells)}


def _value(row: Row, path: tuple[str, ...]) -> float:
    value: Any = row
    for key in path:
        value = value[key]
    return math.nan if value is None else float(value)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _ask(study: optuna.Study, contestant: Contestant, number: int, seed: int) -> tuple[optuna.Trial, dict[str, Any]]:
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=own)
    trial = study.ask()
    if number == 0:
        return trial, {}
    return trial, {
        key: (
            trial.suggest_categorical(key, one.choices)
            if not isinstance(one, Range)
            else trial.suggest_int(key, int(one.low), int(one.high), log=one.log)
            if one.integer
            else trial.suggest_float(key, one.low, one.high, log=one.log)
        )
        for key, one in contestant.space.items()
    }


def _policies(contestant: Contestant, values: dict[str, Any], folder: Path, executor: Executor) -> Policies:
    if contestant.train is None:
        return contestant.built(values)
    from servegym.agents.training.seeds import train_seed

    config = contestant.training(values)
    list(executor.run(train_seed, config, [(config.seed, str(folder))]))
    policies = contestant.policies | {config.task.decisions.layer: str((folder / "policy").resolve())}
    return Policies.model_validate(policies)


def _result(label: str, study: optuna.Study) -> Tuned:
    best = study.best_trial
    finished = _finished(study)
    tried = [trial for trial in finished if trial.params]
    importance: dict[str, float] = {}
    if len(tried) >= _FEW and len({trial.value for trial in tried}) > 1:
        judge = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of experimental interfaces, and of few trials
            importance = optuna.importance.get_param_importances(study, evaluator=judge, params=list(tried[0].params))
    return Tuned(
        label=label,
        trials=len(finished),
        first=float(finished[0].value or 0.0),
        best=float(best.value or 0.0),
        values=dict(best.params),
        policies=Policies.model_validate(best.user_attrs["policies"]),
        importance={key: float(value) for key, value in importance.items()},
    )


def _claim(config: TuneConfig, out: Path) -> None:
    """Make the folder this search's."""
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "config.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() != config.digest():
        raise InputError(str(out), "", "holds another search; allowed: a new or empty folder")
    stamp.write_text(config.digest() + "\n", encoding="utf-8")


def _write(out: Path, found: list[Tuned]) -> None:
    """Write the tuned policies, for ``servegym evaluate --policies``."""
    content = {tuned.label: tuned.policies.model_dump(mode="json") for tuned in found}
    part = out / "best.yaml.part"
    part.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    part.replace(out / "best.yaml")


def _percent(cost: float) -> str:
    return f"{100 * math.expm1(cost):+.1f} %"
