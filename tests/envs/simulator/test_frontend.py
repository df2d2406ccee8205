"""Delays outside of the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import TOY, random_table, session_table

from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

FRONTEND = {"request_us": 4000.0, "prompt_token_us": 2.0, "response_us": 3000.0}


def profile(folder: Path, name: str, frontend: dict[str, float] | None) -> str:
    content: dict[str, Any] = TOY | {"name": name} | ({} if frontend is None else {"frontend": frontend})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def outcome(table: RequestTable, reference: str) -> RunOutcome:
    config = ClusterConfig(engines=2, profile=reference)
    run = SimulatedCluster(config, table, create("request", "fcfs"), create("engine", "round_robin"))
    run.run()
    return RunOutcome.of(run)


def test_requests_that_meet_nobody_wait_longer_by_the_frontend(tmp_path: Path) -> None:
    table = random_table(0, 40, rate_rps=0.2)
    without = outcome(table, profile(tmp_path, "bare", None))
    within = outcome(table, profile(tmp_path, "served", FRONTEND))
    more = 1e-6 * (4000 + 2 * table.prompt_tokens + 3000)
    np.testing.assert_allclose(within.arrival_s, table.arrival_s)
    np.testing.assert_allclose(within.ttft_s - without.ttft_s, more)
    np.testing.assert_allclose(within.e2e_s - without.e2e_s, more)
    np.testing.assert_allclose(within.tpot_s, without.tpot_s)


def test_a_frontend_of_nothing_changes_nothing(tmp_path: Path) -> None:
    table = session_table(1)
    without = outcome(table, profile(tmp_path, "bare", None))
    within = outcome(table, profile(tmp_path, "empty", dict.fromkeys(FRONTEND, 0.0)))
    np.testing.assert_array_equal(within.ttft_s, without.ttft_s)
    np.testing.assert_array_equal(within.finish_s, without.finish_s)


def test_a_session_goes_on_a_think_time_after_its_client_has_the_answer(tmp_path: Path) -> None:
    table = session_table(2, sessions=20, think_s=1.0)
    found = outcome(table, profile(tmp_path, "served", FRONTEND))
    followers = np.flatnonzero(table.parent >= 0)
    due = found.finish_s[table.parent[followers]] + table.think_s[followers]
    np.testing.assert_allclose(found.arrival_s[followers], due)


def test_a_short_prompt_overtakes_a_long_one_on_its_way(tmp_path: Path) -> None:
    slow = {"prompt_token_us": 1000.0}
    table = RequestTable.build([0.0, 0.001], [400, 4], [1, 1])
    found = outcome(table, profile(tmp_path, "slow", slow))
    assert found.finish_s[1] < found.finish_s[0]


def test_engines_with_different_frontends_are_refused(tmp_path: Path) -> None:
    bare, served = profile(tmp_path, "bare", None), profile(tmp_path, "served", FRONTEND)
    config = ClusterConfig.model_validate({"groups": [{"profile": bare}, {"profile": served}]})
    with pytest.raises(InputError, match="equal frontends"):
        SimulatedCluster(config, random_table(0, 5), create("request", "fcfs"))
