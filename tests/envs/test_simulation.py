"""The simulation front end: loads, windows of traces, metrics, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.configuration import validate
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.simulation import SimulationConfig, simulate
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome
from servegym.errors import InputError


@pytest.fixture
def content(toy_profile: str, toy_workload: str) -> dict[str, Any]:
    return {
        "cluster": {"profile": toy_profile, "engines": 2},
        "workload": {"name": toy_workload, "load": 0.7, "requests": 800},
        "policies": {"engine": "lmetric"},
    }


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{i * 0.5},{50 + i},{10 + i % 5}" for i in range(100)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_metrics_have_what_the_command_line_promises(content: dict[str, Any]) -> None:
    metrics = simulate(validate(SimulationConfig, content, "test")).metrics()
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert set(metrics[name]) == {"mean", "p50", "p90", "p95", "p99"}
        assert 0 < metrics[name]["p50"] <= metrics[name]["p99"]
    promised = {
        "requests", "simulated_s", "wall_s", "engine_steps", "throughput_rps", "output_tokens_per_s", "goodput_rps",
        "preemptions", "prefix_hit_ratio", "per_engine", "expert_imbalance",
    }  # fmt: skip
    assert promised <= set(metrics)
    assert metrics["requests"] == 720  # a tenth is warm-up
    assert sum(engine["requests"] for engine in metrics["per_engine"]) == 800


@pytest.mark.parametrize(("every_s", "empty"), [(0.5, False), (1e6, True)])
def test_a_timeline_has_an_entry_per_whole_interval(content: dict[str, Any], every_s: float, empty: bool) -> None:
    timeline = simulate(validate(SimulationConfig, content | {"timeline_s": every_s}, "test")).timeline
    assert timeline is not None
    assert timeline.keys() == {"time_s", "running", "waiting", "kv_usage", "ttft_s", "tpot_s"}
    assert len({len(column) for column in timeline.values()}) == 1
    assert (timeline["time_s"] == []) is empty
    assert np.array(timeline["time_s"]) == pytest.approx(every_s * np.arange(1, len(timeline["time_s"]) + 1))


def test_the_load_is_a_share_of_what_the_cluster_can_finish(content: dict[str, Any]) -> None:
    config = validate(SimulationConfig, content, "test")
    source = RequestSource(config.workload, config.cluster)
    table = source.table(0)
    rate = len(table) / table.arrival_s.max()
    assert rate == pytest.approx(0.7 * source.capacity_rps(), rel=0.1)
    twice = config.cluster.model_copy(update={"engines": 4})
    assert source.capacity_rps(twice) == pytest.approx(2 * source.capacity_rps(), rel=0.1)
    metrics = simulate(config, table=table).metrics()
    assert metrics["throughput_rps"] == pytest.approx(rate, rel=0.1)
    # Beyond capacity the cluster finishes no more than its capacity.
    overload = simulate(config, table=source.table(0, load=1.6, requests=3000)).metrics()
    assert overload["throughput_rps"] < 1.15 * source.capacity_rps()


def test_seeds_draw_windows_of_a_trace(toy_profile: str, trace: Path) -> None:
    choice = WorkloadChoice.model_validate({"trace": {"path": str(trace)}, "requests": 40, "rate_rps": 10.0})
    source = RequestSource(choice, ClusterConfig(engines=2, profile=toy_profile))
    first, again, other = source.table(0), source.table(0), source.table(1)
    assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist()
    assert first.prompt_tokens[0] != other.prompt_tokens[0]
    assert len(first) == 40
    assert len(first) / first.arrival_s.max() == pytest.approx(10.0, rel=0.05)


def test_a_trace_keeps_its_own_times(toy_profile: str, trace: Path) -> None:
    choice = WorkloadChoice.model_validate({"trace": {"path": str(trace)}})
    table = RequestSource(choice, ClusterConfig(engines=2, profile=toy_profile)).table(0)
    np.testing.assert_allclose(np.diff(table.arrival_s), 0.5)


def test_goodput_counts_both_objectives() -> None:
    nan = np.nan
    outcome = RunOutcome(
        arrival_s=np.array([0.0, 1.0, 2.0, 3.0]),
        ttft_s=np.array([0.1, 0.5, 0.1, nan]),
        tpot_s=np.array([0.01, 0.01, 0.09, nan]),
        e2e_s=np.array([0.5, 0.9, 0.9, nan]),
        finish_s=np.array([0.5, 1.9, 2.9, nan]),
        prompt_tokens=np.full(4, 10, dtype=np.int32),
        output_tokens=np.full(4, 10, dtype=np.int32),
        deadline_s=np.full(4, np.inf),
        engine=np.zeros(4, dtype=np.int32),
        preemptions=np.zeros(4, dtype=np.int32),
        hit_tokens=np.zeros(4, dtype=np.int32),
    )
    metrics = outcome.metrics(ttft_slo_s=0.2, tpot_slo_s=0.05)
    assert (metrics["throughput_rps"], metrics["goodput_rps"]) == (1.0, pytest.approx(1 / 3))
    assert metrics["unfinished"] == 1
    assert outcome.metrics(warmup_share=0.25)["requests"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload": {"name": "azure-con", "load": 1}}, "did you mean azure-con"),
        ({"workload": {"name": "azure-conv", "load": -1}}, "workload.load: got -1; allowed: greater than 0"),
        ({"workload": {"load": 1}}, "exactly one of name and trace"),
        ({"policies": {"engine": "round_robbin"}}, "did you mean round_robin"),
        ({"cluster": {"engine": {"num_block": 3}}}, "num_block: unknown key; did you mean num_blocks"),
        ({"cluster": {"faults": [{"at_s": 1, "engine": 9, "kind": "die"}]}}, "got engine 9"),
        ({"slo": {"ttft_s": float("inf")}}, "slo.ttft_s: got inf; allowed: a finite number"),
    ],
)
def test_bad_input_is_one_line(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        simulate(validate(SimulationConfig, content | change, "c.yaml"))
    assert message in str(caught.value)


def test_a_request_of_a_trace_that_can_never_fit_is_named(toy_profile: str, trace: Path) -> None:
    with trace.open("a", encoding="utf-8") as file:
        file.write("60.0,5000,10\n")
    config = {"cluster": {"profile": toy_profile}, "workload": {"trace": {"path": str(trace)}}}
    with pytest.raises(InputError, match=r"trace.csv: requests\[100\]: got 5000 prompt"):
        simulate(validate(SimulationConfig, config, "c.yaml"))
