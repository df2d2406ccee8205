"""Configuration of an evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from servegym.agents.evaluation.published import PublishedFigure
from servegym.agents.execution import BackendConfig
from servegym.configuration import Config
from servegym.envs.live.options import LiveOptions
from servegym.envs.requests import WorkloadChoice
from servegym.envs.scenarios import Scenario
from servegym.envs.simulation import Objectives, Policies
from servegym.envs.simulator.config import ClusterConfig
from servegym.errors import InputError, nearest

Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Cell = tuple[int, float, int]
"""Index of the condition, load or rate, seed."""
Row = dict[str, Any]
"""Metrics of one policy in one cell."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What policies are compared under, its loads and seeds apart.

    Attributes:
        label: of reports.
        cluster: of one size.
        workload: the requests, without their rate.
        scenario: what the sizes of one scenario have in common.
    """

    label: str
    cluster: ClusterConfig
    workload: WorkloadChoice
    scenario: str


class EvaluationConfig(Config):
    """Input of ``servegym evaluate``: each policy meets the same requests in each cell (workload, load, seed)."""

    name: str = Field(default="evaluation", description="names the evaluation in reports")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="the simulated cluster")
    live: LiveOptions | None = Field(default=None, description="engines that run, in place of the simulated cluster")
    workloads: tuple[WorkloadChoice, ...] = Field(default=(), description="their own load or rate_rps is not used")
    scenarios: dict[str, Scenario] = Field(default_factory=dict, description="in place of workloads, by label")
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description=(
            "numbers of engines; groups keep their proportions, and the number of requests, which is that of the first"
            " size, grows alike. Default: the cluster's own"
        ),
    )
    loads: tuple[Positive, ...] = Field(
        default=(), description="shares of the cluster's capacity; default: 0.8, or none with rates_rps"
    )
    rates_rps: tuple[Positive, ...] = Field(default=(), description="mean arrival rates, instead of loads")
    seeds: Annotated[int, Field(ge=1)] | tuple[Seed, ...] = Field(default=5, description="how many, or which")
    policies: dict[str, Policies] = Field(min_length=1, description="label -> policies of the three layers")
    baseline: str = Field(description="label of the policy that the others are compared with")
    slo: Objectives = Field(default=Objectives(), description="what goodput counts as met")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="share of the first arrivals that the metrics leave out, while the cluster fills"
    )
    published: tuple[PublishedFigure, ...] = Field(default=(), description="figures to compare the result with")
    # Left out of the hash, and of all that is written down: it makes no difference to the result.
    backend: BackendConfig = Field(default=BackendConfig(), exclude=True, description="where cells run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.baseline not in self.policies:
            raise ValueError(
                f"a baseline among the policies, not {self.baseline!r}; {nearest(self.baseline, self.policies)}"
            )
        if self.loads and self.rates_rps:
            raise ValueError("either loads or rates_rps")
        if self.live is not None and not self.rates_rps:
            raise ValueError("rates_rps with live engines, whose capacity is not known")
        for label, policies in self.policies.items() if self.live is not None else ():
            if policies.expert != Policies().expert:
                raise ValueError(f"live engines with the placement that they have, not {policies.expert} of {label}")
        for figure in self.published:
            for label in (figure.policy, figure.baseline or self.baseline):
                if label not in self.policies:
                    raise ValueError(
                        f"published figures of the policies, not {label!r}; {nearest(label, self.policies)}"
                    )
            if figure.level is not None and figure.level not in self.levels:
                raise ValueError(f"published figures at a load or rate of the evaluation, not {figure.level:g}")
        if bool(self.workloads) == bool(self.scenarios):
            raise ValueError("either workloads or scenarios, one at least")
        if self.live is not None and self.backend.name != "local":
            raise ValueError(f"backend local with live engines, not {self.backend.name}")
        if self.live is not None and (self.scenarios or self.sizes):
            raise ValueError("neither scenarios nor sizes with live engines, which are as they are")
        labels = [condition.label for condition in self.conditions]
        if len(set(labels)) < len(labels):
            raise ValueError("workloads that differ by name, and sizes that differ")
        return self

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """Each scenario, or workload, on a cluster of each size."""
        plain = {choice.label: Scenario(workload=choice) for choice in self.workloads}
        if len(plain) < len(self.workloads):
            raise ValueError("workloads that differ by name")
        found = []
        for label, scenario in (self.scenarios or plain).items():
            cluster = scenario.on(self.cluster, label)
            workload = scenario.workload.model_copy(update={"load": None, "rate_rps": None})
            for size in self.sizes or (None,):
                if size is None:
                    found.append(Condition(label, cluster, workload, label))
                    continue
                count = None if workload.requests is None else workload.requests * size // self.sizes[0]
                found.append(
                    Condition(
                        f"{label}, {size} engines",
                        _resized(cluster, size, label),
                        workload.model_copy(update={"requests": count}),
                        label,
                    )
                )
        return tuple(found)

    @property
    def level_name(self) -> Literal["load", "rate_rps"]:
        """What ``levels`` counts, as a key of results."""
        return "rate_rps" if self.rates_rps else "load"

    @property
    def levels(self) -> tuple[float, ...]:
        """The loads, or the rates."""
        return self.rates_rps or self.loads or (0.8,)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def cells(self) -> list[Cell]:
        """All that each policy is run on."""
        return [
            (index, level, seed)
            for index in range(len(self.conditions))
            for level in self.levels
            for seed in self.seed_list
        ]

    def digest(self) -> str:
        """Hash of the config, which results carry."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def _resized(cluster: ClusterConfig, size: int, label: str) -> ClusterConfig:
    resized = cluster.resized(size)
    if resized is None:
        own = "+".join(str(group.count) for group in cluster.groups)
        raise InputError("", "sizes", f"got {size}; allowed for the groups of {label} ({own}): multiples of their sum")
    return resized
