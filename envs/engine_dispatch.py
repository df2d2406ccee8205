"""The engine level as a Gymnasium environment: to which engine does an arriving request go?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field, model_validator

from servegym.baselines.features import ENGINE_FEATURES, REQUEST_FEATURES, fill_dispatch_features
from servegym.baselines.interface import E_AVAILABLE, ExpertPolicy
from servegym.baselines.policy_spec import PolicySpec
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


class EngineDispatchConfig(Config):
    """Arguments of :class:`EngineDispatchEnv`."""

    cluster: ClusterConfig = ClusterConfig()
    workload: WorkloadChoice = WorkloadChoice(name="azure-conv", load=0.8)
    randomise: ClusterRandomisation = ClusterRandomisation()
    load: Sampled | None = Field(default=None, description="load per episode, overrides the workload's")
    episode_requests: Count = Field(default=500, description="decisions of an episode")
    random_end: bool = Field(
        default=False, description="geometric number of decisions with that mean, a memoryless end"
    )
    max_engines: Count | None = Field(
        default=None, description="slots of the observation; default: the largest cluster"
    )
    request_policy: PolicySpec = PolicySpec(name="fcfs")
    expert_policy: PolicySpec = PolicySpec(name="linear")
    reference: PolicySpec | None = Field(
        default=None, description="engine policy whose integrals on the same requests are subtracted from the reward"
    )
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _slots_suffice(self) -> Self:
        largest = max(self.randomise.engines or (self.cluster.size,))
        if self.max_engines is not None and self.max_engines < largest:
            raise ValueError(f"max_engines of at least {largest}, the largest cluster")
        return self


class EngineDispatchEnv(gym.Env[Observation, np.int64]):
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
    The negated integrals of :mod:`servegym.envs.rewards` since the last decision, weighted. Without a reference the
    undiscounted return is minus the weighted sum of TTFT, E2E and TPOT of the episode's requests. `info["elapsed_s"]`
    is the time that the step took, for discounting per second.

    ## Starting State
    An empty cluster. `reset(seed=...)` draws the requests, and the cluster where it is randomised.
    `options={"load": 0.9}` fixes the load of the episode.

    ## Episode End
    Terminated when all requests of the episode have finished; never truncated. The last `info` holds `metrics` (TTFT,
    TPOT, E2E in seconds, throughput) and, with a reference, `reference_metrics` on the same requests.

    ## Arguments
    `config`: an :class:`EngineDispatchConfig`, or a mapping with its fields.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium declares it as an instance attribute
    _name = "EngineDispatch-v0"
    _config_class = EngineDispatchConfig

    def __init__(
        self, config: EngineDispatchConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        name, model = self._name, self._config_class
        check_mode(name, render_mode)
        if not isinstance(config, model):
            config = validate(model, config or {}, name)
        self.config = config
        self.render_mode = render_mode
        sizes = config.randomise.engines or (config.cluster.size,)
        self.max_engines = config.max_engines or max(sizes)
        self._source = RequestSource(config.workload, config.cluster)
        self._request_policy = create("request", config.request_policy)
        self._expert_policy: ExpertPolicy = create("expert", config.expert_policy)
        self._reference = create("engine", config.reference) if config.reference is not None else None
        self._weights = config.reward.weights()
        self._run: SimulatedCluster | None = None
        self._mask = np.zeros(self.max_engines, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(self.max_engines)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "engines": spaces.Box(-np.inf, np.inf, (self.max_engines, len(ENGINE_FEATURES)), np.float32),
                "request": spaces.Box(-np.inf, np.inf, (len(REQUEST_FEATURES),), np.float32),
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
        super().reset(seed=seed)
        config, rng = self.config, self.np_random
        run_seed = int(rng.integers(2**31))
        cluster = config.randomise.draw(config.cluster, rng)
        load = (options or {}).get("load")
        if load is None and config.load is not None:
            load = draw(config.load, rng)
        count = config.episode_requests
        if config.random_end:
            count = int(rng.geometric(1.0 / count))
        table = self._source.table(run_seed, load=load, requests=count, cluster=cluster)
        self._reference_totals = np.zeros((0, 3))
        self._reference_metrics: dict[str, Any] | None = None
        if self._reference is not None:
            paired = SimulatedCluster(
                cluster,
                table,
                self._request_policy,
                self._reference,
                create("expert", config.expert_policy),
                seed=run_seed,
                record_totals=True,
            )
            paired.run()
            self._reference_totals = np.vstack([paired.memory.totals, paired.totals])
            self._reference_metrics = _metrics(paired)
        self._run = SimulatedCluster(
            cluster, table, self._request_policy, expert_policy=self._expert_policy, seed=run_seed
        )
        self._totals = np.zeros(3)
        self._reference_seen = np.zeros(3)
        self._now_s = 0.0
        self._run.next_decision()
        self._account(alive=True)
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "engines": cluster.size}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Send the pending request to an engine and advance to the next one."""
        run = self._run
        if run is None:
            raise RuntimeError("call reset() before step()")
        if not 0 <= action < self.max_engines or not self._mask[action]:
            raise ValueError(f"engine {action} may not be chosen; allowed: {np.flatnonzero(self._mask).tolist()}")
        before = self._now_s
        alive = run.dispatch(int(action))
        parts = self._account(alive)
        info: dict[str, Any] = {"elapsed_s": self._now_s - before}
        if alive:
            observation = self._observe()
        else:
            observation = {key: np.zeros_like(value) for key, value in self._last.items()}
            self._mask[:] = 0
            self._mask[0] = 1
            observation["mask"] = self._mask.copy()
            info["metrics"] = _metrics(run)
            if self._reference_metrics is not None:
                info["reference_metrics"] = self._reference_metrics
        info["action_mask"] = self._mask.copy()
        info["reward_parts"] = dict(zip(PARTS, parts.tolist(), strict=True))
        return observation, float(parts.sum()), not alive, False, info

    def _account(self, alive: bool) -> npt.NDArray[np.float64]:
        """Return the weighted rewards since the last call, shape (3,), and move the clock on."""
        run = self._run
        assert run is not None
        gained = run.totals - self._totals
        self._totals = run.totals.copy()
        if len(self._reference_totals):
            row = int(run.memory.request_row[8]) if alive else -1
            seen = self._reference_totals[row]
            gained -= seen - self._reference_seen
            self._reference_seen = seen
        self._now_s = run.now_s
        return np.asarray(-self._weights * gained)

    def _observe(self) -> Observation:
        run = self._run
        assert run is not None
        view = run.memory.engine_view
        engines = np.empty((self.max_engines, len(ENGINE_FEATURES)), dtype=np.float32)
        request = np.empty(len(REQUEST_FEATURES), dtype=np.float32)
        fill_dispatch_features(run.memory.request_row, view, engines, request)
        self._mask = np.zeros(self.max_engines, dtype=np.int8)
        self._mask[: len(view)] = view[:, E_AVAILABLE]
        self._last: Observation = {"engines": engines, "request": request, "mask": self._mask}
        return self._last

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """Return queues, KV use and expert heat per engine: text, or a picture of shape (540, 960, 3)."""
        return render(self._run, self.render_mode)


def _metrics(run: SimulatedCluster) -> dict[str, Any]:
    outcome = RunOutcome.of(run)
    share = np.bincount(outcome.engine[outcome.engine >= 0], minlength=run.config.size) / len(outcome.engine)
    metrics = outcome.metrics()
    return {
        "ttft_s": metrics["ttft_s"]["mean"],
        "ttft_p99_s": metrics["ttft_s"]["p99"],
        "tpot_s": metrics["tpot_s"]["mean"],
        "e2e_s": metrics["e2e_s"]["mean"],
        "throughput_rps": metrics["throughput_rps"],
        "requests": metrics["requests"],
        "engine_share": share.tolist(),
    }
