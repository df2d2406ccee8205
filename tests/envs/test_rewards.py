"""Rewards of every environment: the return is the metric, whatever the policy does."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import servegym
from servegym.envs.rewards import PARTS
from servegym.errors import InputError

ENVIRONMENTS = ("EngineDispatch", "RequestOrdering", "RequestTuning", "ExpertPlacement", "MultiLayer")
WEIGHTS = {"ttft": 1.0, "e2e": 0.5, "tpot": 2.0, "slowdown": 0.1, "tardiness": 3.0, "violations": 0.7, "tail": 0.2}


@pytest.fixture
def workload(tmp_path: Any) -> str:
    path = tmp_path / "due.yaml"
    path.write_text(
        "name: due\ndescription: with deadlines\nsource: invented\narrivals: {process: poisson}\n"
        "prompt_tokens: {kind: lognormal, mu: [6.5], sigma: [0.8]}\n"
        "output_tokens: {kind: lognormal, mu: [3.8], sigma: [0.7]}\n"
        "deadline: {base_s: 0.01, per_1k_prompt_tokens_s: 0.05}\n"
    )
    return str(path)


def play(name: str, config: dict[str, Any], seed: int = 3) -> tuple[float, dict[str, float], gym.Env[Any, Any]]:
    """Play at random; returns the return, its parts, and the environment."""
    servegym.register_envs()
    env = gym.make(f"servegym/{name}-v0", config=config, disable_env_checker=True).unwrapped
    env.reset(seed=seed)
    env.action_space.seed(seed)
    total, parts, done = 0.0, dict.fromkeys(PARTS, 0.0), False
    while not done:
        masks = env.action_masks() if hasattr(env, "action_masks") else None
        if isinstance(env.action_space, gym.spaces.Discrete):
            action = env.action_space.sample(masks.astype(np.int8))
        else:
            action = env.action_space.sample()
        _, reward, done, _, info = env.step(action)
        total += float(reward)
        for part, value in info["reward_parts"].items():
            parts[part] += value
    return total, parts, env


def expected(requests: Any, prefill_rate: float, decode_step_s: float, tail_s: float) -> dict[str, float]:
    """The weighted sums of the finished requests, negated."""
    ttft = requests["first_s"] - requests["arrival_s"]
    several = requests["output"] > 1
    tpot = ((requests["finish_s"] - requests["first_s"])[several] / (requests["output"][several] - 1)).sum()
    late = np.maximum(ttft - requests["deadline_s"], 0)
    sums = {
        "ttft": ttft.sum(),
        "e2e": (requests["finish_s"] - requests["arrival_s"]).sum(),
        "tpot": tpot,
        "slowdown": (ttft / (requests["prompt"] / prefill_rate + decode_step_s)).sum(),
        "tardiness": late.sum(),
        "violations": (late > 0).sum(),
        "tail": np.maximum(ttft - tail_s, 0).sum() / (1 - 0.9),
    }
    return {part: -WEIGHTS[part] * float(value) for part, value in sums.items()}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_return_is_the_sum_over_requests_of_every_part(name: str, workload: str) -> None:
    config = {
        "workload": {"name": workload, "load": 1.0},
        "episode_requests": 1500 if name == "ExpertPlacement" else 300,
        "reward": WEIGHTS | {"tail_s": 0.15, "tail_quantile": 0.9},
    }
    total, parts, env = play(name, config)
    engines = env._run.memory.engines
    wanted = expected(
        env._run.memory.requests, engines["prefill_tokens_per_s"].max(), engines["decode_step_s"].min(), 0.15
    )
    assert parts == pytest.approx(wanted, rel=1e-9)
    assert total == pytest.approx(sum(wanted.values()), rel=1e-9)
    assert all(value < 0 for value in wanted.values())


def test_every_part_against_a_reference(workload: str) -> None:
    config = {
        "cluster": {"engines": 3, "engine": {"max_num_batched_tokens": 512}},
        "workload": {"name": workload, "load": 1.0},
        "reference": "least_requests",
        "reward": WEIGHTS | {"tail_quantile": 0.9},
    }
    _, parts, env = play("EngineDispatch", config)
    mine = env._run.memory.requests
    other = env._meter._reference
    engines = env._run.memory.engines
    tail_s = np.quantile(other["first_s"] - other["arrival_s"], 0.9)
    rates = engines["prefill_tokens_per_s"].max(), engines["decode_step_s"].min(), tail_s
    own, reference = expected(mine, *rates), expected(other, *rates)
    assert parts == pytest.approx({part: own[part] - reference[part] for part in PARTS}, rel=1e-9, abs=1e-9)
    # The reference's own tail: 10 % of the requests, weighted by 10.
    assert reference["tail"] < 0


def test_a_missed_deadline_counts_when_it_is_missed(workload: str) -> None:
    config = {
        "cluster": {"engines": 1, "engine": {"max_num_batched_tokens": 512}},
        "workload": {"name": workload, "load": 2.0},
        "episode_requests": 100,
        "reward": {"ttft": 0.0, "violations": 1.0},
    }
    servegym.register_envs()
    env: Any = gym.make("servegym/EngineDispatch-v0", config=config, disable_env_checker=True).unwrapped
    env.reset(seed=1)
    done = False
    counted = 0.0
    while not done:
        _, reward, done, _, _ = env.step(0)
        counted -= float(reward)
        requests, now = env._run.memory.requests, env._meter.now_s
        until = np.where(np.isnan(requests["first_s"]), now, requests["first_s"])
        arrived = requests["arrival_s"] <= now
        assert counted == (until - requests["arrival_s"] > requests["deadline_s"])[arrived].sum()
    assert counted > 20


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("EngineDispatch", {"reward": {"tail": 1.0}}, "reward.tail_s, or a reference policy whose quantile it is"),
        ("RequestOrdering", {"reward": {"tail": 1.0}}, "reward.tail_s, or a reference"),
        ("EngineDispatch", {"reward": {"ttft": 0.0}}, "a weight above 0 for one of ttft, e2e"),
        ("EngineDispatch", {"reward": {"tail_quantile": 1.0}}, "reward.tail_quantile: got 1.0"),
    ],
)
def test_bad_rewards_are_one_line(name: str, change: dict[str, Any], message: str) -> None:
    servegym.register_envs()
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        gym.make(f"servegym/{name}-v0", config=change, disable_env_checker=True)
    assert message in str(caught.value)
