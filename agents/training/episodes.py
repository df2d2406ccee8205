"""The environments of a training run, in one process, so that it can stop and go on in the middle of its episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import DummyVecEnv

from servegym.errors import InputError

Observation = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class FinishedEpisode:
    """What one finished episode came to."""

    reward: float
    length: int
    metrics: Mapping[str, Any]
    reference_metrics: Mapping[str, Any]


@dataclass(slots=True)
class _Running:
    """An episode in progress: which one it is, and all actions so far."""

    index: int
    actions: list[int] = field(default_factory=list)
    reward: float = 0.0


class EpisodeVecEnv(DummyVecEnv):
    """Steps several environments and remembers how each came to where it is.

    Episode ``k`` of environment ``i`` is seeded by ``(seed, i, k)``, so that an episode is determined by its index and
    its actions. That is all that a checkpoint needs: :meth:`restore` plays the actions again (tens of microseconds
    each), and training goes on exactly as if it had never stopped.

    Args:
        make: returns a new environment; its ``info`` carries ``elapsed_s`` at every step, and ``metrics`` (maybe also
            ``reference_metrics``) at the end of an episode.
        count: environments.
        seed: seed of the run.

    Attributes:
        elapsed_s: simulated seconds that the last step took, shape (count,); updated in place.
        finished: episodes that ended since :meth:`take_finished` was called last.
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], count: int, seed: int) -> None:
        super().__init__([make] * count)
        self.elapsed_s = np.zeros(count)
        self.finished: list[FinishedEpisode] = []
        self._run_seed = seed
        self._running = [_Running(0) for _ in range(count)]

    def reset(self) -> Observation:
        """Start the first episode of every environment."""
        for i in range(self.num_envs):
            self._save_obs(i, self._start(i, 0))
        return self._observation()

    def step_wait(self) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Take one step everywhere; an environment whose episode ends starts its next one."""
        outcomes: list[dict[str, Any]] = []
        for i, action in enumerate(self.actions.tolist()):
            observation, reward, terminated, truncated, info = self._step(i, action)
            outcome: dict[str, Any] = {}
            self.buf_rews[i] = reward
            self.buf_dones[i] = terminated or truncated
            if terminated or truncated:
                # Copied, as an environment may reuse its arrays at the next reset.
                outcome["terminal_observation"] = {key: value.copy() for key, value in observation.items()}
                outcome["TimeLimit.truncated"] = truncated and not terminated
                self._finish(self._running[i], info)
                observation = self._start(i, self._running[i].index + 1)
            self._save_obs(i, observation)
            outcomes.append(outcome)
        return self._observation(), self.buf_rews.copy(), self.buf_dones.copy(), outcomes

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the environments; the masks come from the observations, which hold them already."""
        if method_name == "action_masks" and indices is None:
            return list(self.buf_obs["mask"] > 0)
        return super().env_method(method_name, *args, indices=indices, **kwargs)

    def take_finished(self) -> list[FinishedEpisode]:
        """Return the episodes that ended since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def positions(self) -> list[tuple[int, list[int]]]:
        """Return, per environment, the index of its episode and the actions taken in it."""
        return [(episode.index, list(episode.actions)) for episode in self._running]

    def restore(self, positions: Sequence[tuple[int, Sequence[int]]]) -> Observation:
        """Play the environments to positions that :meth:`positions` returned.

        Raises:
            InputError: an episode takes another course; the environment is not the one that the positions are from.
        """
        for i, (index, actions) in enumerate(positions):
            observation = self._start(i, index)
            for action in actions:
                try:
                    observation, _, terminated, truncated, _ = self._step(i, action)
                    over = terminated or truncated
                except ValueError:  # the action is not allowed
                    over = True
                if over:
                    place = f"episode {index} of environment {i}"
                    raise InputError(
                        "checkpoint", place, "does not replay; was it made by another version of servegym?"
                    )
            self._save_obs(i, observation)
        return self._observation()

    def _start(self, i: int, index: int) -> Observation:
        self._running[i] = _Running(index)
        source = np.random.SeedSequence(self._run_seed, spawn_key=(i, index))
        observation: Observation
        observation, self.reset_infos[i] = self.envs[i].reset(seed=int(source.generate_state(1)[0]))
        return observation

    def _step(self, i: int, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.envs[i].step(action)
        episode = self._running[i]
        episode.actions.append(action)
        episode.reward += float(reward)
        self.elapsed_s[i] = info["elapsed_s"]
        return observation, float(reward), terminated, truncated, info

    def _finish(self, episode: _Running, info: Mapping[str, Any]) -> None:
        metrics, reference = info.get("metrics", {}), info.get("reference_metrics", {})
        self.finished.append(FinishedEpisode(episode.reward, len(episode.actions), metrics, reference))

    def _observation(self) -> Observation:
        return {key: values.copy() for key, values in self.buf_obs.items()}
