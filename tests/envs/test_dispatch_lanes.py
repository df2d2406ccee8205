"""Environments that are stepped together in the kernel, against the same ones stepped one by one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from servegym.envs.dispatch_lanes import DispatchLanes, EngineDispatchVectorEnv
from servegym.envs.engine_dispatch import EngineDispatchEnv

BASE: dict[str, Any] = {
    "cluster": {"engines": 3, "profile": "qwen3-30b-a3b-h200"},
    "workload": {"name": "azure-conv", "load": 0.9},
    "episode_requests": 60,
}
FAULTS = [
    {"kind": "die", "mean_between_s": 5.0, "mean_duration_s": 0.5},
    {"kind": "slow", "mean_between_s": 5.0, "mean_duration_s": 0.5},
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"reference": "lmetric", "reward": {"ttft": 1.0, "tpot": 0.3, "scale_s": 0.1}},
    "random_clusters": {"randomise": {"engines": [2, 3, 5], "slowdown": [1.0, 2.0]}, "load": [0.5, 1.2]},
    "sessions": {"workload": {"name": "chat-sessions", "load": 0.9}},
    "faults": {"cluster": BASE["cluster"] | {"random_faults": FAULTS}},
    "lockstep": {"cluster": BASE["cluster"] | {"mode": "lockstep"}},
    "ahead": {"cluster": BASE["cluster"] | {"engine": {"async_scheduling": True}}},
    "policy_in_python": {"request_policy": f"{__file__}:ShortestFirst"},
    "other_parts": {"reward": {"slowdown": 1.0, "violations": 1.0}, "workload": {"name": "tenants", "load": 0.9}},
}


class ShortestFirst:
    """Without a compiled form, so that the kernel stops at each order."""

    def score(self, queue: Any) -> Any:
        return queue.prompt_tokens


def _config(name: str) -> dict[str, Any]:
    return BASE | CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_lanes_are_bit_for_bit_the_environments(name: str) -> None:
    config, count, steps = _config(name), 4, 200
    alone = [EngineDispatchEnv(config) for _ in range(count)]
    together = EngineDispatchVectorEnv(count, config)
    rng = np.random.default_rng(1)
    seen = [env.reset(seed=7 + i)[0] for i, env in enumerate(alone)]
    observation, _ = together.reset(seed=7)
    episodes = 0
    for _ in range(steps):
        for key in observation:
            np.testing.assert_array_equal(observation[key], np.stack([one[key] for one in seen]), key)
        actions = np.array([rng.choice(np.flatnonzero(one["mask"])) for one in seen])
        observation, rewards, ended, cut, infos = together.step(actions)
        assert not cut.any()
        for i, env in enumerate(alone):
            seen[i], reward, terminated, _, info = env.step(int(actions[i]))
            assert rewards[i] == reward
            assert infos["elapsed_s"][i] == info["elapsed_s"]
            assert ended[i] == terminated
            if terminated:
                episodes += 1
                final = infos["final_info"]
                assert final["metrics"]["ttft_s"][i] == info["metrics"]["ttft_s"]
                for key, value in seen[i].items():
                    np.testing.assert_array_equal(infos["final_obs"][i][key], value)
                seen[i] = env.reset()[0]
    assert episodes >= count


def test_the_kernel_does_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without faults the environments themselves are only asked at the ends of episodes."""
    together = EngineDispatchVectorEnv(2, _config("reference"))
    together.reset(seed=0)

    def refuse(*_: Any) -> None:
        raise AssertionError("stepped one by one")

    monkeypatch.setattr(EngineDispatchEnv, "step", refuse)
    monkeypatch.setattr(EngineDispatchEnv, "go_on", refuse)
    for _ in range(BASE["episode_requests"] - 1):
        together.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(AssertionError, match="one by one"):
        together.step(np.zeros(2, dtype=np.int64))


def test_an_engine_that_may_not_be_chosen_is_refused_before_anything_happens() -> None:
    together = EngineDispatchVectorEnv(2, BASE | {"max_engines": 4})
    before, _ = together.reset(seed=0)
    for bad in (3, -1, 9):
        with pytest.raises(ValueError, match=rf"environment 1: engine {bad} may not be chosen; allowed: \[0, 1, 2\]"):
            together.step(np.array([0, bad]))
    after, *_ = together.step(np.array([0, 2]))
    assert not np.array_equal(before["request"], after["request"])


def test_gymnasium_makes_them() -> None:
    envs = gym.make_vec("servegym/EngineDispatch-v0", num_envs=3, vectorization_mode="vector_entry_point", config=BASE)
    assert isinstance(envs.unwrapped, EngineDispatchVectorEnv)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observation, infos = envs.reset(seed=[3, None, 3])
    assert observation in envs.observation_space
    np.testing.assert_array_equal(observation["engines"][0], observation["engines"][2])
    assert infos["engines"].tolist() == [3, 3, 3]
    assert envs.step(envs.action_space.sample())[0] in envs.observation_space


def test_only_plain_environments_suit() -> None:
    class Mine(EngineDispatchEnv):
        pass

    assert DispatchLanes.suit([EngineDispatchEnv(BASE)])
    assert not DispatchLanes.suit([EngineDispatchEnv(BASE), Mine(BASE)])


@pytest.mark.parametrize("name", ["reference", "faults", "sessions"])
def test_an_episode_that_is_over_leaves_no_memory_behind(name: str) -> None:
    together = EngineDispatchVectorEnv(1, _config(name))
    together.reset(seed=0)
    memory = weakref.ref(together._lanes._envs[0].run.memory)
    gc.collect()
    gc.disable()
    try:
        together.reset(seed=1)
        assert memory() is None
    finally:
        gc.enable()
