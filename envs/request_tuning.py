"""The request level as a Gymnasium environment of parameters: how a rule that orders the queues is set, now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, SupportsFloat

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.features import Feature
from servegym.baselines.heuristic import compiled_form
from servegym.baselines.interface import Q_COMPUTED_TOKENS, Q_PROMPT_TOKENS, Q_WAIT_S
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.envs.backend import ServingRun
from servegym.envs.episode import EpisodeConfig, Observation, ServingEnv, episode_metrics, feature_box
from servegym.envs.live.options import Target
from servegym.envs.request_ordering import CLUSTER
from servegym.envs.requests import WorkloadChoice
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.errors import InputError

Positive = Annotated[float, Field(gt=0)]

QUEUE_SUMMARY = (
    Feature("log_waiting", "ln(1 + waiting requests)"),
    Feature("log_prefill", "ln(1 + their tokens to compute / 1,000)"),
    Feature("log_shortest", "ln(1 + tokens / 1,000) of the shortest"),
    Feature("log_median", "the same of the median"),
    Feature("log_longest", "the same of the 90 % quantile"),
    Feature("log_oldest", "ln(1 + longest wait / 0.1 s)"),
    Feature("batch_share", "running requests / max_num_seqs", high=1.0),
    Feature("kv_usage", "share of KV blocks in use", high=1.0),
    Feature("ttft", "ln(1 + moving average of TTFT / 0.1 s)"),
)
_SPREAD = 30.0


class RequestTuningConfig(EpisodeConfig):
    """Arguments of :class:`RequestTuningEnv`."""

    cluster: ClusterConfig = Field(default=CLUSTER, description="the simulated cluster")
    workload: WorkloadChoice = Field(
        default=WorkloadChoice(name="azure-conv", load=0.95), description="the requests of an episode"
    )
    interval_s: Positive = Field(default=0.1, description="time between two decisions")
    policy: PolicySpec = Field(
        default=PolicySpec(name="spf_aging"), description="request policy with numeric parameters and a compiled form"
    )
    ranges: dict[str, tuple[Positive, Positive]] = Field(
        default_factory=dict, description=f"bounds of a parameter; default: a factor of {_SPREAD:g} around its value"
    )
    max_engines: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="rows of the observation; default: the largest cluster"
    )
    engine_policy: PolicySpec = Field(default=PolicySpec(name="round_robin"), description="choice of engines")
    expert_policy: PolicySpec = Field(default=PolicySpec(name="linear"), description="placement of the experts")


class RequestTuningEnv(ServingEnv[npt.NDArray[np.float32]]):
    """Set the parameters of the rule that orders the waiting queues, every ``interval_s`` seconds.

    ## Description
    A cluster serves requests; its queues follow a parametrised rule, such as ``spf_aging`` with its ``gamma``. A safer
    and slower handle than choosing requests one by one: every parameter within its bounds gives a sound order.

    ## Action Space
    `Box(-1, 1, (parameters,))`: each parameter of ``policy`` in order of declaration, on a logarithmic scale between
    the bounds of ``ranges``. 0 is their geometric mean, by default the rule's own value. In force for all engines from
    their next step.

    ## Observation Space
    `Dict`, float32 unless said otherwise:

    | key | shape | content |
    |---|---|---|
    | `engines` | (max_engines, features) | `servegym.envs.request_tuning.QUEUE_SUMMARY` of each engine; zeros for absent ones |
    | `context` | (1 + parameters,) | ln(1 + arrivals of the last interval), and the action in force |
    | `mask` | (max_engines,) int8 | 1 for engines that are there |

    ## Rewards
    As in `EngineDispatch-v0`, without a reference: the undiscounted return is minus the weighted sum over the episode's
    requests. `info["elapsed_s"]` is the interval.

    ## Starting State
    An empty cluster at the first arrival's begin. `reset(seed=...)` draws the requests, and the cluster where it is
    randomised. `options={"load": 0.9}` fixes the load.

    ## Episode End
    Terminated when all requests have finished; never truncated. The last `info` holds `metrics`.

    ## Arguments
    `config`: a :class:`RequestTuningConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    config: RequestTuningConfig
    features = {"engines": QUEUE_SUMMARY}  # noqa: RUF012 - never written to
    _name = "RequestTuning-v0"
    _lives = True
    _config_class = RequestTuningConfig

    def __init__(
        self, config: RequestTuningConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        super().__init__(config, render_mode=render_mode)
        config = self.config
        self._policy = create("request", config.policy)
        self._others = create("engine", config.engine_policy), create("expert", config.expert_policy)
        self.parameters, self._bounds = _tunable(config, self._policy)
        self.max_engines = config.max_engines or self.most_engines
        count = len(self.parameters)
        self.action_space = spaces.Box(-1.0, 1.0, (count,), np.float32)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "engines": feature_box(QUEUE_SUMMARY, self.max_engines),
                "context": spaces.Box(-np.inf, np.inf, (1 + count,), np.float32),
                "mask": spaces.Box(0, 1, (self.max_engines,), np.int8),
            }
        )

    def values(self, action: npt.NDArray[np.float32]) -> dict[str, float]:
        """Return the parameters that an action stands for."""
        share = 0.5 + 0.5 * np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        low, high = np.log(self._bounds).T
        return dict(zip(self.parameters, np.exp(low + share * (high - low)).tolist(), strict=True))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class."""
        cluster, table, run_seed = self._draw_episode(seed, options)
        run: ServingRun
        if self._target is not None:
            self._tuned = live_tuning(self._target, self.config.policy)
            run = self._live_run(table, self._others[0], run_seed)
        else:
            run = SimulatedCluster(cluster, table, self._policy, *self._others, seed=run_seed, tunable=True)
            self._tuned = simulated_tuning(run)
        self._begin(run)
        self._arrived = 0
        self._action = np.zeros(len(self.parameters), dtype=np.float32)
        return self._observe(), {"seed": run_seed, "engines": run.config.size}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Set the parameters and run on for an interval."""
        run = self._running()
        self._action = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        values = self.values(self._action)
        self._tuned(values)
        alive = run.run_until(self._meter.now_s + self.config.interval_s)
        parts, info = self._rewards()
        info["parameters"] = values
        if not alive:
            info["metrics"] = episode_metrics(run)
        return self._observe(), float(parts.sum()), not alive, False, info

    def _observe(self) -> Observation:
        run = self._running()
        engines = np.zeros((self.max_engines, len(QUEUE_SUMMARY)), dtype=np.float32)
        mask = np.zeros(self.max_engines, dtype=np.int8)
        for index, record in enumerate(run.memory.engines):
            mask[index] = record["alive"]
            engines[index] = _summary(run, index, record)
        arrived = run.arrived
        context = np.concatenate([[np.log1p(arrived - self._arrived)], self._action]).astype(np.float32)
        self._arrived = arrived
        return {"engines": engines, "context": context, "mask": mask}


def simulated_tuning(run: SimulatedCluster) -> Callable[[dict[str, float]], None]:
    """Return what sets the parameters of a simulated rule."""

    def tune(values: dict[str, float]) -> None:
        run.memory.request_params[:] = list(values.values())

    return tune


def live_tuning(target: Target, rule: PolicySpec) -> Callable[[dict[str, float]], None]:
    """Return what sets the parameters of the rule that our scheduler follows inside live engines.

    Raises:
        InputError: the engines are no cluster with our scheduler.
    """
    cluster = target.cluster
    if cluster is None:
        raise InputError(
            "RequestTuning-v0", "live.cluster", "missing; the rule is tuned by our scheduler in the engines"
        )

    def tune(values: dict[str, float]) -> None:
        cluster.set_request_policy(PolicySpec(name=rule.name, params=rule.params | values))

    cluster.set_request_policy(rule)
    return tune


def _tunable(config: RequestTuningConfig, policy: Any) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """Names and bounds, shape (parameters, 2), of the numeric parameters of a compiled request policy."""
    form, source = compiled_form(policy), "RequestTuning-v0"
    values = policy.params.model_dump() if form is not None else {}
    if form is None or getattr(policy, "native", None) is not None or not values:
        raise InputError(source, "policy", f"got {config.policy}; allowed: a compiled rule with parameters")
    for name in config.ranges:
        if name not in values:
            raise InputError(source, f"ranges.{name}", f"no such parameter; allowed: {', '.join(values)}")
    bounds = []
    for name, value in values.items():
        if name not in config.ranges and not (isinstance(value, int | float) and value > 0):
            raise InputError(source, f"ranges.{name}", f"missing; its value {value} is no scale of its own")
        low, high = config.ranges.get(name, (value / _SPREAD, value * _SPREAD))
        if low >= high:
            raise InputError(source, f"ranges.{name}", f"got {low} to {high}; allowed: the lower bound first")
        bounds.append((low, high))
    return tuple(values), np.array(bounds)


def _summary(run: ServingRun, index: int, record: Any) -> npt.NDArray[np.float64]:
    queue = run.waiting_requests(index)[0].data
    tokens = queue[:, Q_PROMPT_TOKENS] - queue[:, Q_COMPUTED_TOKENS] if len(queue) else np.zeros(1)
    oldest = float(queue[:, Q_WAIT_S].max()) if len(queue) else 0.0
    return np.array(
        [
            np.log1p(float(record["waiting"])),
            np.log1p(tokens.sum() * 1e-3),
            *np.log1p(np.quantile(tokens, (0.0, 0.5, 0.9)) * 1e-3),
            np.log1p(max(oldest, 0.0) * 10.0),
            record["running"] / record["max_num_seqs"],
            1.0 - record["free_blocks"] / (record["num_blocks"] - 1),
            np.log1p(record["ttft_ewma_s"] * 10.0),
        ]
    )
