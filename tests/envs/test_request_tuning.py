"""RequestTuning-v0: the parameters of a queue's rule, interval by interval."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3
from support import TOY

from servegym.envs.request_tuning import RequestTuningEnv
from servegym.envs.simulation import Policies
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.errors import InputError


@pytest.fixture
def config(tmp_path: Any) -> dict[str, Any]:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY))
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    cluster = {"engines": 2, "profile": str(path), "engine": engine}
    return {"cluster": cluster, "workload": {"name": "azure-conv", "load": 1.2}, "episode_requests": 200}


def play(env: RequestTuningEnv, choose: Any, seed: int = 0) -> tuple[float, dict[str, Any]]:
    observation, info = env.reset(seed=seed)
    total, over, step = 0.0, False, 0
    while not over:
        assert env.observation_space.contains(observation)
        observation, reward, over, _, info = env.step(choose(step))
        assert over or info["elapsed_s"] == pytest.approx(env.config.interval_s)
        total += float(reward)
        step += 1
    return total, info


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkers(config: dict[str, Any]) -> None:
    env = gymnasium.make("servegym/RequestTuning-v0", config=config)
    check_env(env.unwrapped, skip_render_check=True)
    check_sb3(env.unwrapped)


def test_a_constant_setting_is_the_rule_with_that_parameter(config: dict[str, Any]) -> None:
    env = RequestTuningEnv(config | {"ranges": {"gamma": (10.0, 1000.0)}})
    total, info = play(env, lambda _: np.zeros(1, dtype=np.float32))
    assert info["parameters"] == {"gamma": pytest.approx(100.0)}
    assert -total / 200 == pytest.approx(info["metrics"]["ttft_s"], rel=1e-9)
    assert env._run is not None
    request, engine, _ = Policies.model_validate({"request": "spf_aging,gamma=100"}).make()
    plain = SimulatedCluster(env.config.cluster, env._run.table, request, engine)
    plain.run()
    np.testing.assert_array_equal(plain.memory.requests["first_s"], env._run.memory.requests["first_s"])


def test_the_setting_matters(config: dict[str, Any]) -> None:
    low, high = (play(RequestTuningEnv(config), lambda _, x=x: np.full(1, x, np.float32))[0] for x in (-1.0, 1.0))
    assert low != high
    mixed, _ = play(RequestTuningEnv(config), lambda step: np.full(1, 1.0 if step % 2 else -1.0, np.float32))
    assert mixed not in (low, high)


def test_bad_input(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="policy: got fcfs; allowed: a compiled rule with parameters"):
        RequestTuningEnv(config | {"policy": "fcfs"})
    with pytest.raises(InputError, match=r"ranges\.gama: no such parameter; allowed: gamma"):
        RequestTuningEnv(config | {"ranges": {"gama": (1, 2)}})
    with pytest.raises(InputError, match=r"ranges\.gamma: missing; its value 0.0 is no scale"):
        RequestTuningEnv(config | {"policy": "spf_aging,gamma=0"})
    with pytest.raises(InputError, match=r"got 5\.0 to 2\.0; allowed: the lower bound first"):
        RequestTuningEnv(config | {"ranges": {"gamma": (5, 2)}})
