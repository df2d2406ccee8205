"""RequestOrdering-v0: one admission at a time, with vLLM's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3
from support import TOY, random_table, session_table

from servegym.baselines.registry import create
from servegym.envs.request_ordering import RequestOrderingEnv
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profiles") / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY))
    return str(path)


@pytest.fixture
def config(profile: str) -> dict[str, Any]:
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    return {
        "cluster": {"engines": 1, "profile": profile, "engine": engine},
        "workload": {"name": "azure-conv", "load": 1.1},
        "episode_requests": 150,
        "window": 8,
    }


def play(env: RequestOrderingEnv, choose: Any, seed: int = 0) -> tuple[float, int, dict[str, Any]]:
    observation, info = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    while not over:
        assert env.observation_space.contains(observation)
        assert info["action_mask"].tolist() == observation["mask"].tolist()
        observation, reward, over, _, info = env.step(choose(observation))
        total += float(reward)
        steps += 1
    return total, steps, info


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkers(config: dict[str, Any]) -> None:
    # The checkers ignore masks: a window of 2, and load enough that both places are mostly taken, would still fail, so
    # the first place is always meant.
    class Lenient(RequestOrderingEnv):
        def step(self, action: Any) -> Any:
            return super().step(action if self._mask[int(action)] else 0)

    env = gymnasium.make("servegym/RequestOrdering-v0", config=config)
    assert isinstance(env.unwrapped, RequestOrderingEnv)
    check_env(Lenient(config), skip_render_check=True)
    check_sb3(Lenient(config))


@pytest.mark.parametrize("mode", ["independent", "lockstep"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("blocks", [2000, 130])
def test_always_the_first_is_fcfs_bit_for_bit(profile: str, mode: str, caching: bool, blocks: int) -> None:
    engine = {"max_num_seqs": 2, "enable_prefix_caching": caching, "num_blocks": blocks, "max_model_len": 2000}
    cluster = ClusterConfig.model_validate({"engines": 2, "profile": profile, "mode": mode, "engine": engine})
    for table in (random_table(1, count=200, rate_rps=120.0), session_table(2)):
        fits = table.prompt_tokens + table.output_tokens < min(2000, (blocks - 1) * 16)
        if not fits.all():
            continue
        expected = SimulatedCluster(cluster, table, create("request", "fcfs"), create("engine", "round_robin"))
        expected.run()
        picked = SimulatedCluster(cluster, table, None, create("engine", "round_robin"))
        decisions = 0
        while (engine_index := picked.next_admission()) is not None:
            queue, members = picked.waiting_requests(engine_index)
            assert len(queue) > 1
            picked.admit(engine_index, int(members[0]))
            decisions += 1
        assert decisions >= 5
        for field in ("first_s", "finish_s", "engine", "preemptions"):
            np.testing.assert_array_equal(expected.memory.requests[field], picked.memory.requests[field])


def test_shortest_first_beats_first_come(config: dict[str, Any]) -> None:
    def shortest(observation: dict[str, Any]) -> int:
        tokens = np.where(observation["mask"] > 0, observation["requests"][:, 0], np.inf)
        return int(tokens.argmin())

    first, steps, _ = play(RequestOrderingEnv(config), lambda _: 0)
    short, _, _ = play(RequestOrderingEnv(config), shortest)
    assert steps > 50
    assert short > 0.9 * first  # rewards are negative


def test_return_is_the_summed_ttft_and_e2e(config: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for part in ("ttft", "e2e"):
        weights = {"ttft": 0.0, "e2e": 0.0, "tpot": 0.0} | {part: 1.0}
        env = RequestOrderingEnv(config | {"reward": weights})
        total, _, info = play(env, lambda observation: int(rng.choice(np.flatnonzero(observation["mask"]))))
        assert -total / 150 == pytest.approx(info["metrics"][f"{part}_s"], rel=1e-9)


def test_time_never_goes_back(config: dict[str, Any]) -> None:
    cluster = config["cluster"] | {"engines": 3}
    workload = {"name": "azure-conv", "load": 2.0}
    env = RequestOrderingEnv(config | {"cluster": cluster, "workload": workload, "episode_requests": 300})
    env.reset(seed=1)
    over, engines = False, set()
    while not over:
        _, _, over, _, info = env.step(0)
        assert info["elapsed_s"] >= 0.0
        engines.add(info.get("engine"))
    assert {0, 1, 2} <= engines


def test_a_place_where_nobody_waits(config: dict[str, Any]) -> None:
    env = RequestOrderingEnv(config)
    observation, _ = env.reset(seed=0)
    empty = int((observation["mask"] == 0).argmax())
    with pytest.raises(ValueError, match=f"no request waits at {empty}; allowed: .0, 1"):
        env.step(empty)
    assert "waiting" in (RequestOrderingEnv(config, render_mode="ansi").render() or "waiting")


def test_same_seed_same_episode(config: dict[str, Any], tmp_path: Path) -> None:
    first, second = (play(RequestOrderingEnv(config), lambda _: 1, seed=4) for _ in range(2))
    assert first[:2] == second[:2]


WEIGHTS = {"ttft": 1.0, "e2e": 0.5, "tpot": 2.0, "tail": 0.1}


def test_who_does_what_the_reference_does_gains_nothing_at_any_time(config: dict[str, Any]) -> None:
    env = RequestOrderingEnv(config | {"reference": "fcfs", "reward": WEIGHTS})
    env.reset(seed=3)
    rewards, over = [], False
    while not over:
        _, reward, over, _, info = env.step(0)
        rewards.append(float(reward))
    assert len(rewards) > 100
    np.testing.assert_allclose(rewards, 0.0, atol=1e-9)
    assert info["metrics"] == info["reference_metrics"]


def test_the_return_is_the_gain_over_the_reference(config: dict[str, Any]) -> None:
    def shortest(observation: dict[str, Any]) -> int:
        return int(np.where(observation["mask"] > 0, observation["requests"][:, 0], np.inf).argmin())

    env = RequestOrderingEnv(config | {"reference": "fcfs", "reward": {"ttft": 1.0, "e2e": 0.5}})
    total, _, info = play(env, shortest, seed=4)
    mine, other = info["metrics"], info["reference_metrics"]
    gain = sum(150 * weight * (other[name] - mine[name]) for name, weight in (("ttft_s", 1.0), ("e2e_s", 0.5)))
    assert mine["ttft_s"] < other["ttft_s"]
    assert total == pytest.approx(gain, rel=1e-9)
