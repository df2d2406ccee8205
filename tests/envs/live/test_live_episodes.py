"""Episodes of the environments on engines that answer as vLLM does, at known times."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import servegym  # noqa: F401 - registers the environments
from servegym.baselines.features import ENGINE_FEATURES
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import stop_groups
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster
from servegym.engine_bridge.experts import LiveExperts
from servegym.envs.engine_dispatch import EngineDispatchEnv
from servegym.envs.multi_layer import MultiLayerEnv
from servegym.envs.request_ordering import RequestOrderingEnv
from servegym.envs.request_tuning import RequestTuningEnv
from servegym.errors import EngineError, InputError

Make = Callable[..., ClusterFile]
TWO_ENGINES = {"engines": 2, "profile": "qwen3-30b-a3b-h200-ep4", "mode": "lockstep", "experts": {}}


@pytest.fixture
def cluster(fake_cluster: Make, tmp_path: Path) -> Iterator[LiveCluster]:
    with running_cluster(fake_cluster({"ttft_s": 0.02, "itl_s": 0.002}), tmp_path) as started:
        yield started


def config(cluster: LiveCluster, **more: Any) -> dict[str, Any]:
    live = {"cluster": str(cluster.folder), "output_scale": 0.05, "limits": {"max_num_seqs": 2}}
    workload = {"name": "azure-conv", "rate_rps": 40}
    return {"backend": "live", "live": live, "workload": workload, "episode_requests": 40} | more


def play(env: Any, choose: Callable[[Any, Any], Any], seed: int = 1) -> tuple[float, list[dict[str, Any]], int]:
    observation, info = env.reset(seed=seed)
    total, infos, over = 0.0, [info], False
    while not over:
        assert env.observation_space.contains(observation)
        observation, reward, over, truncated, info = env.step(choose(observation, info))
        total += reward
        infos.append(info)
        assert not truncated
    return total, infos, len(infos) - 1


def test_dispatch_rewards_are_the_metric_and_actions_are_obeyed(cluster: LiveCluster) -> None:
    env = EngineDispatchEnv(config(cluster, reward={"ttft": 1, "e2e": 0.5, "tpot": 2}))
    chosen: list[int] = []

    def choose(observation: Any, info: Any) -> int:
        assert info["action_mask"].tolist() == [1, 1]
        chosen.append(len(chosen) // 3 % 2)
        return chosen[-1]

    total, infos, steps = play(env, choose)
    assert steps == 40
    metrics = infos[-1]["metrics"]
    assert metrics["requests"] == 40
    run = env._run
    assert run is not None
    np.testing.assert_array_equal(run.memory.requests["engine"], chosen)
    outcome = run.memory.requests
    ttft, e2e = outcome["first_s"] - outcome["arrival_s"], outcome["finish_s"] - outcome["arrival_s"]
    tpot = np.where(
        outcome["output"] > 1, (outcome["finish_s"] - outcome["first_s"]) / np.maximum(outcome["output"] - 1, 1), 0
    )
    assert total == pytest.approx(-(ttft.sum() + 0.5 * e2e.sum() + 2 * tpot.sum()), rel=1e-9)
    assert metrics["ttft_s"] == pytest.approx(ttft.mean())
    assert 0.02 < metrics["ttft_s"] < 2.0  # the engines take 0.02 s, a busy machine up to 0.6
    assert all(info["elapsed_s"] >= 0 for info in infos[1:])
    env.close()


def test_the_observation_is_that_of_the_simulator(cluster: LiveCluster) -> None:
    live = EngineDispatchEnv(config(cluster))
    simulated = EngineDispatchEnv({"cluster": {"engines": 2}})
    assert live.observation_space == simulated.observation_space
    inflight = [feature.name for feature in ENGINE_FEATURES].index("log_batch")
    seen = []

    def choose(observation: Any, info: Any) -> int:
        seen.append(observation["engines"][:, inflight].copy())
        return 0

    play(live, choose)
    assert max(row[0] for row in seen) > seen[0][0]
    assert {row[1] for row in seen} == {seen[0][1]}
    live.close()


def test_sessions_go_on_after_their_answers(cluster: LiveCluster) -> None:
    workload = {"name": "agentic-coding", "rate_rps": 30}
    env = EngineDispatchEnv(config(cluster, workload=workload, episode_requests=30))
    _, infos, _ = play(env, lambda observation, info: 1)
    assert infos[-1]["metrics"]["ttft_s"] > 0.015
    env.close()


def test_ordering_releases_what_the_agent_names(cluster: LiveCluster) -> None:
    settings = config(cluster, workload={"name": "azure-conv", "rate_rps": 300}, window=8)
    env = RequestOrderingEnv(settings)
    picked: list[int] = []

    def last(observation: Any, info: Any) -> int:
        place = int(info["action_mask"].sum()) - 1
        assert place >= 1
        queue = env.waiting()
        assert (np.diff(queue.arrival_s) >= 0).all()
        picked.append(int(queue.index[place]))
        return place

    total, infos, steps = play(env, last)
    assert steps > 10
    assert len(set(picked)) == len(picked)
    assert infos[-1]["metrics"]["requests"] == 40
    requests = env._run.memory.requests  # type: ignore[union-attr]
    # Two slots per engine: never more than that between first byte and last.
    for engine in range(2):
        mine = requests[requests["engine"] == engine]
        for at in mine["first_s"]:
            assert ((mine["first_s"] <= at) & (mine["finish_s"] > at)).sum() <= 2
    assert total == pytest.approx(-(requests["first_s"] - requests["arrival_s"]).sum(), rel=1e-9)
    env.close()


def test_tuning_sets_the_rule_inside_the_engines(fake_cluster: Make, tmp_path: Path) -> None:
    file = fake_cluster({"ttft_s": 0.05, "itl_s": 0.002}, request_policy="spf_aging")
    with running_cluster(file, tmp_path) as cluster:
        env = RequestTuningEnv(config(cluster, policy="spf_aging", interval_s=0.1))
        _, infos, steps = play(env, lambda observation, info: np.array([0.3]))
        assert steps >= 5
        text = (cluster.folder / "policy.json").read_text()
        assert f'"gamma": {infos[-1]["parameters"]["gamma"]}' in text
        env.close()


def test_an_abandoned_episode_is_cut_off(cluster: LiveCluster) -> None:
    env = EngineDispatchEnv(config(cluster))
    env.reset(seed=1)
    env.step(0)
    _, _, steps = play(env, lambda observation, info: 0, seed=2)
    assert steps == 40
    env.reset(seed=3)
    env.close()


def test_engines_that_die_end_the_episode_with_an_error(cluster: LiveCluster) -> None:
    env = EngineDispatchEnv(config(cluster))
    env.reset(seed=1)
    stop_groups([engine.pid for engine in cluster.engines if engine.pid], timeout_s=0.0)

    def to_the_end() -> None:
        while not env.step(0)[2]:
            pass

    with pytest.raises(EngineError, match=r"no request was answered|no engine"):
        to_the_end()
    env.close()


def test_what_cannot_be_is_said(cluster: LiveCluster) -> None:
    good = config(cluster)
    for changes, part in (
        ({"live": None}, "backend: live"),
        ({"workload": {"name": "azure-conv", "load": 0.8}}, "rate_rps"),
        ({"reference": "round_robin"}, "reference"),
        ({"randomise": {"engines": [2, 3]}}, "randomise"),
        ({"live": {"cluster": "nowhere"}}, "no such cluster"),
        ({"backend": "sim"}, "only with it"),
    ):
        with pytest.raises(InputError, match=part):
            EngineDispatchEnv(good | changes)
    with pytest.raises(InputError, match="allowed for this environment: sim"):
        gymnasium.make("servegym/ExpertPlacement-v0", config=config(cluster))
    env = RequestTuningEnv(config(cluster, live={"urls": [engine.url for engine in cluster.engines]}))
    with pytest.raises(InputError, match=r"live\.cluster"):
        env.reset()


def test_all_three_layers(fake_cluster: Make, tmp_path: Path) -> None:
    """Engine, priority and placement reach the engines, and the episode says what was moved."""
    options = {"ttft_s": 0.02, "itl_s": 0.002, "policy": "priority"}
    with running_cluster(fake_cluster(options), tmp_path) as cluster:
        settings = config(cluster, menu=["eplb"], priorities=4)
        settings["live"] |= {"replacement_s": 0.2}
        env = MultiLayerEnv(settings)
        simulated = MultiLayerEnv({"cluster": TWO_ENGINES, "menu": ["eplb"], "priorities": 4})
        assert env.observation_space == simulated.observation_space
        step = itertools.count()
        _, infos, steps = play(env, lambda observation, info: [next(step) % 2, 3, 1])
        assert steps == 40
        metrics = infos[-1]["metrics"]
        # The two hottest experts of a layer end on different ranks: one replacement per engine, then nothing to gain.
        assert metrics["replacements"] == 2
        assert metrics["experts_moved"] > 0
        for engine in cluster.engines:
            placement = LiveExperts(engine.url).placement()
            ranks = [set(layer.tolist()) for layer in np.split(placement.physical_to_logical, 2, axis=1)[0]]
            assert all(len(rank & {0, 1}) == 1 for rank in ranks)
            with urllib.request.urlopen(f"{engine.url}/seen") as response:
                assert set(json.load(response)) == {3}
        env.close()


@pytest.mark.parametrize(
    ("options", "menu", "message"),
    [
        ({}, ["eplb", "source_aware"], "menu.1: got source_aware, which needs counts by source rank"),
        ({"immovable": True}, ["eplb"], "servegym_place: out of memory"),
        ({"policy": "fcfs"}, ["eplb"], "live: cluster: got http.*, which ignores priorities; allowed: engines with"),
    ],
)
def test_what_live_experts_cannot_do(
    fake_cluster: Make, tmp_path: Path, options: dict[str, Any], menu: list[str], message: str
) -> None:
    with running_cluster(fake_cluster({"policy": "priority"} | options), tmp_path) as cluster:
        settings = config(cluster, menu=menu)
        settings["live"] |= {"replacement_s": 0.1}
        with pytest.raises((InputError, EngineError), match=message):
            play(MultiLayerEnv(settings), lambda observation, info: [0, 0, 1])
