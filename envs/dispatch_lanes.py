"""Several ``EngineDispatch-v0`` environments, stepped together inside the compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from servegym.envs.engine_dispatch import EngineDispatchConfig, EngineDispatchEnv
from servegym.envs.episode import Observation
from servegym.envs.rewards import KERNEL_PARTS, PARTS
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.kernel.cluster import DISPATCH
from servegym.envs.simulator.kernel.lanes import LANE, step_lanes

Info = dict[str, Any]
Finished = tuple[int, Observation, Info]
"""Lane, last observation and last info of an episode that has ended."""


class DispatchLanes:
    """Steps environments by one call of the kernel; observations, rewards and episodes are bit for bit their own.

    What the kernel cannot do (faults, policies in Python, rewards of other parts than its own, the end of an episode)
    is done by the environments themselves, one after the other.

    Args:
        envs: environments with equal spaces, over the simulator. They are not to be stepped otherwise.

    Attributes:
        observation: of each environment; the arrays are written in place.
        rewards: of the last step, shape (lanes,).
        elapsed_s: simulated seconds of the last step, shape (lanes,).
    """

    def __init__(self, envs: Sequence[EngineDispatchEnv]) -> None:
        self._envs = envs
        count, space = len(envs), envs[0].observation_space
        self.observation = {
            key: np.zeros((count, *(part.shape or ())), part.dtype) for key, part in space.spaces.items()
        }
        self.rewards, self.elapsed_s = np.zeros(count), np.zeros(count)
        self._lanes = np.zeros(count, dtype=LANE)
        self._in_kernel = np.zeros(count, dtype=np.bool_)
        self._reasons = np.zeros(count, dtype=np.int64)
        self._owned: list[tuple[Any, ...]] = [()] * count

    @staticmethod
    def suit(envs: Sequence[gym.Env[Any, Any]]) -> TypeGuard[Sequence[EngineDispatchEnv]]:
        """Whether environments can be lanes."""
        return all(type(env) is EngineDispatchEnv and env.config.backend == "sim" for env in envs)

    def start(self, i: int, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Info:
        """Start an episode of environment ``i``; returns its info."""
        env = self._envs[i]
        observation, info = env.reset(seed=seed, options=options)
        run, meter = env.run, env.meter
        assert isinstance(run, SimulatedCluster)
        sums = meter.reference_sums
        arrays = run.memory.cluster, run.totals, meter.weights, meter.seen, sums, meter.reference_seen, meter.now
        addresses = [0 if array is None else array.ctypes.data for array in arrays]
        names = ("cluster_at", "totals_at", "weights_at", "seen_at", "reference_at", "reference_seen_at", "now_at")
        for name, address in zip(names, addresses, strict=True):
            self._lanes[name][i] = address
        self._owned[i] = run, *arrays  # alive for as long as the lane has their addresses
        self._in_kernel[i] = meter.of_kernel
        self.moved(i, observation)
        return info

    def moved(self, i: int, observation: Observation) -> None:
        """Take over from environment ``i``, which has been stepped by itself and shows this now."""
        self._lanes["horizon_s"][i] = self._owned[i][0].horizon_s
        for key, value in observation.items():
            self.observation[key][i] = value

    def step(self, actions: npt.NDArray[np.int64]) -> list[Finished]:
        """Step all environments; those whose episode ends are to be started again.

        Args:
            actions: engines, shape (lanes,).

        Raises:
            ValueError: an engine that may not be chosen; nothing has happened then.
        """
        self._check(actions)
        self._reasons[:] = DISPATCH
        step_lanes(
            self._lanes,
            np.where(self._in_kernel, actions, -1),
            len(PARTS),
            KERNEL_PARTS,
            self.observation["engines"],
            self.observation["request"],
            self.observation["mask"],
            self.rewards,
            self.elapsed_s,
            self._reasons,
        )
        finished = []
        for i in np.flatnonzero((self._reasons != DISPATCH) | ~self._in_kernel).tolist():
            env = self._envs[i]
            outcome = env.go_on(int(self._reasons[i])) if self._in_kernel[i] else env.step(int(actions[i]))
            observation, self.rewards[i], terminated, _, info = outcome
            self.elapsed_s[i] = info["elapsed_s"]
            self.moved(i, observation)
            if terminated:
                finished.append((i, observation, info))
        return finished

    def _check(self, actions: npt.NDArray[np.int64]) -> None:
        mask = self.observation["mask"]
        inside = (actions >= 0) & (actions < mask.shape[1])
        allowed = inside & (mask[np.arange(len(mask)), np.where(inside, actions, 0)] > 0)
        if not allowed.all():
            i = int(allowed.argmin())
            known = np.flatnonzero(mask[i]).tolist()
            raise ValueError(f"environment {i}: engine {actions[i]} may not be chosen; allowed: {known}")


class EngineDispatchVectorEnv(VectorEnv[Observation, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """``EngineDispatch-v0`` as a Gymnasium vector environment: at most ten microseconds a decision.

    An episode that ends is followed by the next one within the same step (``AutoresetMode.SAME_STEP``):
    ``infos["final_obs"]`` and ``infos["final_info"]`` hold what the last step returned. Else ``infos`` has
    ``elapsed_s``, the simulated seconds of the step, and ``action_mask``.

    Args:
        num_envs: environments.
        config: an :class:`~.engine_dispatch.EngineDispatchConfig`, or a mapping with its fields; over the simulator.

    Raises:
        InputError: a wrong config.
        ValueError: live engines, which are not stepped together.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as Gymnasium has it

    def __init__(
        self,
        num_envs: int = 1,
        config: EngineDispatchConfig | Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        envs = [EngineDispatchEnv(config, render_mode=render_mode) for _ in range(num_envs)]
        if not DispatchLanes.suit(envs):
            raise ValueError("backend: sim for a vector of environments, not live")
        self._lanes = DispatchLanes(envs)
        self.single_observation_space = envs[0].observation_space
        self.single_action_space = envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which engines may be chosen, shape (num_envs, max_engines)."""
        return self._lanes.observation["mask"] > 0

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode everywhere; a single seed gives environment ``i`` the seed ``seed + i``."""
        infos: Info = {}
        for i, own in enumerate(self._seeds(seed)):
            infos = self._add_info(infos, self._lanes.start(i, seed=own, options=options), i)
        return self._observation(), infos

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Info]:
        """Send each pending request to an engine."""
        finished = self._lanes.step(np.asarray(actions, dtype=np.int64))
        rewards, elapsed_s = self._lanes.rewards.copy(), self._lanes.elapsed_s.copy()
        ended = np.zeros(self.num_envs, dtype=np.bool_)
        infos: Info = {}
        for i, observation, info in finished:
            ended[i] = True
            infos = self._add_info(infos, {"final_obs": observation, "final_info": info}, i)
            self._lanes.start(i)
        infos |= {"elapsed_s": elapsed_s, "action_mask": self._lanes.observation["mask"].copy()}
        return self._observation(), rewards, ended, np.zeros_like(ended), infos

    def _seeds(self, seed: int | list[int | None] | None) -> Iterator[int | None]:
        if isinstance(seed, list):
            yield from seed
        else:
            yield from (None if seed is None else seed + i for i in range(self.num_envs))

    def _observation(self) -> Observation:
        return {key: value.copy() for key, value in self._lanes.observation.items()}
