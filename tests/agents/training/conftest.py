"""A small dispatch problem that steps in microseconds, with the spaces and the info of EngineDispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from servegym.agents.training.config import TrainConfig
from servegym.baselines import interface as i
from servegym.baselines.features import ENGINE_FEATURES, REQUEST_FEATURES, fill_dispatch_features
from servegym.baselines.heuristic import TURN, turns
from servegym.configuration import validate

REQUESTS = 60


class UnequalServers(gym.Env):
    """First-come-first-served servers of different speed; some are down now and then.

    TTFT is the time until a server has worked off what it has and the new request. The best rule knows the speeds,
    which LMetric, the reference, does not, so that there is something to learn.
    """

    def __init__(self, slots: int = 4, engines: int = 3) -> None:
        self.engines, self.slots = engines, slots
        self.action_space = spaces.Discrete(slots)
        self.observation_space = spaces.Dict(
            {
                "engines": spaces.Box(-np.inf, np.inf, (slots, len(ENGINE_FEATURES)), np.float32),
                "request": spaces.Box(-np.inf, np.inf, (len(REQUEST_FEATURES),), np.float32),
                "mask": spaces.Box(0, 1, (slots,), np.int8),
            }
        )
        self._mask = np.ones(slots, dtype=bool)

    def action_masks(self) -> np.ndarray:
        return self._mask

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        rng = self.np_random
        self.speed = rng.permutation(np.geomspace(1000.0, 8000.0, self.engines))
        self.gaps = rng.exponential(1000 / (0.8 * self.speed.sum()), REQUESTS)
        self.prompts = np.ceil(rng.exponential(1000, REQUESTS))
        self.up = rng.random((REQUESTS, self.engines)) < 0.95
        self.up[:, 0] |= ~self.up.any(axis=1)
        self.reference = self._play_lmetric()
        self._clear()
        return self._observe(), {}

    def step(self, action):
        if not self._mask[action]:
            raise ValueError(f"server {action} is down")
        ttft = self._serve(int(action))
        self.ttfts.append(ttft)
        elapsed = float(self.gaps[self.now])
        self.now += 1
        over = self.now == REQUESTS
        info = {"elapsed_s": elapsed}
        if over:
            self.now -= 1  # there is always a next observation
            mean = float(np.mean(self.ttfts))
            info |= {"metrics": {"ttft_s": mean}, "reference_metrics": {"ttft_s": self.reference}}
        else:
            self._pass(elapsed)
        return self._observe(), -ttft, over, False, info

    def _clear(self) -> None:
        self.now, self.ttfts = 0, []
        self.queues: list[list[float]] = [[] for _ in range(self.engines)]  # prompt tokens left, oldest first

    def _serve(self, engine: int) -> float:
        self.queues[engine].append(self.prompts[self.now])
        return sum(self.queues[engine]) / self.speed[engine]

    def _pass(self, seconds: float) -> None:
        for queue, speed in zip(self.queues, self.speed, strict=True):
            work = seconds * speed
            while queue and work > 0:
                done = min(work, queue[0])
                work -= done
                queue[0] -= done
                if queue[0] <= 0:
                    queue.pop(0)

    def _play_lmetric(self) -> float:
        self._clear()
        ttfts, engine = [], -1
        for self.now in range(REQUESTS):
            cost = [(sum(queue) + self.prompts[self.now]) * (len(queue) + 1) for queue in self.queues]
            engine = i.pick(cost + TURN * turns(self.engines, engine + 1), self.up[self.now])
            ttfts.append(self._serve(engine))
            self._pass(self.gaps[self.now])
        return float(np.mean(ttfts))

    def _observe(self) -> dict[str, np.ndarray]:
        view = np.zeros((self.engines, i.ENGINE_COLUMNS))
        view[:, i.E_AVAILABLE] = self.up[self.now]
        view[:, i.E_INFLIGHT] = view[:, i.E_PREFILL_REQUESTS] = [len(queue) for queue in self.queues]
        view[:, i.E_PREFILL_TOKENS] = [sum(queue) for queue in self.queues]
        view[:, i.E_PREFILL_TOKENS_PER_S] = self.speed
        view[:, i.E_MAX_NUM_SEQS], view[:, i.E_KV_TOKENS], view[:, i.E_DECODE_STEP_S] = 64, 1e5, 0.01
        row = np.zeros(i.REQUEST_COLUMNS)
        row[i.R_PROMPT_TOKENS], row[i.R_DEADLINE_S] = self.prompts[self.now], np.inf
        engines = np.empty((self.slots, len(ENGINE_FEATURES)), dtype=np.float32)
        request = np.empty(len(REQUEST_FEATURES), dtype=np.float32)
        fill_dispatch_features(row, view, engines, request)
        self._mask = np.zeros(self.slots, dtype=bool)
        self._mask[: self.engines] = self.up[self.now]
        return {"engines": engines, "request": request, "mask": self._mask.astype(np.int8)}


def toy_config(**changes: Any) -> TrainConfig:
    content: dict[str, Any] = {
        "name": "toy",
        "total_steps": 2048,
        "checkpoint_every_steps": 512,
        "algorithm": {"n_envs": 8, "n_steps": 32, "batch_size": 128, "n_epochs": 2, "target_kl": None},
        "network": {"width": 16},
        "evaluation": {"every_steps": 1024, "episodes": 3, "objective": {"ttft_s": 1.0}},
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    return validate(TrainConfig, content, "toy.yaml")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainConfig]:
    return toy_config


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., gym.Env]:
    """Makes the toy from a config, which it ignores, as ``train`` makes an environment."""
    return lambda config=None, **sizes: UnequalServers(**sizes)
