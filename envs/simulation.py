"""Simulate a cluster from a config: ``servegym simulate``, and what evaluation is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.configuration import Config
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome, engine_metrics
from servegym.envs.simulator.timeline import Timeline
from servegym.envs.workloads.table import RequestTable

Positive = Annotated[float, Field(gt=0)]


class Policies(Config):
    """The policies of the three layers."""

    request: PolicySpec = Field(default=PolicySpec(name="fcfs"), description="order of the waiting queues")
    engine: PolicySpec = Field(default=PolicySpec(name="round_robin"), description="choice of engines")
    expert: PolicySpec = Field(default=PolicySpec(name="linear"), description="placement of the experts")

    @model_validator(mode="after")
    def _exist(self) -> Self:
        self.make()
        return self

    def make(self) -> tuple[Any, Any, Any]:
        """Return a fresh policy per layer: request, engine, expert.

        Raises:
            InputError: an unknown name or wrong parameters.
        """
        return create("request", self.request), create("engine", self.engine), create("expert", self.expert)


class Objectives(Config):
    """Service level objectives that goodput counts; a request's own deadline replaces ``ttft_s``."""

    ttft_s: Positive = Field(default=1.0, description="time to first token at most, seconds")
    tpot_s: Positive = Field(default=0.05, description="time per output token at most, seconds")


class SimulationConfig(Config):
    """Input of ``servegym simulate``."""

    cluster: ClusterConfig = Field(default=ClusterConfig(), description="the simulated cluster")
    workload: WorkloadChoice = Field(description="the requests")
    policies: Policies = Field(default=Policies(), description="of the three layers")
    slo: Objectives = Field(default=Objectives(), description="what goodput counts as met")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="share of the first arrivals that the metrics leave out, while the cluster fills"
    )
    timeline_s: Positive | None = Field(
        default=None, description="also report queues, KV use, latencies and experts in intervals of this length"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the requests and of randomised policies")


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A finished run.

    Attributes:
        config: what was simulated.
        outcome: the outcome of each request.
        engines: what the engines report.
        timeline: the run over time, one list per column, if asked for.
        wall_s: time that the simulation took; compilation and the making of requests apart.
    """

    config: SimulationConfig
    outcome: RunOutcome
    engines: dict[str, Any]
    timeline: dict[str, list[float]] | None
    wall_s: float

    def metrics(self) -> dict[str, Any]:
        """Return the metrics that ``servegym simulate --json`` prints."""
        slo = self.config.slo
        requests = self.outcome.metrics(
            warmup_share=self.config.warmup_share, ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s
        )
        timeline = {} if self.timeline is None else {"timeline": self.timeline}
        return requests | self.engines | {"wall_s": self.wall_s} | timeline


def simulate(
    config: SimulationConfig,
    *,
    seed: int | None = None,
    table: RequestTable | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimulationResult:
    """Run one simulation.

    Args:
        config: what to simulate.
        seed: overrides the config's seed, for the requests and for randomised policies.
        table: the requests, where several runs share them; else they are drawn from the config's workload.
        progress: called now and then with the share of requests that have finished.

    Raises:
        InputError: unknown names, a bad trace, a request that can never fit.
    """
    seed = config.seed if seed is None else seed
    if table is None:
        table = RequestSource(config.workload, config.cluster).table(seed)
    run = SimulatedCluster(config.cluster, table, *config.policies.make(), seed=seed, source=config.workload.label)
    timeline = Timeline(run, config.timeline_s) if config.timeline_s is not None else None
    run.warm_up()
    start = time.perf_counter()
    run.run(progress)
    wall = time.perf_counter() - start
    return SimulationResult(
        config=config,
        outcome=RunOutcome.of(run),
        engines=engine_metrics(run),
        timeline=timeline.table() if timeline is not None else None,
        wall_s=wall,
    )
