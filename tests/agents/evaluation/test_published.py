"""Published figures against evaluations made up to have a known result."""

from __future__ import annotations

from typing import Any

import pytest

from servegym.agents.evaluation import Evaluation, EvaluationConfig
from servegym.agents.evaluation.published import compare, published_table, reproduced_reduction
from servegym.agents.evaluation.run import run_cell
from servegym.configuration import load_config, validate
from servegym.errors import InputError

FIGURE = {"policy": "mine", "metric": "ttft_s", "value": 20.0, "source": "a paper"}


def _config(**changes: Any) -> EvaluationConfig:
    content: dict[str, Any] = {
        "workloads": [{"name": "burstgpt-central", "requests": 20}, {"name": "burstgpt-random", "requests": 20}],
        "loads": [0.5, 1.0],
        "seeds": 3,
        "baseline": "theirs",
        "policies": {"theirs": {}, "mine": {"engine": "least_requests"}},
        "published": [FIGURE],
    }
    return validate(EvaluationConfig, content | changes, "test")


def _evaluation(config: EvaluationConfig, factors: dict[tuple[str, float], float]) -> Evaluation:
    """TTFT of ``mine`` is the baseline's times a factor by workload and level; seeds differ in scale."""
    rows = []
    for workload in config.workloads:
        for level in config.levels:
            for seed in config.seed_list:
                for policy in config.policies:
                    factor = factors[workload.label, level] * (1 + 0.01 * (seed - 1)) if policy == "mine" else 1.0
                    row = {"workload": workload.label, config.level_name: level, "seed": seed, "policy": policy}
                    rows.append(row | {"ttft_s": {"mean": 3.0 * 10**seed * factor, "p99": None}, "throughput_rps": 2.0})
    return Evaluation(config, rows)


FACTORS = {
    ("burstgpt-central", 0.5): 1.0,
    ("burstgpt-central", 1.0): 0.6,
    ("burstgpt-random", 0.5): 1.0,
    ("burstgpt-random", 1.0): 0.8,
}


def test_reduction_is_the_mean_over_workloads_of_paired_changes() -> None:
    config = _config(published=[FIGURE | {"level": 1.0}])
    [row] = compare(_evaluation(config, FACTORS))
    assert row["reproduced"]["value"] == pytest.approx(30.0)  # seeds that differ tenfold do not matter
    assert row["distance"] == pytest.approx(10.0)
    assert row["same_direction"] is True
    assert row["baseline"] == "theirs"
    # Reductions by seed: 30.7, 30.0, 29.3.
    assert row["reproduced"]["low"] == pytest.approx(30 - 4.303 * 0.7 / 3**0.5, abs=0.01)


def test_levels_are_pooled_as_ratios_and_a_rise_is_the_other_direction() -> None:
    config = _config(published=[FIGURE, FIGURE | {"value": -5.0}])
    result = _evaluation(config, FACTORS)
    pooled = 100 * (1 - (0.6**0.5 + 0.8**0.5) / 2)
    assert reproduced_reduction(result, config.published[0]).value == pytest.approx(pooled)
    assert [row["same_direction"] for row in compare(result)] == [True, False]


def test_no_change_is_reproduced_by_an_interval_around_it() -> None:
    figures = [FIGURE | {"value": 0.0, "metric": metric} for metric in ("ttft_s", "throughput_rps")]
    rows = compare(_evaluation(_config(published=figures), FACTORS))
    assert [row["same_direction"] for row in rows] == [False, True]


def test_values_that_do_not_exist_are_unknown() -> None:
    config = _config(published=[FIGURE | {"metric": "ttft_p99_s"}])
    result = _evaluation(config, FACTORS)
    [row] = compare(result)
    assert row["reproduced"] == {"value": None, "low": None, "high": None}
    assert row["same_direction"] is None
    assert published_table(result).row_count == 1


def test_rates_replace_loads() -> None:
    config = _config(loads=[], rates_rps=[2.0])
    assert config.levels == (2.0,)
    rows = run_cell(config, (0, 2.0, 0))
    assert [row["rate_rps"] for row in rows] == [2.0, 2.0]
    slow = run_cell(_config(loads=[], rates_rps=[0.2]), (0, 0.2, 0))
    assert slow[0]["throughput_rps"] < 0.5 * rows[0]["throughput_rps"]
    assert _config(loads=[]).levels == (0.8,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates_rps": [1.0]}, "either loads or rates_rps"),
        ({"published": [FIGURE | {"policy": "min"}]}, "did you mean mine"),
        ({"published": [FIGURE | {"level": 0.7}]}, "not 0.7"),
        ({"published": [FIGURE | {"metric": "speed"}]}, "metric"),
    ],
)
def test_bad_configs_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["paper", "followup"])
def test_shipped_reproductions_load(name: str) -> None:
    config = load_config(EvaluationConfig, name, "evaluate")
    assert config.cluster.mode == "lockstep"
    assert len(config.workloads) == 5
    assert config.published
    assert all("arXiv" in figure.source and figure.level == max(config.levels) for figure in config.published)
