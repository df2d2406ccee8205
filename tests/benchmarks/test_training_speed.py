"""Steps per second of MaskablePPO on ``EngineDispatch-v0`` with four engines, and where the time goes.

Environments that are stepped together in the kernel, beside the same ones stepped one by one; one thread.
Run with ``pytest tests/benchmarks/test_training_speed.py -s``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from servegym.agents.training.algorithms import make_model
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.configuration import load_config
from servegym.envs.dispatch_lanes import DispatchLanes

STEPS = 120_000
LEAST_STEPS_PER_S = 20_000


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    return call


def _split(config: TrainConfig) -> dict[str, float]:
    """Seconds a step: all, the environments, the update, and the rest, most of it the network's decisions.

    Of the whole also the CPU time, which says what the others are worth on a machine with other work.
    """
    envs = EpisodeVecEnv(partial(config.task.make, config.env), config.algorithm.n_envs, config.seed)
    model = make_model(config, envs)
    model.learn(config.rollout_steps)
    env_s, update_s = [0.0], [0.0]
    envs.step_wait = _timed(envs.step_wait, env_s)  # type: ignore[method-assign]
    model.train = _timed(model.train, update_s)
    start, cpu_start, before = time.perf_counter(), time.process_time(), model.num_timesteps
    model.learn(STEPS, reset_num_timesteps=False)
    steps, total = model.num_timesteps - before, time.perf_counter() - start
    cpu_s = time.process_time() - cpu_start
    rest = total - env_s[0] - update_s[0]
    parts = {"all": total, "CPU": cpu_s, "environments": env_s[0], "update": update_s[0], "rest": rest}
    return {name: spent / steps for name, spent in parts.items()}


def test_training_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    config = load_config(TrainConfig, "dispatch_ppo", "train")
    best: dict[str, dict[str, float]] = {}
    for _ in range(3):  # interleaved against drift of the machine
        for name in ("together", "one by one"):
            with monkeypatch.context() as patch:
                if name == "one by one":
                    patch.setattr(DispatchLanes, "suit", staticmethod(lambda envs: False))
                found = _split(config)
            if name not in best or found["all"] < best[name]["all"]:
                best[name] = found
    for name, parts in best.items():
        split = ", ".join(f"{part} {1e6 * spent:.1f}" for part, spent in parts.items())
        print(f"{name}: {1 / parts['all']:,.0f} steps/s; us a step: {split}")
    assert 1 / best["together"]["all"] >= LEAST_STEPS_PER_S
