"""The engine level as a Gymnasium environment: to which engine does an arriving request go?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, SupportsFloat

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field, model_validator

from servegym.baselines.features import ENGINE_FEATURES, REQUEST_FEATURES, fill_dispatch_features
from servegym.baselines.interface import E_AVAILABLE, R_INDEX, ExpertPolicy
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.envs.backend import ServingRun
from servegym.envs.episode import EpisodeConfig, Observation, ServingEnv, feature_box
from servegym.envs.simulator.cluster import SimulatedCluster


class EngineDispatchConfig(EpisodeConfig):
    """Arguments of :class:`EngineDispatchEnv`."""

    episode_requests: Annotated[int, Field(ge=1)] = Field(default=500, description="decisions of an episode")
    max_engines: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="slots of the observation; default: the largest cluster"
    )
    request_policy: PolicySpec = Field(default=PolicySpec(name="fcfs"), description="order of the waiting queues")
    expert_policy: PolicySpec = Field(default=PolicySpec(name="linear"), description="placement of the experts")
    reference: PolicySpec | None = Field(
        default=None, description="engine policy whose integrals on the same requests are subtracted from the reward"
    )

    @model_validator(mode="after")
    def _slots_suffice(self) -> Self:
        if self.max_engines is not None and self.max_engines < self.largest_cluster:
            raise ValueError(f"max_engines of at least {self.largest_cluster}, the largest cluster")
        return self


class EngineDispatchEnv(ServingEnv[np.int64]):
    """Dispatch each arriving request to one of N engines.

    ## Description
    A cluster of vLLM engines serves a stream of requests. A step of the environment is one arriving request; the agent
    names the engine that gets it, and the simulation runs on to the next arrival. After the last arrival the cluster
    drains, so that an episode contains the whole effect of its decisions.

    ## Action Space
    `Discrete(max_engines)`: the engine. `action_masks()` and `info["action_mask"]` say which are allowed; an action
    that is not allowed raises `ValueError`.

    ## Observation Space
    `Dict`, float32 unless said otherwise, of fixed scale and never normalised per engine slot:

    | key | shape | content |
    |---|---|---|
    | `engines` | (max_engines, features) | `servegym.baselines.features.ENGINE_FEATURES`; zeros for absent engines |
    | `request` | (features,) | `servegym.baselines.features.REQUEST_FEATURES` |
    | `mask` | (max_engines,) int8 | 1 where the engine may be chosen |

    Only what a live router can know enters: its own counters are exact, an engine's telemetry is as old as configured,
    and the output length of a request is nowhere.

    ## Rewards
    The negated growth of what `reward` weighs since the last decision, exact (:mod:`servegym.envs.rewards`): TTFT, E2E,
    TPOT, slowdown, tardiness, missed deadlines, tail. Without a reference the undiscounted return is minus their
    weighted sum over the episode's requests. `info["reward_parts"]` has the parts, `info["elapsed_s"]` the time that
    the step took, for discounting per second.

    ## Starting State
    An empty cluster. `reset(seed=...)` draws the requests, and the cluster where it is randomised.
    `options={"load": 0.9}` fixes the load of the episode.

    ## Episode End
    Terminated when all requests of the episode have finished; never truncated. The last `info` holds `metrics` (TTFT,
    TPOT, E2E in seconds, throughput) and, with a reference, `reference_metrics` on the same requests.

    ## Arguments
    `config`: an :class:`EngineDispatchConfig`, or a mapping with its fields.
    """

    config: EngineDispatchConfig
    features = {"engines": ENGINE_FEATURES, "request": REQUEST_FEATURES}  # noqa: RUF012 - never written to
    _name = "EngineDispatch-v0"
    _lives = True
    _config_class = EngineDispatchConfig

    def __init__(
        self, config: EngineDispatchConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        super().__init__(config, render_mode=render_mode)
        config = self.config
        self.max_engines = config.max_engines or self.most_engines
        self._request_policy = create("request", config.request_policy)
        self._expert_policy: ExpertPolicy = create("expert", config.expert_policy)
        self._reference = create("engine", config.reference) if config.reference is not None else None
        self._mask = np.zeros(self.max_engines, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(self.max_engines)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "engines": feature_box(ENGINE_FEATURES, self.max_engines),
                "request": feature_box(REQUEST_FEATURES),
                "mask": spaces.Box(0, 1, (self.max_engines,), np.int8),
            }
        )

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which engines may be chosen, shape (max_engines,); before the first reset, the first one."""
        return self._mask.astype(np.bool_)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class."""
        cluster, table, run_seed = self._draw_episode(seed, options)
        paired: SimulatedCluster | None = None
        if self._reference is not None:
            paired = SimulatedCluster(
                cluster,
                table,
                self._request_policy,
                self._reference,
                create("expert", self.config.expert_policy),
                seed=run_seed,
                record_totals=True,
            )
            paired.run()
        run: ServingRun
        if self._target is not None:
            run = self._live_run(table, None, run_seed, expert_policies=self._live_expert_policies())
        else:
            run = SimulatedCluster(
                cluster, table, self._request_policy, expert_policy=self._expert_policy, seed=run_seed
            )
        self._begin(run, paired)
        run.next_decision()
        if self._target is None:  # live, the first request has waited for this very moment
            self._rewards(int(run.memory.request_row[R_INDEX]))
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "engines": run.config.size}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Send the pending request to an engine and advance to the next one."""
        run = self._running()
        if not 0 <= action < self.max_engines or not self._mask[action]:
            raise ValueError(f"engine {action} may not be chosen; allowed: {np.flatnonzero(self._mask).tolist()}")
        return self._outcome(run.dispatch(int(action)))

    def go_on(self, reason: int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Finish a step that a lane of the kernel began and could not end; ``reason`` is why."""
        return self._outcome(self._simulated().go_on(reason))

    def _outcome(self, alive: bool) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        run = self._running()
        parts, info = self._rewards(int(run.memory.request_row[R_INDEX]) if alive else None)
        if alive:
            observation = self._observe()
        else:
            observation = {key: np.zeros_like(value) for key, value in self._last.items()}
            self._mask[:] = 0
            self._mask[0] = 1
            observation["mask"] = self._mask.copy()
            info |= self._final_metrics()
        info["action_mask"] = self._mask.copy()
        return observation, float(parts.sum()), not alive, False, info

    def _live_expert_policies(self) -> Sequence[ExpertPolicy]:
        """Return the policies that place the experts of live engines, one per engine; none: the experts stay."""
        return ()

    def _observe(self) -> Observation:
        run = self._running()
        view = run.memory.engine_view
        engines = np.empty((self.max_engines, len(ENGINE_FEATURES)), dtype=np.float32)
        request = np.empty(len(REQUEST_FEATURES), dtype=np.float32)
        fill_dispatch_features(run.memory.request_row, view, engines, request)
        self._mask = np.zeros(self.max_engines, dtype=np.int8)
        self._mask[: len(view)] = view[:, E_AVAILABLE]
        self._last: Observation = {"engines": engines, "request": request, "mask": self._mask}
        return self._last
