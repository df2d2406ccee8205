"""The environments of a training run, in one process, so that it can stop and go on in the middle of its episodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


class _Courses:
    """Which episode each environment plays, and how it has gone so far.

    All environments take their steps together, so that a step is one row of actions; an episode is a part of a column.

    Args:
        count: environments.

    Attributes:
        index: of the episode, shape (count,).
        reward: of the episode so far, shape (count,).
    """

    def __init__(self, count: int) -> None:
        self.index = np.zeros(count, dtype=np.int64)
        self.reward = np.zeros(count)
        self._begin = np.zeros(count, dtype=np.int64)
        self._actions = np.empty((256, count), dtype=np.int64)
        self._now = 0

    def start(self, i: int, index: int) -> None:
        """Begin an episode of environment ``i``."""
        self.index[i], self._begin[i], self.reward[i] = index, self._now, 0.0

    def add(self, actions: npt.NDArray[np.int64], rewards: npt.NDArray[Any]) -> None:
        """Take down a step of all environments, arrays of shape (count,)."""
        if self._now == len(self._actions):
            self._make_room()
        self._actions[self._now] = actions
        self._now += 1
        self.reward += rewards

    def length(self, i: int) -> int:
        """Return the steps of an episode so far."""
        return self._now - int(self._begin[i])

    def actions(self, i: int) -> list[int]:
        """Return the actions of an episode so far."""
        taken: list[int] = self._actions[self._begin[i] : self._now, i].tolist()
        return taken

    def restore(self, i: int, index: int, actions: Sequence[int], reward: float) -> None:
        """Continue an episode after such actions."""
        missing = len(actions) - self._now
        if missing > 0:  # episodes of equal ends: what comes before the others is never looked at
            self._actions = np.vstack([np.zeros((missing, len(self.index)), dtype=np.int64), self._actions])
            self._begin += missing
            self._now += missing
        self.index[i], self._begin[i], self.reward[i] = index, self._now - len(actions), reward
        self._actions[self._begin[i] : self._now, i] = actions

    def _make_room(self) -> None:
        first = int(self._begin.min())
        kept = self._actions[first:]
        size = len(self._actions) * (2 if 2 * len(kept) > len(self._actions) else 1)
        self._actions = np.vstack([kept, np.empty((size - len(kept), kept.shape[1]), dtype=np.int64)])
        self._begin -= first
        self._now -= first


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
        self._courses = _Courses(count)

        # Environments of dispatch over the simulator are stepped together; the others one by one.
        self._lanes = DispatchLanes(self.envs) if DispatchLanes.suit(self.envs) else None
        if self._lanes is not None:
            self.buf_obs = OrderedDict(self._lanes.observation)

    def reset(self) -> Observation:
        """Start the first episode of every environment."""
        for i in range(self.num_envs):
            self._start(i, 0)
        return self._observation()

    def step_wait(self) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Take one step everywhere; an environment whose episode ends starts its next one."""
        if self._lanes is not None:
            return self._step_lanes(self._lanes)
        outcomes: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rewards, finished = np.zeros(self.num_envs), []
        for i, action in enumerate(self.actions.tolist()):
            observation, rewards[i], terminated, truncated, info = self.envs[i].step(action)
            self.elapsed_s[i] = info["elapsed_s"]
            self.buf_dones[i] = terminated or truncated
            if terminated or truncated:
                # Copied, as an environment may reuse its arrays at the next reset.
                outcomes[i]["terminal_observation"] = {key: value.copy() for key, value in observation.items()}
                outcomes[i]["TimeLimit.truncated"] = truncated and not terminated
                finished.append((i, info))
            else:
                self._save_obs(i, observation)
        self.buf_rews[:] = rewards
        self._courses.add(self.actions, rewards)
        for i, info in finished:
            self._next(i, info)
        return self._observation(), self.buf_rews.copy(), self.buf_dones.copy(), outcomes

    def _step_lanes(
        self, lanes: DispatchLanes
    ) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        outcomes: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        finished = lanes.step(self.actions)
        self.elapsed_s[:], self.buf_rews[:], self.buf_dones[:] = lanes.elapsed_s, lanes.rewards, False
        self._courses.add(self.actions, lanes.rewards)
        for i, observation, info in finished:
            self.buf_dones[i] = True
            outcomes[i] = {"terminal_observation": observation, "TimeLimit.truncated": False}
            self._next(i, info)
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
        return [(int(index), self._courses.actions(i)) for i, index in enumerate(self._courses.index)]

    def restore(self, positions: Sequence[tuple[int, Sequence[int]]]) -> Observation:
        """Play the environments to positions that :meth:`positions` returned.

        Raises:
            InputError: an episode takes another course; the environment is not the one that the positions are from.
        """
        for i, (index, actions) in enumerate(positions):
            self._start(i, index)
            gained = 0.0
            for action in actions:
                try:
                    observation, reward, terminated, truncated, info = self.envs[i].step(action)
                    gained, self.elapsed_s[i] = gained + float(reward), info["elapsed_s"]
                    over = terminated or truncated
                except ValueError:  # the action is not allowed
                    over = True
                if over:
                    place = f"episode {index} of environment {i}"
                    raise InputError(
                        "checkpoint", place, "does not replay; was it made by another version of servegym?"
                    )
            self._courses.restore(i, index, actions, gained)
            if self._lanes is not None and actions:
                self._lanes.moved(i, observation)
            elif actions:
                self._save_obs(i, observation)
        return self._observation()

    def _start(self, i: int, index: int) -> None:
        self._courses.start(i, index)
        source = np.random.SeedSequence(self._run_seed, spawn_key=(i // self._group, index))
        seed = int(source.generate_state(1)[0])
        if self._lanes is not None:
            self.reset_infos[i] = self._lanes.start(i, seed=seed)
        else:
            observation, self.reset_infos[i] = self.envs[i].reset(seed=seed)
            self._save_obs(i, observation)

    def _next(self, i: int, info: Mapping[str, Any]) -> None:
        """Keep what an episode came to, and start the environment's next one."""
        metrics, reference = info.get("metrics", {}), info.get("reference_metrics", {})
        courses = self._courses
        self.finished.append(FinishedEpisode(float(courses.reward[i]), courses.length(i), metrics, reference))
        self._start(i, int(courses.index[i]) + 1)

    def _observation(self) -> Observation:
        return {key: values.copy() for key, values in self.buf_obs.items()}
