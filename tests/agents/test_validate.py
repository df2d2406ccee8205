"""``servegym validate`` against a server that answers at known times, and what it makes of its cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import TOY, command

from servegym.agents.validation import Validation
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import stop_groups
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster
from servegym.envs.validation.config import ValidationConfig

STEP_US, DELAY_US = 8000.0, 15_000.0


@pytest.fixture
def cluster(fake_cluster: Callable[..., ClusterFile], tmp_path: Path) -> Iterator[LiveCluster]:
    times = {"ttft_s": 1e-6 * (STEP_US + 2 * DELAY_US), "itl_s": 1e-6 * STEP_US}
    with running_cluster(fake_cluster(times, engines=1), tmp_path / "cluster") as found:
        yield found


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The same times, as a profile."""
    step = {"fixed_us": STEP_US, "dense_us": {"tokens": [1, 2], "us": [0, 0]}}
    content = TOY | {
        "step_time": step | {"prefill_pair_us": 0, "decode_context_us": 0},
        "frontend": {"request_us": DELAY_US, "response_us": DELAY_US},
        "drift": 0.1,
    }
    path = tmp_path / "fake.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = {
        "name": "fake",
        "repetitions": 2,
        "policies": {"fcfs": {"request": "fcfs"}},
        "scenarios": {"steady": {"workload": {"name": "small-steady", "requests": 30}, "loads": [0.5]}},
    }
    path = tmp_path / "fake_validate.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_server_whose_times_are_known(
    cluster: LiveCluster,
    profile: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, plot = tmp_path / "out", tmp_path / "plot.png"
    options = [str(config), "--profile", str(profile), "--cluster", str(cluster.folder), "--out", str(out)]
    assert command(monkeypatch, "validate", *options, "--plot", str(plot), "--json") == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["repetitions"] == 2
    assert cell["simulated"]["tpot_s"]["p50"] == pytest.approx(1e-6 * STEP_US)
    assert abs(cell["simulated"]["error"]["tpot_s"]["p50"]) < 0.3
    assert abs(cell["simulated"]["error"]["ttft_s"]["p50"]) < 0.3
    assert cell["within_drift"]["tpot_s"]["p50"] in (True, False)
    assert plot.stat().st_size > 1000

    # All cells are there: no engine is needed any more, and the result is the same.
    stop_groups([engine.pid for engine in cluster.engines if engine.pid is not None])
    assert command(monkeypatch, "validate", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"] == [cell]
    assert command(monkeypatch, "validate", *options) == 0
    shown = capsys.readouterr().out
    assert "steady" in shown
    assert "within drift" in shown
    assert command(monkeypatch, "validate", *options, "--set", "seed=1") == 2
    assert "holds another validation" in capsys.readouterr().err


def test_bad_input_is_one_line(
    config: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([str(config)], "--profile"),
        ([str(config), "--profile", "nobody"], "nobody"),
        ([str(config), "--profile", str(profile)], "live"),
        ([str(config), "--profile", str(profile), "--cluster", "nowhere"], "no such cluster"),
        ([str(config), "--profile", str(profile), "--set", "repetitions=0"], "repetitions"),
        (["no-such-config"], "no-such-config"),
    ):
        assert command(monkeypatch, "validate", *arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def row(policy: str, repetition: int, live_ms: float, simulated_ms: float) -> dict[str, Any]:
    def metrics(ms: float) -> dict[str, Any]:
        return {metric: dict.fromkeys(("mean", "p50", "p95", "p99"), 1e-3 * ms) for metric in TIMES}

    return {
        "repetition": repetition,
        "scenario": "one",
        "load": 0.5,
        "policy": policy,
        "live": metrics(live_ms),
        "simulated": metrics(simulated_ms),
        "queue": {"error": {"simulated": 0.1}},
    }


TIMES = ("ttft_s", "tpot_s", "e2e_s")


def test_medians_over_repetitions_and_what_is_beyond_the_bounds() -> None:
    config = ValidationConfig.model_validate(
        {
            "policies": {name: {} for name in "abcd"},
            "scenarios": {"one": {"workload": {"name": "fixed"}, "loads": [0.5], "policies": list("abcd")}},
        }
    )
    live = {"a": (100, 102, 300), "b": (200, 202, 198), "c": (301, 300, 299), "d": (400, 410, 390)}
    simulated = {"a": 95, "b": 230, "c": 290, "d": 280}
    rows = [row(p, i, times[i], simulated[p]) for p, times in live.items() for i in range(3)]
    result = Validation(config, tuple(rows))
    a, b, *_ = result.compared
    assert a.error("ttft_s", "mean") == pytest.approx(95 / 102 - 1)
    assert b.error("ttft_s", "p95") == pytest.approx(0.15)
    assert b.repeat_error("ttft_s", "mean") == pytest.approx(0.01, rel=0.05)
    assert a.misses(config.bounds) == ["TPOT mean -6.9%", "TPOT p50 -6.9%"]
    assert "TTFT mean +15.0%" in b.misses(config.bounds)
    (ranking,) = result.rankings
    assert ranking.agreement()["spearman"] == pytest.approx(0.8)
    assert ranking.agreement()["spearman_repeat"] == pytest.approx(0.4)
    assert ranking.agreement()["spearman_at_speed"] is None

    at_speed = [one | {"at_speed": row(one["policy"], 0, 0, live[one["policy"]][0])["simulated"]} for one in rows]
    for one in at_speed:
        one["queue"] = {"error": {"simulated": 0.1, "at_speed": 0.1}}
    (ranking,) = Validation(config, tuple(at_speed)).rankings
    assert ranking.agreement()["spearman_at_speed"] == pytest.approx(1.0)


def test_what_the_drift_of_the_machine_explains() -> None:
    config = ValidationConfig.model_validate(
        {"policies": {"a": {}}, "scenarios": {"one": {"workload": {"name": "fixed"}, "loads": [0.5]}}}
    )
    rows = [row("a", i, live, 90) for i, live in enumerate((100, 104, 110))]
    for one, faster, slower in zip(rows, (80, 81, 82), (103, 105, 107), strict=True):
        one |= {"faster": row("a", 0, 0, faster)["simulated"], "slower": row("a", 0, 0, slower)["simulated"]}
    (known,) = Validation(config, tuple(rows)).compared
    assert known.drift("ttft_s", "mean") == pytest.approx((0.081, 0.105))
    assert known.within_drift("ttft_s", "mean")
    assert Validation(config, tuple(rows)).as_json()["cells"][0]["within_drift"]["tpot_s"]["p95"] is True
    (beyond,) = Validation(config, (rows[2],)).compared
    assert beyond.within_drift("ttft_s", "mean") is False
    (unknown,) = Validation(config, (row("a", 0, 100, 90),)).compared
    assert unknown.drift("ttft_s", "mean") is None
    assert unknown.within_drift("ttft_s", "mean") is None
