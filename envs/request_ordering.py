"""The request level as a Gymnasium environment: which waiting request does an engine admit next?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.interface import QueueView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.queue_features import QUEUE_CONTEXT_FEATURES, QUEUE_FEATURES, fill_queue_features
from servegym.baselines.registry import create
from servegym.configuration import Config, validate
from servegym.envs.randomisation import ClusterRandomisation, Sampled, draw
from servegym.envs.rendering import RENDER_MODES, check_mode, render
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.rewards import PARTS, RewardConfig
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome

Count = Annotated[int, Field(ge=1)]
Observation = dict[str, npt.NDArray[Any]]

# One engine with a token budget that a long prompt fills: who goes first is what others wait for.
CLUSTER = ClusterConfig(engines=1, engine={"max_num_batched_tokens": 2048})


class RequestOrderingConfig(Config):
    """Arguments of :class:`RequestOrderingEnv`."""

    cluster: ClusterConfig = CLUSTER
    workload: WorkloadChoice = WorkloadChoice(name="azure-conv", load=0.95)
    randomise: ClusterRandomisation = ClusterRandomisation()
    load: Sampled | None = Field(default=None, description="load per episode, overrides the workload's")
    episode_requests: Count = Field(default=1000, description="requests of an episode")
    window: Annotated[int, Field(ge=2)] = Field(default=32, description="waiting requests that the agent sees")
    engine_policy: PolicySpec = PolicySpec(name="round_robin")
    expert_policy: PolicySpec = PolicySpec(name="linear")
    reward: RewardConfig = RewardConfig()


class RequestOrderingEnv(gym.Env[Observation, np.int64]):
    """Choose which of the waiting requests an engine admits to its running batch next.

    ## Description
    vLLM admits waiting requests at the begin of each step, one after the other, while token budget, slots and KV blocks
    last. A step of the environment is one such admission: the agent names the request that is considered next. If it
    does not fit, the engine admits nobody else in this step, as vLLM's head of the queue would block it. Decisions
    without a choice, a single waiting request or preempted ones, which go first in vLLM, are not asked. With several
    engines `info["engine"]` says whose queue it is; ``engine_policy`` dispatches.

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
    The negated integrals of :mod:`servegym.envs.rewards` since the last decision, weighted, so that the undiscounted
    return is minus the weighted sum of TTFT, E2E and TPOT of the episode's requests, in seconds. `info["elapsed_s"]`
    is the time that the step took, for discounting per second: 0 between admissions of one engine step.

    ## Starting State
    An empty cluster, run up to the first choice. `reset(seed=...)` draws the requests, and the cluster where it is
    randomised. `options={"load": 0.9}` fixes the load of the episode.

    ## Episode End
    Terminated when all requests of the episode have finished; never truncated. The last `info` holds `metrics` (TTFT,
    TPOT, E2E in seconds, throughput).

    ## Arguments
    `config`: a :class:`RequestOrderingConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium declares it as an instance attribute

    def __init__(
        self, config: RequestOrderingConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        check_mode("RequestOrdering-v0", render_mode)
        if not isinstance(config, RequestOrderingConfig):
            config = validate(RequestOrderingConfig, config or {}, "RequestOrdering-v0")
        self.config = config
        self.render_mode = render_mode
        self._source = RequestSource(config.workload, config.cluster)
        self._policies = create("engine", config.engine_policy), create("expert", config.expert_policy)
        self._weights = config.reward.weights()
        self._run: SimulatedCluster | None = None
        self._mask = np.zeros(config.window, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(config.window)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "requests": spaces.Box(-np.inf, np.inf, (config.window, len(QUEUE_FEATURES)), np.float32),
                "context": spaces.Box(-np.inf, np.inf, (len(QUEUE_CONTEXT_FEATURES),), np.float32),
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
        super().reset(seed=seed)
        config, rng = self.config, self.np_random
        run_seed = int(rng.integers(2**31))
        cluster = config.randomise.draw(config.cluster, rng)
        load = (options or {}).get("load")
        if load is None and config.load is not None:
            load = draw(config.load, rng)
        table = self._source.table(run_seed, load=load, requests=config.episode_requests, cluster=cluster)
        self._run = SimulatedCluster(cluster, table, None, *self._policies, seed=run_seed)
        # What happens before the first decision enters the first reward, so that the return is the metric.
        self._totals, self._now_s = np.zeros(3), 0.0
        self._engine = self._run.next_admission()
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "engine": self._engine or 0}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Have the engine consider a waiting request next, and run on to the next choice."""
        run = self._run
        if run is None:
            raise RuntimeError("call reset() before step()")
        if not 0 <= action < len(self._mask) or not self._mask[action]:
            raise ValueError(f"no request waits at {action}; allowed: {np.flatnonzero(self._mask).tolist()}")
        before = self._now_s
        if self._engine is not None:
            run.admit(self._engine, int(self._members[int(action)]))
            self._engine = run.next_admission()
        parts = self._account()
        observation = self._observe()
        info: dict[str, Any] = {"elapsed_s": self._now_s - before, "action_mask": self._mask.copy()}
        info["reward_parts"] = dict(zip(PARTS, parts.tolist(), strict=True))
        over = self._engine is None
        if over:
            info["metrics"] = _metrics(run)
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

    def _account(self) -> npt.NDArray[np.float64]:
        """Return the weighted rewards since the last call, shape (3,), and move the clock on."""
        run = self._run
        assert run is not None
        gained = run.totals - self._totals
        self._totals = run.totals.copy()
        self._now_s = max(run.decided_s, self._now_s)
        return np.asarray(-self._weights * gained)

    def _observe(self) -> Observation:
        run, window = self._run, self.config.window
        assert run is not None
        requests = np.zeros((window, len(QUEUE_FEATURES)), dtype=np.float32)
        context = np.zeros(len(QUEUE_CONTEXT_FEATURES), dtype=np.float32)
        self._mask = np.zeros(window, dtype=np.int8)
        if self._engine is None:
            self._mask[0] = 1
        else:
            queue, self._members = run.waiting_requests(self._engine)
            shown = queue.data[:window]
            fill_queue_features(shown, run.memory.context_row, len(queue), requests, context)
            self._mask[: len(shown)] = 1
        return {"requests": requests, "context": context, "mask": self._mask}

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """Return queues, KV use and expert heat per engine: text, or a picture of shape (540, 960, 3)."""
        return render(self._run, self.render_mode)


def _metrics(run: SimulatedCluster) -> dict[str, Any]:
    metrics = RunOutcome.of(run).metrics()
    found = {name: metrics[name]["mean"] for name in ("ttft_s", "tpot_s", "e2e_s")}
    found |= {"ttft_p99_s": metrics["ttft_s"]["p99"], "requests": metrics["requests"]}
    return found | {"throughput_rps": metrics["throughput_rps"], "preemptions": metrics["preemptions"]}
