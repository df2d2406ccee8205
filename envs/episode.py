"""What all environments share: where an episode's cluster and requests come from, its rewards and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field, model_validator

from servegym.baselines.features import Feature
from servegym.baselines.interface import EnginePolicy, ExpertPolicy, FloatArray
from servegym.configuration import Config, validate
from servegym.envs.backend import ServingRun
from servegym.envs.live.options import LiveOptions
from servegym.envs.randomisation import Randomisation, Sampled
from servegym.envs.rendering import RENDER_MODES, check_mode, render
from servegym.envs.requests import WorkloadChoice
from servegym.envs.rewards import PARTS, RewardConfig, RewardMeter
from servegym.envs.scenarios import EpisodeSource, Scenario
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.envs.live.run import LiveRun

Observation = dict[str, npt.NDArray[Any]]
ActionT = TypeVar("ActionT")


class EpisodeConfig(Config):
    """Arguments that all environments take."""

    backend: Literal["sim", "live"] = Field(default="sim", description="the simulator, or live engines in real time")
    live: LiveOptions | None = Field(default=None, description="the live engines; in place of cluster")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="the simulated cluster")
    workload: WorkloadChoice = Field(
        default=WorkloadChoice(name="azure-conv", load=0.8), description="the requests of an episode"
    )
    scenarios: dict[str, Scenario] = Field(
        default_factory=dict, description="one of these is drawn for each episode, in place of the workload"
    )
    randomise: Randomisation = Field(default=Randomisation(), description="what is drawn anew for each episode")
    load: Sampled | None = Field(default=None, description="load per episode, overrides the workload's")
    episode_requests: Annotated[int, Field(ge=1)] = Field(
        default=1000, description="requests of an episode, but where a scenario's workload says how many"
    )
    requests_grow: bool = Field(
        default=False, description="an episode's requests grow from the cluster's own engines to those that are drawn"
    )
    random_end: bool = Field(default=False, description="geometric number of requests with that mean, a memoryless end")
    reward: RewardConfig = Field(default=RewardConfig(), description="weights of the parts of the reward")

    @model_validator(mode="after")
    def _what_the_reward_needs_is_there(self) -> Self:
        if getattr(self, "reference", None) is None:
            if self.reward.tail and self.reward.tail_s is None:
                raise ValueError("reward.tail_s, or a reference policy whose quantile it is")
            if self.reward.scale_s == "reference":
                raise ValueError("a reference policy with reward.scale_s: reference")
        return self

    @model_validator(mode="after")
    def _live_engines_are_as_they_are(self) -> Self:
        if (self.backend == "live") != (self.live is not None):
            raise ValueError("live engines with backend: live, and only with it")
        if self.backend == "live":
            if self.workload.load is not None or self.load is not None:
                raise ValueError("workload.rate_rps in place of a load: the capacity of live engines is not known")
            if self.randomise != Randomisation() or getattr(self, "reference", None) is not None:
                raise ValueError("neither randomise nor a reference with backend: live")
        return self

    @model_validator(mode="after")
    def _scenarios_are_valid(self) -> Self:
        if self.scenarios and self.backend == "live":
            raise ValueError("no scenarios with backend: live")
        self.clusters()
        return self

    def clusters(self) -> list[ClusterConfig]:
        """Return the cluster of each scenario, or the only one; before randomisation.

        Raises:
            InputError: a scenario's changes are not allowed.
        """
        return [scenario.on(self.cluster, label) for label, scenario in self.scenarios.items()] or [self.cluster]

    @property
    def largest_cluster(self) -> int:
        """Most engines of an episode."""
        return max(max(self.randomise.sizes(cluster) or [cluster.size]) for cluster in self.clusters())


class ServingEnv(gym.Env[Observation, ActionT], Generic[ActionT]):
    """Base of the environments: one episode is one run, of the simulator or of live engines."""

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium declares it as an instance attribute
    config: EpisodeConfig
    features: ClassVar[Mapping[str, tuple[Feature, ...]]]
    """What the columns of an observation mean, by key."""
    _name: ClassVar[str]
    _config_class: ClassVar[type[EpisodeConfig]]
    _lives: ClassVar[bool] = False

    def __init__(self, config: EpisodeConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None):
        check_mode(self._name, render_mode)
        if not isinstance(config, self._config_class):
            config = validate(self._config_class, cast(Mapping[str, Any], config or {}), self._name)
        self.config = config
        self.render_mode = render_mode
        if config.live is not None and not self._lives:
            raise InputError(self._name, "backend", "got live; allowed for this environment: sim")
        self._target = None if config.live is None else config.live.target()
        self._source = EpisodeSource(config)
        self._run: ServingRun | None = None

    @property
    def most_engines(self) -> int:
        """Most engines of an episode."""
        return self.config.largest_cluster if self._target is None else len(self._target.urls)

    def _draw_episode(
        self, seed: int | None, options: Mapping[str, Any] | None
    ) -> tuple[ClusterConfig, RequestTable, int]:
        """Seed the environment and draw the cluster, the requests and the run's seed of the next episode."""
        super().reset(seed=seed)
        return self._source.draw(self.np_random, (options or {}).get("load"))

    def _live_run(
        self,
        table: RequestTable,
        engine_policy: EnginePolicy | None,
        seed: int,
        *,
        hold: bool = False,
        expert_policies: Sequence[ExpertPolicy] = (),
    ) -> LiveRun:
        """Begin an episode on the live engines; the one before it is cut off."""
        from servegym.envs.live.run import LiveRun

        assert self.config.live is not None
        assert self._target is not None
        self.close()
        return LiveRun(
            table,
            self._target,
            self.config.live,
            engine_policy,
            hold=hold,
            seed=seed,
            expert_policies=expert_policies,
        )

    def close(self) -> None:
        """End the episode."""
        if self._run is not None:
            self._run.close()

    def _begin(self, run: ServingRun, reference: SimulatedCluster | None = None) -> None:
        """Make a run the episode's, beside a finished one of the reference."""
        self._run = run
        self._reference_metrics = None if reference is None else episode_metrics(reference)
        self._meter = RewardMeter(self.config.reward, run, reference)

    @property
    def run(self) -> ServingRun:
        """The episode's run; RuntimeError before the first reset."""
        return self._running()

    @property
    def meter(self) -> RewardMeter:
        """What takes the episode's rewards."""
        return self._meter

    def _running(self) -> ServingRun:
        """Return the episode's run.

        Raises:
            RuntimeError: there is none yet.
        """
        if self._run is None:
            raise RuntimeError("call reset() before step()")
        return self._run

    def _simulated(self) -> SimulatedCluster:
        """Return the episode's run, which is a simulation."""
        run = self._running()
        assert isinstance(run, SimulatedCluster)
        return run

    def _rewards(self, row: int | None = None, until_s: float | None = None) -> tuple[FloatArray, dict[str, Any]]:
        """Take the rewards since the last call; returns the parts, and what ``info`` says of the step."""
        before = self._meter.now_s
        parts = self._meter.take(row, until_s)
        named = {part: value for part, value in zip(PARTS, parts.tolist(), strict=True) if value}
        return parts, {"elapsed_s": self._meter.now_s - before, "reward_parts": named}

    def _final_metrics(self) -> dict[str, Any]:
        """Return what the last ``info`` says of the episode: its metrics, and those of a reference."""
        found = {"metrics": episode_metrics(self._running())}
        if self._reference_metrics is not None:
            found["reference_metrics"] = self._reference_metrics
        return found

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """Return queues, KV use and expert heat per engine: text, or a picture of shape (540, 960, 3)."""
        return render(self._run if isinstance(self._run, SimulatedCluster) else None, self.render_mode)


def feature_box(features: Sequence[Feature], rows: int | None = None) -> spaces.Box:
    """Return the space of one row of features, shape (features,), or of several, shape (rows, features)."""
    low, high = (np.array([getattr(one, end) for one in features], dtype=np.float32) for end in ("low", "high"))
    if rows is not None:
        low, high = np.tile(low, (rows, 1)), np.tile(high, (rows, 1))
    return spaces.Box(low, high, dtype=np.float32)


def episode_metrics(run: ServingRun) -> dict[str, Any]:
    """Return what an episode came to: means in seconds, counts, and the share of requests of each engine."""
    outcome = RunOutcome.of(run)
    share = np.bincount(outcome.engine[outcome.engine >= 0], minlength=run.config.size) / len(outcome.engine)
    metrics = outcome.metrics()
    found = {name: metrics[name]["mean"] for name in ("ttft_s", "tpot_s", "e2e_s")}
    found |= {"ttft_p99_s": metrics["ttft_s"]["p99"]}
    found |= {name: metrics[name] for name in ("throughput_rps", "requests", "preemptions")}
    return found | {"engine_share": share.tolist()}
