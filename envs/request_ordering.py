"""The request level as a Gymnasium environment: which waiting request does an engine admit next?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, SupportsFloat

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.interface import QueueView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.queue_features import QUEUE_CONTEXT_FEATURES, QUEUE_FEATURES, fill_queue_features
from servegym.baselines.registry import create
from servegym.envs.backend import ServingRun
from servegym.envs.episode import EpisodeConfig, Observation, ServingEnv, feature_box
from servegym.envs.requests import WorkloadChoice
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig

# One engine with a token budget that a long prompt fills: who goes first is what others wait for.
CLUSTER = ClusterConfig(engines=1, engine={"max_num_batched_tokens": 2048})


class RequestOrderingConfig(EpisodeConfig):
    """Arguments of :class:`RequestOrderingEnv`."""

    cluster: ClusterConfig = Field(default=CLUSTER, description="the simulated cluster")
    workload: WorkloadChoice = Field(
        default=WorkloadChoice(name="azure-conv", load=0.95), description="the requests of an episode"
    )
    window: Annotated[int, Field(ge=2)] = Field(default=32, description="waiting requests that the agent sees")
    engine_policy: PolicySpec = Field(default=PolicySpec(name="round_robin"), description="choice of engines")
    expert_policy: PolicySpec = Field(default=PolicySpec(name="linear"), description="placement of the experts")
    reference: PolicySpec | None = Field(
        default=None, description="request policy whose integrals on the same requests are subtracted from the reward"
    )


class RequestOrderingEnv(ServingEnv[np.int64]):
    """Choose which of the waiting requests an engine admits to its running batch next.

    ## Description
    vLLM admits waiting requests at the begin of each step, one after the other, while token budget, slots and KV blocks
    last. A step of the environment is one such admission: the agent names the request that is considered next. If it
    does not fit, the engine admits nobody else in this step, as vLLM's head of the queue would block it. Decisions
    without a choice, a single waiting request or preempted ones, which go first in vLLM, are not asked. With several
    engines `info["engine"]` says whose queue it is; ``engine_policy`` dispatches.

    With `backend: live` the environment keeps requests back that find no free slot of `live.limits.max_num_seqs`, and a
    step is the release of one of them: live engines then never have a queue of their own.

    ## Action Space
    `Discrete(window)`: a place among the first ``window`` waiting requests, in order of arrival; always 0 is vLLM's
    FCFS. `action_masks()` and `info["action_mask"]` say which places are taken; another raises `ValueError`.

    ## Observation Space
    `Dict`:

    | key | shape | content |
    |---|---|---|
    | `requests` | (window, features) float32 | `servegym.baselines.queue_features.QUEUE_FEATURES`, logarithms and shares of order one; zeros for empty places |
    | `context` | (features,) float32 | `QUEUE_CONTEXT_FEATURES`: the engine's queue, batch and KV use |
    | `mask` | (window,) int8 | 1 where a request waits |

    Output lengths are nowhere; a workload's prediction is, where it has one.

    ## Rewards
    As in `EngineDispatch-v0`: without a reference the undiscounted return is minus the weighted sum over the episode's
    requests, with one the gain over it. `info["elapsed_s"]`, for discounting per second, is 0 between admissions of one engine step.

    ## Starting State
    An empty cluster, run up to the first choice. `reset(seed=...)` draws the requests, and the cluster where it is
    randomised. `options={"load": 0.9}` fixes the load of the episode.

    ## Episode End
    Terminated when all requests of the episode have finished; never truncated. The last `info` holds `metrics` (TTFT,
    TPOT, E2E in seconds, throughput) and, with a reference, `reference_metrics` on the same requests.

    ## Arguments
    `config`: a :class:`RequestOrderingConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    config: RequestOrderingConfig
    features = {"requests": QUEUE_FEATURES, "context": QUEUE_CONTEXT_FEATURES}  # noqa: RUF012 - never written to
    _name = "RequestOrdering-v0"
    _lives = True
    _config_class = RequestOrderingConfig

    def __init__(
        self, config: RequestOrderingConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        super().__init__(config, render_mode=render_mode)
        config = self.config
        self._policies = create("engine", config.engine_policy), create("expert", config.expert_policy)
        self._reference = create("request", config.reference) if config.reference is not None else None
        self._mask = np.zeros(config.window, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(config.window)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "requests": feature_box(QUEUE_FEATURES, config.window),
                "context": feature_box(QUEUE_CONTEXT_FEATURES),
                "mask": spaces.Box(0, 1, (config.window,), np.int8),
            }
        )

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which places are taken, shape (window,)."""
        return self._mask.astype(np.bool_)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class."""
        cluster, table, run_seed = self._draw_episode(seed, options)
        run: ServingRun
        if self._target is not None:
            run = self._live_run(table, self._policies[0], run_seed, hold=True)
        else:
            run = SimulatedCluster(cluster, table, None, *self._policies, seed=run_seed)
        paired: SimulatedCluster | None = None
        if self._reference is not None:
            policies = create("engine", self.config.engine_policy), create("expert", self.config.expert_policy)
            paired = SimulatedCluster(cluster, table, self._reference, *policies, seed=run_seed)
            paired.run()
        self._begin(run, paired)
        self._engine = run.next_admission()
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "engine": self._engine or 0}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Have the engine consider a waiting request next, and run on to the next choice."""
        run = self._running()
        if not 0 <= action < len(self._mask) or not self._mask[action]:
            raise ValueError(f"no request waits at {action}; allowed: {np.flatnonzero(self._mask).tolist()}")
        if self._engine is not None:
            run.admit(self._engine, int(self._members[int(action)]))
            self._engine = run.next_admission()
        over = self._engine is None
        parts, info = self._rewards(until_s=None if over else run.decided_s)
        observation = self._observe()
        info["action_mask"] = self._mask.copy()
        if over:
            info |= self._final_metrics()
        else:
            info["engine"] = self._engine
        return observation, float(parts.sum()), over, False, info

    def waiting(self) -> QueueView:
        """Return the queue of the pending decision, as a request policy would see it.

        Raises:
            RuntimeError: no decision is pending.
        """
        if self._run is None or self._engine is None:
            raise RuntimeError("no decision is pending")
        return self._run.waiting_requests(self._engine)[0]

    def _observe(self) -> Observation:
        run, window = self._running(), self.config.window
        requests = np.zeros((window, len(QUEUE_FEATURES)), dtype=np.float32)
        context = np.zeros(len(QUEUE_CONTEXT_FEATURES), dtype=np.float32)
        self._mask = np.zeros(window, dtype=np.int8)
        if self._engine is None:
            self._mask[0] = 1
        else:
            queue, self._members = run.waiting_requests(self._engine)
            shown = queue.data[:window]
            fill_queue_features(shown, run.memory.context_row, requests, context)
            self._mask[: len(shown)] = 1
        return {"requests": requests, "context": context, "mask": self._mask}
