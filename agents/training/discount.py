"""Rollout buffers that discount by the time that passed between two decisions instead of by their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer


class _TimedAdvantages:
    """Generalised advantage estimation in a semi-Markov decision process.

    A step that takes ``dt`` seconds discounts what follows by ``exp(-rate dt)``::

        delta_t = r_t + exp(-rate dt_t) V(s_t+1) - V(s_t)
        A_t     = delta_t + exp(-rate dt_t) lambda A_t+1

    Args:
        elapsed_s: seconds that the last step took, shape (environments,); the environments update it in place.
        discount_rate_per_s: the rate.
        group: so many neighbouring environments play the same episodes. An advantage then counts from the mean of its
            group at the same request, a baseline that depends on the input (Mao et al., "Variance Reduction for
            Reinforcement Learning in Input-Driven Environments", ICLR 2019): what the arrivals alone cause cancels.
    """

    buffer_size: int
    n_envs: int
    pos: int
    gae_lambda: float
    rewards: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    episode_starts: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    returns: npt.NDArray[np.float32]

    def __init__(
        self, *args: Any, elapsed_s: npt.NDArray[np.float64], discount_rate_per_s: float, group: int = 1, **kwargs: Any
    ) -> None:
        self._last_elapsed_s = elapsed_s
        self._rate = discount_rate_per_s
        self._group = group
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        self.discounts = np.ones((self.buffer_size, self.n_envs), dtype=np.float32)
        super().reset()  # type: ignore[misc]

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.discounts[self.pos] = np.exp(-self._rate * self._last_elapsed_s)
        super().add(*args, **kwargs)  # type: ignore[misc]

    def to_torch(self, array: npt.NDArray[Any], copy: bool = True) -> torch.Tensor:
        return torch.from_numpy(array)  # batches are copies already, made by indexing

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: npt.NDArray[np.bool_]) -> None:
        next_values = last_values.cpu().numpy().flatten()
        alive = 1.0 - dones.astype(np.float32)
        advantage = np.zeros(self.n_envs, dtype=np.float32)
        for step in reversed(range(self.buffer_size)):
            discount = self.discounts[step] * alive
            delta = self.rewards[step] + discount * next_values - self.values[step]
            advantage = delta + discount * self.gae_lambda * advantage
            self.advantages[step] = advantage
            next_values, alive = self.values[step], 1.0 - self.episode_starts[step]
        self.returns = self.advantages + self.values
        if self._group > 1:
            groups = self.advantages.reshape(self.buffer_size, -1, self._group)
            self.advantages = (groups - groups.mean(-1, keepdims=True)).reshape(self.advantages.shape)


class TimedRolloutBuffer(_TimedAdvantages, DictRolloutBuffer):
    """For PPO."""


class MaskableTimedRolloutBuffer(_TimedAdvantages, MaskableDictRolloutBuffer):
    """For MaskablePPO."""
