"""The dispatch environment: checkers, masks, exact rewards, seeds, randomisation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import servegym
from servegym.baselines.interface import pick
from servegym.baselines.registry import create
from servegym.envs.engine_dispatch import EngineDispatchEnv
from servegym.errors import InputError


@pytest.fixture
def config(toy_profile: str, toy_workload: str) -> dict[str, Any]:
    return {
        "cluster": {"profile": toy_profile, "engines": 3},
        "workload": {"name": toy_workload, "load": 0.8},
        "episode_requests": 60,
    }


def _play(env: gym.Env[Any, Any], seed: int, policy: str = "least_requests") -> tuple[float, dict[str, Any], list[Any]]:
    """Play an episode with a heuristic; returns the return, the last info and all observations."""
    chooser = create("engine", policy)
    observation, _ = env.reset(seed=seed)
    total, trajectory, done = 0.0, [observation], False
    info: dict[str, Any] = {}
    while not done:
        run = env.unwrapped._run
        request, engines = run.request_view(), run.engine_views()
        observation, reward, done, truncated, info = env.step(pick(chooser.score(request, engines), engines.available))
        assert not truncated
        total += float(reward)
        trajectory.append((observation, reward))
    return total, info, trajectory


# The checkers warn of unbounded boxes and of a matrix of engines; both are meant.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_registered_and_accepted_by_both_checkers(config: dict[str, Any]) -> None:
    servegym.register_envs()
    env = gym.make("servegym/EngineDispatch-v0", config=config)
    check_env(env.unwrapped, skip_render_check=True)
    check_env_sb3(env.unwrapped)


def test_masks_are_there_before_the_first_reset_and_are_kept(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv({**config, "max_engines": 5})
    assert env.action_masks().any()
    _, info = env.reset(seed=1)
    assert info["action_mask"].tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="engine 4 may not be chosen"):
        env.step(4)


def test_a_dead_engine_is_masked(config: dict[str, Any]) -> None:
    cluster = config["cluster"] | {"faults": [{"at_s": 0.0, "engine": 1, "kind": "die"}]}
    env = EngineDispatchEnv({**config, "cluster": cluster})
    observation, _ = env.reset(seed=1)
    assert observation["mask"].tolist() == [1, 0, 1]
    assert (observation["engines"][1] == 0).all()


@pytest.mark.parametrize(
    ("weights", "metric"),
    [
        ({"ttft": 1.0}, "ttft_s"),
        ({"ttft": 0.0, "e2e": 1.0}, "e2e_s"),
        ({"ttft": 0.0, "tpot": 1.0}, "tpot_s"),
    ],
)
def test_the_return_is_the_metric(config: dict[str, Any], weights: dict[str, float], metric: str) -> None:
    env = EngineDispatchEnv({**config, "reward": weights | {"scale_s": 2.0}})
    total, info, _ = _play(env, seed=3)
    count = 60 if metric != "tpot_s" else int((env._run.memory.requests["output"] > 1).sum())
    assert total == pytest.approx(-info["metrics"][metric] * count / 2.0, rel=1e-9)


def test_against_the_reference_itself_the_return_is_zero(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv({**config, "reference": "lmetric", "reward": {"ttft": 1.0, "e2e": 0.3, "tpot": 2.0}})
    total, info, trajectory = _play(env, seed=4, policy="lmetric")
    assert total == pytest.approx(0.0, abs=1e-9)
    assert max(abs(step[1]) for step in trajectory[1:]) < 1e-9
    assert info["metrics"] == info["reference_metrics"]
    worse, info, _ = _play(env, seed=4, policy="random")
    assert worse < 0
    gap = info["reference_metrics"]["ttft_s"] - info["metrics"]["ttft_s"]
    assert np.sign(gap) == -1


def test_parts_add_up_and_time_moves_on(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv({**config, "reward": {"ttft": 1.0, "e2e": 0.5}})
    env.reset(seed=5)
    elapsed, done = float(env._run.table.arrival_s[0]), False
    while not done:
        _, reward, done, _, info = env.step(int(np.flatnonzero(env.action_masks())[0]))
        assert reward == pytest.approx(sum(info["reward_parts"].values()))
        assert info["elapsed_s"] >= 0
        elapsed += info["elapsed_s"]
    assert elapsed == pytest.approx(env._run.memory.requests["finish_s"].max(), rel=1e-9)


def test_same_seed_same_trajectory(config: dict[str, Any]) -> None:
    first, second = (_play(EngineDispatchEnv(config), seed=6)[2] for _ in range(2))
    for (a, reward_a), (b, reward_b) in zip(first[1:], second[1:], strict=True):
        assert reward_a == reward_b
        assert all(np.array_equal(a[key], b[key]) for key in a)
    other = _play(EngineDispatchEnv(config), seed=7)[2]
    assert other[1][1] != first[1][1]


def test_randomisation_changes_the_cluster_and_never_the_spaces(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv(
        {
            **config,
            "episode_requests": 10,
            "load": [0.3, 1.0],
            "random_end": True,
            "randomise": {
                "engines": [2, 4],
                "slowdown": [0.8, 1.5],
                "step_time": [0.7, 1.3],
                "telemetry_lag_s": [0.0, 0.2],
            },
        }
    )
    sizes, slow = set(), set()
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        assert observation in env.observation_space
        sizes.add(info["engines"])
        slow.add(float(env._run.memory.engines["slowdown"][0]))
    assert sizes == {2, 4}
    assert len(slow) > 10
    assert env.max_engines == 4


def test_load_can_be_fixed_per_episode(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv(config)
    spans = []
    for load in (0.2, 0.8):
        env.reset(seed=1, options={"load": load})
        spans.append(float(env._run.table.arrival_s.max()))
    assert spans[0] == pytest.approx(4 * spans[1])


def test_ansi_rendering_shows_each_engine(config: dict[str, Any]) -> None:
    env = EngineDispatchEnv(config, render_mode="ansi")
    env.reset(seed=1)
    text = env.render()
    assert text is not None
    assert text.count("engine") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loadd": 1}, "loadd: unknown key; did you mean"),
        ({"reward": {"ttft": -1}}, "reward.ttft: got -1"),
        ({"max_engines": 2}, "max_engines of at least 3"),
        ({"reference": "lmetrc"}, "did you mean lmetric"),
    ],
)
def test_bad_arguments_are_one_line(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        EngineDispatchEnv(config | change)
    assert message in str(caught.value)
