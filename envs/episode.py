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
from servegym.envs.randomisation import Randomisation, Sampled, draw
from servegym.envs.rendering import RENDER_MODES, check_mode, render
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.rewards import PARTS, RewardConfig, RewardMeter
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
    cluster: ClusterConfig = ClusterConfig()
    workload: WorkloadChoice = WorkloadChoice(name="azure-conv", load=0.8)
    randomise: Randomisation = Randomisation()
    load: Sampled | None = Field(default=None, description="load per episode, overrides the workload's")
    episode_requests: Annotated[int, Field(ge=1)] = Field(default=1000, description="requests of an episode")
    random_end: bool = Field(default=False, description="geometric number of requests with that mean, a memoryless end")
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _the_tail_begins_somewhere(self) -> Self:
        if self.reward.tail and self.reward.tail_s is None and getattr(self, "reference", None) is None:
            raise ValueError("reward.tail_s, or a reference policy whose quantile it is")
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

    @property
    def largest_cluster(self) -> int:
        """Most engines of an episode."""
        return max(self.randomise.engines or (self.cluster.size,))


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
        self._source = RequestSource(config.workload, config.cluster)
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
        return draw_episode(self.config, self._source, self.np_random, (options or {}).get("load"))

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
        """Make a run the episode's."""
        self._run = run
        self._meter = RewardMeter(self.config.reward, run, reference)

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

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """Return queues, KV use and expert heat per engine: text, or a picture of shape (540, 960, 3)."""
        return render(self._run if isinstance(self._run, SimulatedCluster) else None, self.render_mode)


def draw_episode(
    config: EpisodeConfig, source: RequestSource, rng: np.random.Generator, load: float | None = None
) -> tuple[ClusterConfig, RequestTable, int]:
    """Draw the cluster, the requests and the run's seed of an episode.

    Args:
        config: what may differ between episodes.
        source: of the requests.
        rng: of the draws.
        load: of the episode; None: as the config says.
    """
    run_seed = int(rng.integers(2**31))
    cluster = config.randomise.draw(config.cluster, rng)
    scale = config.randomise.draw_lengths(rng)
    if load is None and config.load is not None:
        load = draw(config.load, rng)
    count = config.episode_requests
    if config.random_end:
        count = int(rng.geometric(1.0 / count))
    if config.live is not None:
        return cluster, config.live.table(config.workload, run_seed, count), run_seed
    return cluster, source.table(run_seed, load=load, requests=count, cluster=cluster, scale=scale), run_seed


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
