"""Configuration of an evaluation."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from servegym.agents.evaluation.published import PublishedFigure
from servegym.configuration import Config
from servegym.envs.live.options import LiveOptions
from servegym.envs.requests import WorkloadChoice
from servegym.envs.simulation import Objectives, Policies
from servegym.envs.simulator.config import ClusterConfig
from servegym.errors import nearest

Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


class EvaluationConfig(Config):
    """Input of ``servegym evaluate``: each policy meets the same requests in each cell (workload, load, seed)."""

    name: str = "evaluation"
    cluster: ClusterConfig = ClusterConfig()
    live: LiveOptions | None = Field(default=None, description="engines that run, in place of the simulated cluster")
    workloads: tuple[WorkloadChoice, ...] = Field(min_length=1, description="their own load or rate_rps is not used")
    loads: tuple[Positive, ...] = Field(
        default=(), description="shares of the cluster's capacity; default: 0.8, or none with rates_rps"
    )
    rates_rps: tuple[Positive, ...] = Field(default=(), description="mean arrival rates, instead of loads")
    seeds: Annotated[int, Field(ge=1)] | tuple[Seed, ...] = Field(default=5, description="how many, or which")
    policies: dict[str, Policies] = Field(min_length=1, description="label -> policies of the three layers")
    baseline: str = Field(description="label of the policy that the others are compared with")
    slo: Objectives = Objectives()
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    published: tuple[PublishedFigure, ...] = Field(default=(), description="figures to compare the result with")

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
        labels = [workload.label for workload in self.workloads]
        if len(set(labels)) < len(labels):
            raise ValueError("workloads that differ by name")
        return self

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

    def digest(self) -> str:
        """Hash of the config, which results carry."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]
