"""Workload files: what they may say, and workloads that replay a trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from servegym.configuration import validate
from servegym.envs.workloads import RequestTable, WorkloadConfig, generate, load_workload
from servegym.errors import InputError

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "description": "for tests",
    "source": "invented",
    "arrivals": {"process": "poisson"},
    "prompt_tokens": {"kind": "fixed", "value": 10},
    "output_tokens": {"kind": "fixed", "value": 5},
}
REPLAY: dict[str, Any] = {
    "name": "replay",
    "description": "for tests",
    "source": "invented",
    "trace": {"path": "trace.csv"},
}


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    """A workload file beside its trace of 100 requests, one a second, prompts 1 to 100, two users' sessions."""
    rows = "".join(f"{i},{i + 1},2,s{i % 20}\n" for i in range(100))
    (tmp_path / "trace.csv").write_text("arrival_s,prompt_tokens,output_tokens,session\n" + rows, encoding="utf-8")
    path = tmp_path / "replay.yaml"
    path.write_text(yaml.safe_dump(REPLAY), encoding="utf-8")
    return path


def test_a_trace_lies_beside_its_workload(replay: Path) -> None:
    config = load_workload(replay)
    table = generate(config)
    assert table.prompt_tokens.tolist() == list(range(1, 101))
    assert table.arrival_s.tolist() == list(range(100))


def test_a_trace_at_a_rate_and_cut(replay: Path) -> None:
    config = load_workload(str(replay))
    assert generate(config, rate_rps=10.0).arrival_s[-1] == pytest.approx(9.9)
    assert len(generate(config, rate_rps=10.0, duration_s=1.0)) == 10
    assert generate(config, max_tokens=12).prompt_tokens.tolist() == list(range(1, 11))


def test_the_seed_draws_the_window(replay: Path) -> None:
    config = load_workload(replay)
    firsts = {int(generate(config, requests=10, seed=seed).prompt_tokens[0]) for seed in range(20)}
    assert len(firsts) > 5
    for seed in range(20):
        table = generate(config, requests=10, seed=seed)
        assert (np.diff(table.prompt_tokens) == 1).all()
        assert table.arrival_s[0] == 0
    assert len(generate(config, requests=500)) == 100


def test_a_trace_gets_what_it_lacks(replay: Path) -> None:
    extra = {
        "users": {"count": 3},
        "deadline": {"base_s": 2},
        "prediction": {"sigma": 0},
        "priorities": {"shares": {4: 1}},
    }
    config = load_workload(replay).model_copy(update=dict(validate(WorkloadConfig, MINIMAL | extra, "x")))
    config = config.model_copy(update={"trace": load_workload(replay).trace, "arrivals": None})
    table = generate(config)
    assert set(table.user.tolist()) == {0, 1, 2}
    # One user per session.
    assert len(set(zip(table.session.tolist(), table.user.tolist(), strict=True))) == 20
    assert (table.deadline_s == 2).all()
    assert (table.priority == 4).all()
    assert table.predicted_tokens.tolist() == table.output_tokens.tolist()


def test_a_changed_trace_is_read_again(replay: Path) -> None:
    config = load_workload(replay)
    assert len(generate(config)) == 100
    trace = replay.parent / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n", encoding="utf-8")
    os.utime(trace, ns=(1, 1))
    assert len(generate(config)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrivals": None}, "arrivals for a generated workload, a trace, or tenants"),
        ({"trace": {"path": "x.csv"}}, "no arrivals and no prompt_tokens and no output_tokens beside a trace"),
        ({"rate_rps": 3}, "rate_rps: unknown key"),
        ({"arival": 3}, "arival: unknown key; did you mean arrivals?"),
        ({"prompt_tokens": {"kind": "fixed"}}, "prompt_tokens.fixed.value: missing; this field is required"),
        ({"prompt_tokens": {"kind": "fixed", "value": -1}}, "prompt_tokens.fixed.value: got -1; allowed: greater than"),
        ({"arrivals": {"process": "poison"}}, "arrivals"),
        ({"max_tokens": 1}, "max_tokens: got 1; allowed: greater than or equal to 2"),
        (
            {"templates": [{"share": 0.7, "count": 1, "tokens": {"kind": "fixed", "value": 1}}] * 2},
            "shares of templates that add up to at most 1",
        ),
    ],
)
def test_bad_workloads(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | change), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_workload(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean azure-conv"):
        load_workload("azure-con")


def test_a_missing_trace(tmp_path: Path) -> None:
    path = tmp_path / "replay.yaml"
    path.write_text(yaml.safe_dump(REPLAY), encoding="utf-8")
    with pytest.raises(InputError, match=r"trace.csv: no such file"):
        generate(load_workload(path))


def test_build_defaults() -> None:
    table = RequestTable.build([0.0], [1], [1])
    assert (table.user[0], table.session[0], table.parent[0], table.template[0]) == (-1, -1, -1, -1)
    assert np.isnan(table.predicted_tokens[0])
    assert table.deadline_s[0] == np.inf
