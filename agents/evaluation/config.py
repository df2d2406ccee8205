"""Configuration of an evaluation."""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from pydantic import Field, model_validator

from servegym.configuration import Config
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
    workloads: tuple[WorkloadChoice, ...] = Field(min_length=1, description="their own load or rate_rps is not used")
    loads: tuple[Positive, ...] = Field(default=(0.8,), min_length=1, description="shares of the cluster's capacity")
    seeds: Annotated[int, Field(ge=1)] | tuple[Seed, ...] = Field(default=5, description="how many, or which")
    policies: dict[str, Policies] = Field(min_length=1, description="label -> policies of the three layers")
    baseline: str = Field(description="label of the policy that the others are compared with")
    slo: Objectives = Objectives()
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.baseline not in self.policies:
            raise ValueError(
                f"a baseline among the policies, not {self.baseline!r}; {nearest(self.baseline, self.policies)}"
            )
        labels = [workload.label for workload in self.workloads]
        if len(set(labels)) < len(labels):
            raise ValueError("workloads that differ by name")
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def digest(self) -> str:
        """Hash of the config, which results carry."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]
