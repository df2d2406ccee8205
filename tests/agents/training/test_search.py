"""Search by CMA-ES: better than where it began, the same twice, and after an interruption too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import TOY

from servegym.agents.training.config import TrainConfig
from servegym.agents.training.search import Candidate, Episodes, Search
from servegym.agents.training.trainer import train
from servegym.configuration import validate
from servegym.engine_bridge.bundle import load_bundle
from servegym.errors import InputError


@pytest.fixture
def make(tmp_path: Path) -> Any:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(TOY))

    def config(**changes: Any) -> TrainConfig:
        content: dict[str, Any] = {
            "name": "search",
            "total_steps": 30_000,
            "checkpoint_every_steps": 10_000,
            "evolution": {"episodes": 2, "population": 6},
            "network": {"width": 1, "prior": "none"},
            "env": {
                "cluster": {"engines": 4, "profile": str(profile)},
                "workload": {"name": "azure-conv", "load": 0.8},
                "episode_requests": 200,
                "reference": "lmetric",
            },
            "evaluation": {"every_steps": 10_000, "episodes": 3, "objective": {"ttft_s": 1.0}},
        }
        return validate(TrainConfig, content | changes, "test")

    return config


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_from_nothing_it_finds_a_rule(make: Any, tmp_path: Path) -> None:
    result = train(make(total_steps=100_000), out=tmp_path / "run", progress=False)
    rows = evaluations(tmp_path / "run")
    # Engines without a rule take turns.
    assert rows[0]["steps"] == 0
    assert rows[0]["ttft_s_ratio"] > 1.1
    assert result.best_objective < 0.5 * (1.0 + rows[0]["ttft_s_ratio"])
    assert result.steps == 100_800
    policy = load_bundle(result.policy)
    assert policy.manifest.training.evaluation["objective"] == result.best_objective
    # Only the linear part was tuned.
    assert not policy.weights["head.weight"].any()
    assert policy.weights["prior.weight"].any()


@pytest.mark.parametrize("tune", ["linear", "network"])
def test_the_same_twice_and_after_an_interruption(tune: str, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config = make(evolution={"episodes": 2, "population": 6, "tune": tune}, network={"width": 4, "prior": "none"})
    whole = train(config, out=tmp_path / "whole", progress=False)
    assert train(config, out=tmp_path / "again", progress=False).best_objective == whole.best_objective
    play, left = Episodes.play, [60]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return play(*arguments)

    monkeypatch.setattr(Episodes, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "cut", progress=False)
    resumed = train(None, resume=tmp_path / "cut", progress=False)
    assert (resumed.best_objective, resumed.steps) == (whole.best_objective, whole.steps)
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    weights = [(tmp_path / run / "policy" / "policy.safetensors").read_bytes() for run in ("cut", "whole", "again")]
    assert weights[0] == weights[1] == weights[2]


def test_waiting_requests_too(make: Any, tmp_path: Path) -> None:
    """An overloaded engine under FCFS: there is an order to find."""
    env = make().env.model_dump(mode="json", include={"cluster"})
    env["cluster"] |= {"engines": 1, "engine": {"max_num_batched_tokens": 2048}}
    env |= {"workload": {"name": "azure-conv", "load": 1.2}, "episode_requests": 300, "reference": "fcfs"}
    changes = {"environment": "RequestOrdering-v0", "network": {"width": 1, "prior": "none"}, "total_steps": 60_000}
    result = train(make(env=env, **changes), out=tmp_path / "run", progress=False)
    assert result.evaluation["ttft_s_ratio"] < 0.8
    assert load_bundle(result.policy).manifest.layer == "request"


def test_candidates_meet_the_same_episodes(make: Any) -> None:
    search = Search(make())
    weights = search._weights(search._optimizer.mean)
    episodes = Episodes(make(), make().env)
    drawn = episodes.draw(5)
    played = [episodes.play(drawn, Candidate(weights, "engine")).metrics for _ in range(2)]
    assert played[0] == played[1]
    again = episodes.draw(5)
    np.testing.assert_array_equal(again.table.arrival_s, drawn.table.arrival_s)
    assert again.reference == drawn.reference


def test_live_engines_are_not_searched_on(make: Any) -> None:
    live = {"backend": "live", "live": {"urls": ["http://127.0.0.1:1"]}, "workload": {"name": "fixed", "rate_rps": 1}}
    with pytest.raises(InputError, match="allowed: evolution in the simulator"):
        make(env=live)
