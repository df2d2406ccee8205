"""Configuration of a validation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.live.options import LiveOptions
from servegym.envs.requests import WorkloadChoice
from servegym.envs.simulation import Policies
from servegym.errors import nearest

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One live run and the simulation that repeats it.

    Attributes:
        repetition: which one; all repeat the same requests.
        scenario: label.
        load: share of the capacity that the simulator predicts.
        policy: label.
    """

    repetition: int
    scenario: str
    load: float
    policy: str


class ValidationScenario(Config):
    """Requests at some loads, under some policies."""

    workload: WorkloadChoice = Field(description="its own load or rate_rps is not used")
    loads: tuple[Positive, ...] = Field(
        min_length=1, description="shares of the capacity that the simulator predicts for this workload"
    )
    policies: tuple[str, ...] = Field(default=(), description="labels; default: the first policy alone")


class Bounds(Config):
    """Relative errors that are called small."""

    ttft: Positive = Field(default=0.10, description="of the mean and the median of TTFT")
    tpot: Positive = Field(default=0.05, description="of the mean and the median of TPOT")
    p95: Positive = Field(default=0.15, description="of the 95th percentiles of TTFT, TPOT and E2E")
    rank: Annotated[float, Field(ge=-1, le=1)] = Field(
        default=0.9, description="Spearman's correlation of the policies' mean TTFT, at least"
    )


class ValidationConfig(Config):
    """Input of ``servegym validate``."""

    name: str = Field(default="validation", description="names the validation in reports")
    live: LiveOptions = Field(default=LiveOptions(), description="the engines")
    profile: str | None = Field(default=None, description="what `servegym calibrate` has written of these engines")
    scenarios: dict[str, ValidationScenario] = Field(min_length=1, description="by label")
    policies: dict[str, Policies] = Field(min_length=1, description="label -> policies of the layers")
    repetitions: Annotated[int, Field(ge=1)] = Field(default=3, description="live runs of the same requests")
    bounds: Bounds = Field(default=Bounds(), description="errors that are called small")
    queue_every_s: Positive = Field(default=0.5, description="interval in which queue lengths are compared")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=2000, description="of the requests; runs of the same cell share them"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for label, scenario in self.scenarios.items():
            for policy in scenario.policies:
                if policy not in self.policies:
                    raise ValueError(
                        f"policies of scenario {label} among policies, not {policy!r}; {nearest(policy, self.policies)}"
                    )
        for label, policies in self.policies.items():
            if policies.expert != Policies().expert:
                raise ValueError(f"live engines with the placement that they have, not {policies.expert} of {label}")
        return self

    @property
    def cells(self) -> list[Cell]:
        """All cells, repetition by repetition, so that a drift of the machine falls on all alike."""
        first = next(iter(self.policies))
        return [
            Cell(repetition, label, load, policy)
            for repetition in range(self.repetitions)
            for label, scenario in self.scenarios.items()
            for load in scenario.loads
            for policy in scenario.policies or (first,)
        ]

    def digest(self) -> str:
        """Return a hash of everything that the result depends on, the engines' addresses apart."""
        content = self.model_dump_json(exclude={"live": {"cluster", "urls", "model"}, "bounds": True})
        return hashlib.sha256(content.encode()).hexdigest()
