"""The environments of a training run, in one process, so that it can stop and go on in the middle of its episodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import DummyVecEnv

from servegym.envs.dispatch_lanes import DispatchLanes
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

    Episode ``k`` of environment ``i`` is seeded by ``(seed, i // group, k)``, so that an episode is determined by its
    index and its actions. That is all that a checkpoint needs: :meth:`restore` plays the actions again (tens of
    microseconds each), and training goes on exactly as if it had never stopped.

    Args:
        make: returns a new environment; its ``info`` carries ``elapsed_s`` at every step, and ``metrics`` (maybe also
            ``reference_metrics``) at the end of an episode.
        count: environments.
        seed: seed of the run.
        group: so many neighbouring environments play the same episodes.

    Attributes:
        elapsed_s: simulated seconds that the last step took, shape (count,); updated in place.
        finished: episodes that ended since :meth:`take_finished` was called last.
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]], count: int, seed: int, group: int = 1) -> None:
        super().__init__([make] * count)
        self.elapsed_s = np.zeros(count)
        self.finished: list[FinishedEpisode] = []
        self._run_seed, self._group = seed, group
        self._running = [_Running(0) for _ in range(count)]

        # Environments of dispatch over the simulator are stepped together; the others one by one.
        self._lanes = DispatchLanes(self.envs) if DispatchLanes.suit(self.envs) else None
        if self._lanes is not None:
            self.buf_obs = OrderedDict(self._lanes.observation)

    def reset(self) -> Observation:
        """Start the first episode of every environment."""
        for i in range(self.num_envs):
            self._save_obs(i, self._start(i, 0))
        return self._observation()

    def step_wait(self) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Take one step everywhere; an environment whose episode ends starts its next one."""
        if self._lanes is not None:
            return self._step_lanes(self._lanes)
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

    def _step_lanes(
        self, lanes: DispatchLanes
    ) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        outcomes: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        finished = lanes.step(self.actions)
        self.elapsed_s[:], self.buf_rews[:], self.buf_dones[:] = lanes.elapsed_s, lanes.rewards, False
        for i, (action, reward) in enumerate(zip(self.actions.tolist(), lanes.rewards.tolist(), strict=True)):
            episode = self._running[i]
            episode.actions.append(action)
            episode.reward += reward
        for i, observation, info in finished:
            self.buf_dones[i] = True
            outcomes[i] = {"terminal_observation": observation, "TimeLimit.truncated": False}
            self._finish(self._running[i], info)
            self._start(i, self._running[i].index + 1)
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
            if self._lanes is not None:
                self._lanes.moved(i, observation)
            else:
                self._save_obs(i, observation)
        return self._observation()

    def _start(self, i: int, index: int) -> Observation:
        self._running[i] = _Running(index)
        source = np.random.SeedSequence(self._run_seed, spawn_key=(i // self._group, index))
        seed = int(source.generate_state(1)[0])
        observation: Observation
        if self._lanes is not None:
            self.reset_infos[i] = self._lanes.start(i, seed=seed)
            return {key: values[i] for key, values in self._lanes.observation.items()}
        observation, self.reset_infos[i] = self.envs[i].reset(seed=seed)
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
