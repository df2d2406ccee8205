"""Where the requests of a run come from: a workload or a trace, at a rate or at a share of the cluster's capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.simulator.capacity import capacity_rps
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads import TraceConfig, WorkloadConfig, generate, load_trace, load_workload
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class WorkloadChoice(Config):
    """Which requests, how many, and how dense.

    A generated workload needs ``load`` or ``rate_rps``; a trace keeps its own times without either. The seed draws the
    requests of a generated workload, and the window of ``requests`` consecutive requests of a longer trace.
    """

    name: str | None = Field(default=None, description="shipped workload or path of a workload file")
    trace: TraceConfig | None = Field(default=None, description="a trace file instead of a generator")
    requests: Count | None = Field(default=None, description="how many; default: the whole trace, or 10,000")
    load: Positive | None = Field(default=None, description="mean arrival rate as a share of the cluster's capacity")
    rate_rps: Positive | None = Field(default=None, description="mean arrival rate, requests per second")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.name is None) == (self.trace is None):
            raise ValueError("exactly one of name and trace")
        if self.load is not None and self.rate_rps is not None:
            raise ValueError("at most one of load and rate_rps")
        if self.name is not None and self.load is None and self.rate_rps is None:
            raise ValueError("load or rate_rps for a generated workload")
        return self

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.name if self.name is not None else str(self.trace.path if self.trace else "")


class RequestSource:
    """Makes the tables of a :class:`WorkloadChoice` for a cluster; reads and measures once, draws many times.

    Args:
        choice: the workload.
        cluster: the cluster whose capacity a load refers to and whose limits requests must fit.

    Raises:
        InputError: an unknown workload, a bad trace file.
    """

    def __init__(self, choice: WorkloadChoice, cluster: ClusterConfig) -> None:
        self.choice = choice
        self.cluster = cluster
        specs = cluster.expand()
        self.max_tokens = min(
            min(spec.limits.max_model_len, (spec.limits.num_blocks - 1) * spec.limits.block_size) for spec in specs
        )
        self._capacities: dict[str, float] = {}
        self._trace: RequestTable | None = None
        self._workload: WorkloadConfig | None = None
        if choice.trace is not None:
            self._trace = load_trace(choice.trace)
        else:
            self._workload = load_workload(str(choice.name))

    def table(
        self, seed: int, *, load: float | None = None, requests: int | None = None, cluster: ClusterConfig | None = None
    ) -> RequestTable:
        """Draw the requests of one run.

        Args:
            seed: the draw.
            load: overrides the choice's rate by a share of capacity.
            requests: overrides the choice's number.
            cluster: overrides the cluster that the load refers to.
        """
        load = load if load is not None else self.choice.load
        rate = self.choice.rate_rps
        if load is not None:
            rate = load * self.capacity_rps(cluster)
        count = requests or self.choice.requests
        if self._trace is not None:
            return self._window(self._trace, seed, count, rate)
        assert self._workload is not None
        assert rate is not None
        return generate(self._workload, requests=count or 10_000, rate_rps=rate, seed=seed, max_tokens=self.max_tokens)

    def capacity_rps(self, cluster: ClusterConfig | None = None) -> float:
        """Requests per second that the cluster finishes when it is saturated with this workload."""
        cluster = cluster or self.cluster
        key = cluster.model_dump_json()
        if key not in self._capacities:
            self._capacities[key] = capacity_rps(cluster, self.sample)
        return self._capacities[key]

    def sample(self, requests: int) -> RequestTable:
        """A fixed draw for measurements: lengths and sessions as they come, all there from the start."""
        if self._trace is not None:
            table = self._window(self._trace, 0, requests, None)
        else:
            assert self._workload is not None
            table = generate(self._workload, requests=requests, rate_rps=1.0, seed=0, max_tokens=self.max_tokens)
        count = len(table)
        return replace(table, arrival_s=np.zeros(count), parent=np.full(count, -1, dtype=np.int32))

    def _window(self, trace: RequestTable, seed: int, count: int | None, rate_rps: float | None) -> RequestTable:
        if count is not None and count < len(trace):
            first = int(np.random.default_rng(np.random.SeedSequence([seed, 0])).integers(len(trace) - count + 1))
            trace = trace.window(first, first + count)
        too_long = trace.prompt_tokens + trace.output_tokens > self.max_tokens
        if too_long.any():
            row = int(too_long.argmax())
            raise InputError(
                self.choice.label,
                f"requests[{row}]",
                f"got {trace.prompt_tokens[row]} prompt + {trace.output_tokens[row]} output tokens, which can never fit;"
                f" allowed: at most {self.max_tokens} tokens (KV cache and max_model_len of the engines)",
            )
        if rate_rps is not None:
            span = float(trace.arrival_s.max() - trace.arrival_s.min())
            if span > 0:
                trace = trace.scaled(rate_rps * span / len(trace))
        return trace
