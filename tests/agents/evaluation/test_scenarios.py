"""Evaluations over scenarios and sizes of cluster, and their leaderboard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from servegym.agents.evaluation import Evaluation, EvaluationConfig, evaluate
from servegym.agents.evaluation.leaderboard import leaderboard, leaderboard_tables
from servegym.configuration import load_config, validate
from servegym.errors import InputError

GROUP = {"profile": "qwen3-30b-a3b-h200"}
CONTENT: dict[str, Any] = {
    "scenarios": {
        "plain": {"workload": {"name": "fixed", "requests": 30}},
        "unequal": {
            "workload": {"name": "fixed", "requests": 30},
            "cluster": {"groups": [GROUP | {"count": 1}, GROUP | {"count": 1, "slowdown": 2.0}]},
        },
    },
    "sizes": [2, 4],
    "loads": [0.9],
    "seeds": 2,
    "baseline": "base",
    "policies": {
        "base": {"engine": "round_robin"},
        "other": {"engine": "least_requests"},
        "mine": {"engine": "servegym.baselines.engine.lmetric:LMetric"},
        "oracle": {"engine": "jsw_oracle"},
    },
}


def _config(**changes: Any) -> EvaluationConfig:
    return validate(EvaluationConfig, CONTENT | changes, "test")


def test_a_larger_cluster_has_more_of_the_same_and_more_requests() -> None:
    conditions = _config().conditions
    assert [one.label for one in conditions] == [
        f"{name}, {size} engines" for name in ("plain", "unequal") for size in (2, 4)
    ]
    assert [one.workload.requests for one in conditions] == [30, 60, 30, 60]
    assert [one.cluster.size for one in conditions] == [2, 4, 2, 4]
    assert [group.count for group in conditions[3].cluster.groups] == [2, 2]
    assert conditions[3].cluster.groups[1].slowdown == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [3]}, r"sizes: got 3; allowed for the groups of unequal \(1\+1\): multiples of their sum"),
        ({"workloads": [{"name": "fixed"}]}, "either workloads or scenarios"),
        ({"scenarios": {}}, "either workloads or scenarios"),
        ({"sizes": [2, 2]}, "sizes that differ"),
        ({"scenarios": {"x": {"workload": {"name": "fixed"}, "cluster": {"engins": 3}}}}, "scenarios.x.cluster"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(**changes)


def test_cells_are_those_of_the_scenarios_alone() -> None:
    both = evaluate(_config(), processes=1)
    only = {"plain": CONTENT["scenarios"]["plain"]}
    alone = evaluate(_config(scenarios=only, sizes=[2]), processes=1)
    mine = [row for row in both.rows if row["workload"] == "plain, 2 engines"]
    assert mine == alone.rows
    assert {row["workload"] for row in both.rows} == {one.label for one in both.config.conditions}


def test_a_finished_evaluation_is_read_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"plain": CONTENT["scenarios"]["plain"]}
    config = _config(scenarios=only, sizes=[2])
    first = evaluate(config, processes=1, out=tmp_path)
    monkeypatch.setattr("servegym.agents.evaluation.run.run_cell", None)
    for processes in (1, 2):
        assert evaluate(config, processes=processes, out=tmp_path).rows == first.rows


def _made_up() -> Evaluation:
    """TTFT by policy and condition, 2 % more or less by seed."""
    config = _config()
    ttft = {
        "base": (4.0, 4.0, 4.0, 4.0),
        "other": (2.0, 8.0, 4.0, 2.0),
        "mine": (1.0, 3.0, 6.0, 2.0),
        "oracle": (0.5,) * 4,
    }
    rows = []
    for index, condition in enumerate(config.conditions):
        for seed in (0, 1):
            for policy, values in ttft.items():
                scale = (1.02 if seed else 1 / 1.02) if policy == "mine" else 1.0
                latency = {"mean": values[index] * scale, "p99": 10.0}
                row = {"workload": condition.label, "load": 0.9, "seed": seed, "policy": policy, "ttft_s": latency}
                rows.append(row | {"tpot_s": latency, "e2e_s": latency, "throughput_rps": 1.0, "goodput_rps": 1.0})
    return Evaluation(config, rows)


def test_the_leaderboard_compares_with_the_best_other_heuristic_of_each_cell() -> None:
    rows = {row["policy"]: row for row in leaderboard(_made_up())}
    assert [row["policy"] for row in leaderboard(_made_up())] == ["oracle", "mine", "other", "base"]
    assert {name: row["kind"] for name, row in rows.items()} == {
        "base": "heuristic", "other": "heuristic", "mine": "contestant", "oracle": "oracle"
    }  # fmt: skip
    mine = rows["mine"]
    # Rivals: 2, 4, 4, 2; mine: 1, 3, 6, 2.
    expected = (0.5 * 0.75 * 1.5 * 1.0) ** 0.25 - 1
    assert mine["versus_best_heuristic"]["ttft_s"]["value"] == pytest.approx(expected)
    assert mine["versus_best_heuristic"]["ttft_s"]["low"] < expected < mine["versus_best_heuristic"]["ttft_s"]["high"]
    assert mine["versus_baseline"]["ttft_s"]["value"] == pytest.approx((36 / 256) ** 0.25 - 1)
    assert mine["worst_cell"] == pytest.approx(0.5)
    assert mine["cells_won"] == pytest.approx(0.5)
    assert mine["cells_lost"] == pytest.approx(0.25)  # the third beyond doubt; of the fourth, the interval holds 0
    assert mine["scenarios"]["plain"] == pytest.approx(math.sqrt(0.25 * 0.75) - 1)
    assert mine["sizes"] == {2: pytest.approx(math.sqrt(0.25 * 1.5) - 1), 4: pytest.approx(math.sqrt(0.75 * 0.5) - 1)}
    assert mine["sizes_versus_best_heuristic"][4] == pytest.approx(math.sqrt(0.75 * 1.0) - 1)
    # A heuristic's rival is not itself.
    assert rows["other"]["versus_best_heuristic"]["ttft_s"]["value"] == pytest.approx((2 * 8 * 4 * 2 / 256) ** 0.25 - 1)


def test_a_rival_is_chosen_without_the_seed_that_it_is_judged_by() -> None:
    """Of two heuristics that are lucky in turn, hindsight takes the luckier; the other seed takes the other."""
    result = _made_up()
    for row in result.rows:
        lucky = {"base": 0, "other": 1}.get(row["policy"])
        mean = {"mine": 2.0, "oracle": 0.5}.get(row["policy"], 1.0 + lucky * 0.1 if row["seed"] == lucky else 4.0)
        row["ttft_s"] = {"mean": mean, "p99": 10.0}
    mine = next(row for row in leaderboard(result) if row["policy"] == "mine")
    assert mine["versus_best_heuristic"]["ttft_s"]["value"] == pytest.approx(2 / math.sqrt(1.0 * 4.0) - 1)
    assert mine["versus_chosen_heuristic"]["ttft_s"]["value"] == pytest.approx(2 / 4 - 1)
    assert mine["worst_cell_chosen"] == pytest.approx(-0.5)


def test_tables_of_scenarios_are_the_leaderboard() -> None:
    result = _made_up()
    assert [len(table.rows) for table in result.tables()] == [4, 4, 4]
    assert result.as_json()["leaderboard"] == leaderboard(result)
    assert len(leaderboard_tables(result)) == 3


def test_the_shipped_bench_names_sizes_that_its_scenarios_allow() -> None:
    config = load_config(EvaluationConfig, "bench", "evaluate")
    assert len(config.conditions) == len(config.scenarios) * 3
    assert all(seed < 100 for seed in config.seed_list)
