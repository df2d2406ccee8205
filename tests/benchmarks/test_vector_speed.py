"""Steps per second of environments that are stepped together in the kernel, beside other ways, without a learner.

Run with ``pytest tests/benchmarks/test_vector_speed.py -s``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.envs.engine_dispatch import EngineDispatchEnv

CONFIG: dict[str, Any] = {
    "cluster": {"engines": 4, "profile": "qwen3-30b-a3b-h200"},
    "workload": {"name": "azure-conv", "load": 0.8},
    "episode_requests": 2000,
    "reference": "lmetric",
}
MOST_S = 10e-6

make = partial(EngineDispatchEnv, CONFIG)


def episodes(count: int) -> VecEnv:
    return EpisodeVecEnv(make, count, seed=0)


def one_by_one(count: int) -> VecEnv:
    envs = EpisodeVecEnv(make, count, seed=0)
    envs._lanes = None
    return envs


def dummy(count: int) -> VecEnv:
    return DummyVecEnv([make] * count)


def subproc(count: int) -> VecEnv:
    return SubprocVecEnv([make] * count, start_method="fork")


def _steps_per_s(envs: VecEnv, steps: int) -> float:
    rng = np.random.default_rng(0)
    envs.reset()
    actions = rng.integers(0, 4, (steps, envs.num_envs))
    for action in actions[:20]:
        envs.step(action)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    return steps * envs.num_envs / (time.perf_counter() - start)


@pytest.mark.parametrize("count", [8, 32])
def test_steps_per_second(count: int) -> None:
    make().reset(seed=0)  # compiled before the processes fork
    kinds: dict[str, Callable[[int], VecEnv]] = {
        "together": episodes,
        "one by one": one_by_one,
        "dummy": dummy,
        "subproc": subproc,
    }
    envs = {name: kind(count) for name, kind in kinds.items()}
    speed = dict.fromkeys(kinds, 0.0)
    try:
        for _ in range(3):  # interleaved against drift of the machine
            for name, instance in envs.items():
                speed[name] = max(speed[name], _steps_per_s(instance, 100_000 // count))
    finally:
        for instance in envs.values():
            instance.close()
    print(f"{count} environments: " + ", ".join(f"{name} {value:,.0f} steps/s" for name, value in speed.items()))
    assert speed["together"] >= 1.5 * max(value for name, value in speed.items() if name != "together")
    assert 1 / speed["together"] <= MOST_S
