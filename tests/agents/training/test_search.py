"""Search by CMA-ES: better than where it began, the same twice, and after an interruption too."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import TOY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents.training.config import TrainConfig
from servegym.agents.training.search import Episodes, Search
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


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


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
    logged = scalars(tmp_path / "run")
    for name in ("ttft_s_ratio", "objective"):
        expected = [(row["steps"], pytest.approx(row[name], rel=1e-5)) for row in rows]
        assert logged[f"evaluation/{name}"] == expected
    ratio = logged["evaluation/ttft_s"][0][1] / logged["reference/ttft_s"][0][1]
    assert ratio == pytest.approx(rows[0]["ttft_s_ratio"], rel=0.3)  # of means, there the mean of ratios
    assert sum(logged[f"policy/share_engine_{k:02d}"][-1][1] for k in range(4)) == pytest.approx(1.0)
    assert len(logged["search/cost_best"]) == result.steps // 2400
    assert all(
        low <= high for (_, low), (_, high) in zip(logged["search/cost_best"], logged["search/cost_p75"], strict=True)
    )
    policy = load_bundle(result.policy)
    assert policy.manifest.training.evaluation["objective"] == result.best_objective
    # Only the linear part was tuned.
    assert not policy.weights["head.weight"].any()
    assert policy.weights["prior.weight"].any()


def interrupt_at(episode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C once, when the search begins to play its episode of this number, counted from 1."""
    play, left = Episodes.play, [episode]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return play(*arguments)

    monkeypatch.setattr(Episodes, "play", interrupted)


@pytest.mark.parametrize("tune", ["linear", "network"])
def test_the_same_twice_and_after_an_interruption(tune: str, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config = make(evolution={"episodes": 2, "population": 6, "tune": tune}, network={"width": 4, "prior": "none"})
    whole = train(config, out=tmp_path / "whole", progress=False)
    assert train(config, out=tmp_path / "again", progress=False).best_objective == whole.best_objective
    interrupt_at(60, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "cut", progress=False)
    resumed = train(None, resume=tmp_path / "cut", progress=False)
    assert (resumed.best_objective, resumed.steps) == (whole.best_objective, whole.steps)
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    assert scalars(tmp_path / "cut") == scalars(tmp_path / "whole")
    weights = [(tmp_path / run / "policy" / "policy.safetensors").read_bytes() for run in ("cut", "whole", "again")]
    assert weights[0] == weights[1] == weights[2]


def test_processes_play_the_same_episodes(make: Any, tmp_path: Path) -> None:
    """Two of them find what one finds, and take over what it began."""
    alone = train(make(), out=tmp_path / "alone", progress=False)
    evolution = {"episodes": 2, "population": 6, "workers": 2}
    begun = train(make(evolution=evolution, total_steps=20_000), out=tmp_path / "begun", progress=False)
    assert begun.steps < alone.steps
    assert multiprocessing.active_children() == []
    more = train(make(evolution=evolution), resume=tmp_path / "begun", progress=False)
    assert more.best_objective == alone.best_objective
    assert evaluations(tmp_path / "begun") == evaluations(tmp_path / "alone")
    assert make(evolution=evolution).sha256() == make().sha256()


def test_waiting_requests_too(make: Any, tmp_path: Path) -> None:
    """An overloaded engine under FCFS: there is an order to find."""
    env = make().env.model_dump(mode="json", include={"cluster"})
    env["cluster"] |= {"engines": 1, "engine": {"max_num_batched_tokens": 2048}}
    env |= {"workload": {"name": "azure-conv", "load": 1.2}, "episode_requests": 300, "reference": "fcfs"}
    changes = {"environment": "RequestOrdering-v0", "network": {"width": 1, "prior": "none"}, "total_steps": 60_000}
    result = train(make(env=env, **changes), out=tmp_path / "run", progress=False)
    assert result.evaluation["ttft_s_ratio"] < 0.8
    assert load_bundle(result.policy).manifest.layer == "request"


EXPERTS = {
    "layers": 2,
    "experts": 16,
    "top_k": 2,
    "ranks": 2,
    "expert_bytes": 1_000_000,
    "token_bytes": 4096,
    "expert_us": 20.0,
    "link_gb_s": 2.0,
    "link_latency_us": 5.0,
}


@pytest.fixture
def in_lockstep(tmp_path: Path) -> dict[str, Any]:
    """Arguments of an environment with experts."""
    profile = tmp_path / "experts.yaml"
    step_time = {key: value for key, value in TOY["step_time"].items() if key != "moe_imbalance"}
    profile.write_text(yaml.safe_dump(TOY | {"step_time": step_time, "experts": EXPERTS}))
    return {
        "cluster": {
            "engines": 2,
            "profile": str(profile),
            "mode": "lockstep",
            "experts": {
                "routing": {"tokens": 1024, "tasks": 2},
                "replacement": {"interval_steps": 100, "window_steps": 100, "coactivation_tokens": 256},
            },
        },
        "workload": {"name": "azure-conv", "load": 0.7},
        "episode_requests": 100,
    }


def test_placements_too(make: Any, in_lockstep: dict[str, Any], tmp_path: Path) -> None:
    config = make(
        environment="ExpertPlacement-v0",
        env=in_lockstep | {"reference": "linear"},
        network={"width": 1, "prior": "none"},
        total_steps=2400,
        evaluation={"every_steps": 1200, "episodes": 1, "objective": {"tpot_s": 1.0}},
    )
    result = train(config, out=tmp_path / "run", progress=False)
    assert result.evaluation["tpot_s_ratio"] < 1.0
    assert load_bundle(result.policy).manifest.layer == "expert"
    # The best may be the rule as it was: which of so few candidates is better, a rounding decides.
    assert load_bundle(tmp_path / "run" / "policy_last").weights["prior.weight"].any()


def test_layers_in_turn_and_then_together(
    make: Any, in_lockstep: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    config = make(
        env=in_lockstep | {"reference": "round_robin", "expert_policy": "linear"},
        evolution={
            "episodes": 1,
            "population": 4,
            "budget_share": 0.5,
            "start_from": {"engine": "servegym/dispatch", "request": "servegym/ordering"},
            "phases": [{"layers": ["engine"], "steps": 800}, {"layers": ["request", "engine", "expert"]}],
        },
        total_steps=1600,
        checkpoint_every_steps=400,
        evaluation={"every_steps": 800, "episodes": 1, "objective": {"ttft_s": 1.0, "tpot_s": 1.0}},
    )
    whole = train(config, out=tmp_path / "whole", progress=False)
    first = {name: load_bundle(name).weights["prior.weight"] for name in ("servegym/dispatch", "servegym/ordering")}
    last = {
        layer: load_bundle(tmp_path / "whole" / folder)
        for layer, folder in (
            ("engine", "policy_last"),
            ("request", "policy_last_request"),
            ("expert", "policy_last_expert"),
        )
    }
    assert all(bundle.manifest.layer == layer for layer, bundle in last.items())
    assert not np.array_equal(last["engine"].weights["prior.weight"], first["servegym/dispatch"])
    assert not np.array_equal(last["request"].weights["prior.weight"], first["servegym/ordering"])
    assert last["expert"].weights["prior.weight"].any()
    share = last["request"].budget_share
    assert 0.0 < share <= 1.0
    assert share != 0.5
    assert last["engine"].manifest.budget_share is None
    assert load_bundle(whole.policy).manifest.layer == "engine"
    assert load_bundle(tmp_path / "whole" / "policy_expert").manifest.layer == "expert"

    interrupt_at(14, monkeypatch)  # in the second phase
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "cut", progress=False)
    train(None, resume=tmp_path / "cut", progress=False)
    for layer in ("", "_request", "_expert"):
        weights = [
            (tmp_path / run / f"policy_last{layer}" / "policy.safetensors").read_bytes() for run in ("cut", "whole")
        ]
        assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("evolution", "message"),
    [
        ({"phases": [{"layers": ["engine"]}, {"layers": ["expert"]}]}, "steps in all phases but the last"),
        ({"phases": [{"layers": ["engine"], "steps": 10}]}, "steps in all phases but the last"),
        ({"phases": [{"layers": ["request"]}]}, "evolution.start_from.request"),
        ({"phases": [{"layers": ["cluster"]}]}, "layers"),
        ({"budget_share": 0.5}, "evolution.budget_share only where the request level"),
    ],
)
def test_bad_phases_are_told(evolution: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(InputError, match=message):
        make(evolution={"episodes": 1} | evolution)


def test_a_layer_may_start_from_a_heuristic(make: Any) -> None:
    search = Search(
        make(
            evolution={
                "episodes": 1,
                "start_from": {"request": "shortest"},
                "phases": [{"layers": ["engine", "request"]}],
            }
        )
    )
    request = search._parts["request"]
    weights = dict(zip(request.actor.decisions.item_names, request.vector.tolist(), strict=True))
    assert {name for name, weight in weights.items() if weight} == {"log_prefill"}
    assert weights["log_prefill"] < 0.0
    assert request.budget_share(request.vector) is None


def test_a_start_of_another_layer_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"evolution\.start_from\.engine: .*request level"):
        Search(make(evolution={"episodes": 1, "start_from": {"engine": "servegym/ordering"}}))


def test_a_menu_is_not_for_gradients(make: Any, in_lockstep: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="evolution for ExpertPlacement-v0"):
        make(environment="ExpertPlacement-v0", env=in_lockstep, evolution=None)


def test_candidates_meet_the_same_episodes(make: Any) -> None:
    search = Search(make())
    part = search._parts["engine"]
    episodes = Episodes("engine", make().env)
    drawn = episodes.draw(5, 0)
    played = [episodes.play(drawn, {"engine": part.policy(part.vector)}).metrics for _ in range(2)]
    assert played[0] == played[1]
    again = episodes.draw(5, 0)
    np.testing.assert_array_equal(again.table.arrival_s, drawn.table.arrival_s)
    assert again.reference == drawn.reference


def test_live_engines_are_not_searched_on(make: Any) -> None:
    live = {"backend": "live", "live": {"urls": ["http://127.0.0.1:1"]}, "workload": {"name": "fixed", "rate_rps": 1}}
    with pytest.raises(InputError, match="allowed: evolution in the simulator"):
        make(env=live)
