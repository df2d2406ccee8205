"""Where the requests of a run come from: a workload or a trace, at a rate or at a share of the cluster's capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.simulator.capacity import capacity_rps
from servegym.envs.simulator.config import ClusterConfig, Telemetry
from servegym.envs.workloads.generation import LengthScale, generate
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces import TraceConfig
from servegym.envs.workloads.workload import WorkloadConfig, load_workload

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_REMEMBERED = 256


class WorkloadChoice(Config):
    """Which requests, how many, and how dense.

    A generated workload needs ``load`` or ``rate_rps``; a trace keeps its own times without either. The seed draws the
    requests of a generated workload, and the window of ``requests`` consecutive requests of a longer trace.
    """

    name: str | None = Field(default=None, description="shipped workload or path of a workload file")
    trace: TraceConfig | None = Field(default=None, description="a trace file instead of a workload")
    requests: Count | None = Field(default=None, description="how many; default: the whole trace, or 10,000")
    load: Positive | None = Field(default=None, description="mean arrival rate as a share of the cluster's capacity")
    rate_rps: Positive | None = Field(default=None, description="mean arrival rate, requests per second")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.name is None) == (self.trace is None):
            raise ValueError("exactly one of name and trace")
        if self.load is not None and self.rate_rps is not None:
            raise ValueError("at most one of load and rate_rps")
        return self

    @property
    def label(self) -> str:
        """Short name for tables and messages."""
        return self.name if self.trace is None else self.trace.path.name  # type: ignore[return-value]

    def resolve(self) -> WorkloadConfig:
        """Return the workload that is meant.

        Raises:
            InputError: an unknown name, or a field that is missing or wrong.
        """
        if self.trace is None:
            return load_workload(str(self.name))
        return WorkloadConfig(name=self.label, description="a trace", source=str(self.trace.path), trace=self.trace)


class RequestSource:
    """Makes the tables of a :class:`WorkloadChoice` for a cluster; measures capacity once, draws many times.

    Args:
        choice: the workload.
        cluster: the cluster whose capacity a load refers to and whose limits generated requests are made to fit.

    Raises:
        InputError: an unknown workload.
    """

    def __init__(self, choice: WorkloadChoice, cluster: ClusterConfig) -> None:
        self.choice = choice
        self.cluster = cluster
        self.workload = choice.resolve()
        self._capacities: dict[tuple[str, LengthScale], float] = {}
        # Generated requests are shortened to fit; one of a trace that does not fit is an error of the simulation.
        limits = [spec.limits for spec in cluster.expand()]
        fits = min(min(limit.max_model_len, (limit.num_blocks - 1) * limit.block_size) for limit in limits)
        self._max_tokens = fits if self.workload.trace is None else None

    def table(
        self,
        seed: int,
        *,
        load: float | None = None,
        rate_rps: float | None = None,
        requests: int | None = None,
        cluster: ClusterConfig | None = None,
        scale: LengthScale = LengthScale(),  # noqa: B008 - immutable
    ) -> RequestTable:
        """Draw the requests of one run.

        Args:
            seed: the draw.
            load: overrides the choice's rate by a share of capacity.
            rate_rps: overrides the choice's rate, requests per second.
            requests: overrides the choice's number.
            cluster: overrides the cluster that the load refers to.
            scale: factors on the lengths of a generated workload.

        Raises:
            InputError: a bad trace file, or no rate for a generated workload.
        """
        if load is None and rate_rps is None:
            load, rate_rps = self.choice.load, self.choice.rate_rps
        rate = rate_rps if load is None else load * self.capacity_rps(cluster, scale)
        count = requests or self.choice.requests
        if count is None and self.workload.trace is None:
            count = 10_000
        return generate(
            self.workload, rate_rps=rate, requests=count, seed=seed, max_tokens=self._max_tokens, scale=scale
        )

    def capacity_rps(
        self,
        cluster: ClusterConfig | None = None,
        scale: LengthScale = LengthScale(),  # noqa: B008 - immutable
    ) -> float:
        """Requests per second that the cluster finishes when it is saturated with this workload.

        Independent engines add up, and one that is twice as slow finishes half as much, so that each kind of engine is
        measured once; a lockstep cluster is measured as a whole.
        """
        cluster = cluster or self.cluster
        if cluster.mode == "lockstep":
            return self._measure(
                cluster.model_copy(update={"telemetry": Telemetry(), "faults": (), "random_faults": ()}), scale
            )
        alone = {"engines": 1, "groups": (), "telemetry": Telemetry(), "faults": (), "random_faults": ()}
        total = 0.0
        for group in cluster.all_groups:
            kind = {name: getattr(group, name) for name in ("profile", "engine", "step_factors")}
            one = self._measure(cluster.model_copy(update=alone | kind), scale)
            total += group.count / group.slowdown * one
        return total

    def _measure(self, cluster: ClusterConfig, scale: LengthScale) -> float:
        key = cluster.model_dump_json(), scale
        if key not in self._capacities:
            if len(self._capacities) >= _REMEMBERED:  # clusters and lengths drawn anew for each episode do not return
                self._capacities.clear()
            self._capacities[key] = capacity_rps(cluster, lambda requests: self._saturating(requests, scale))
        return self._capacities[key]

    def _saturating(self, requests: int, scale: LengthScale) -> RequestTable:
        """A fixed draw, all of it there from the start; of a trace it takes from all of its length."""
        if self.workload.trace is None:
            table = generate(
                self.workload, rate_rps=1.0, requests=requests, seed=0, max_tokens=self._max_tokens, scale=scale
            )
        else:
            table = generate(self.workload)
            chosen = np.random.default_rng(0).permutation(len(table))[:requests]
            table = table.take(np.sort(chosen))
        count = len(table)
        return replace(table, arrival_s=np.zeros(count), parent=np.full(count, -1, dtype=np.int32))
