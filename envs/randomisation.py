"""What may differ from episode to episode, so that a policy learns more than one cluster."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from servegym.configuration import Config
from servegym.envs.profiles.profile import StepFactors
from servegym.envs.simulator.config import ClusterConfig, Telemetry
from servegym.envs.workloads.generation import LengthScale

Number = Annotated[float, Field(gt=0)]
Sampled = Number | tuple[Number, Number]
"""A fixed value, or the ends of an interval from which each episode draws uniformly."""


def draw(value: Sampled, rng: np.random.Generator) -> float:
    """Return a fixed value, or a uniform draw from an interval."""
    return float(rng.uniform(*value)) if isinstance(value, tuple) else float(value)


class Randomisation(Config):
    """Draws per episode; without a field the cluster's or the workload's own value stays."""

    engines: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="numbers of engines to choose from; of groups those that keep their proportions"
    )
    slowdown: Sampled | None = Field(default=None, description="factor on step times, per engine: unequal hardware")
    step_time: Sampled | None = Field(default=None, description="factor on step times of the whole cluster")
    step_terms: Sampled | None = Field(
        default=None, description="factor on each term of the profile's step time, drawn apart: another hardware"
    )
    telemetry_lag_s: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="range of the delay from engine to router, seconds"
    )
    prompt_scale: Sampled | None = Field(default=None, description="factor on the prompt tokens of all requests")
    output_scale: Sampled | None = Field(default=None, description="factor on the output tokens of all requests")

    def sizes(self, cluster: ClusterConfig) -> list[int]:
        """Return the numbers of engines that a cluster may get; empty where it keeps its own."""
        return [size for size in self.engines if cluster.resized(size) is not None]

    def draw(self, cluster: ClusterConfig, rng: np.random.Generator) -> ClusterConfig:
        """Return the cluster of one episode."""
        changes: dict[str, object] = {}
        sizes = self.sizes(cluster)
        if sizes:
            resized = cluster.resized(int(rng.choice(sizes)))
            assert resized is not None
            cluster = resized
        if self.telemetry_lag_s is not None:
            lag = float(rng.uniform(*self.telemetry_lag_s))
            changes["telemetry"] = Telemetry(period_s=cluster.telemetry.period_s, lag_s=lag)
        drawn = cluster.model_copy(update=changes)
        if self.slowdown is None and self.step_time is None and self.step_terms is None:
            return drawn
        common = draw(self.step_time, rng) if self.step_time is not None else 1.0
        terms = None
        if self.step_terms is not None:
            terms = StepFactors(**{name: draw(self.step_terms, rng) for name in StepFactors.model_fields})
        groups = []
        for group in drawn.all_groups:
            factors = group.step_factors if terms is None else group.step_factors.times(terms)
            group = group.model_copy(update={"slowdown": group.slowdown * common, "step_factors": factors})
            if self.slowdown is None:
                groups.append(group)
                continue
            for _ in range(group.count):
                slowdown = group.slowdown * draw(self.slowdown, rng)
                groups.append(group.model_copy(update={"count": 1, "slowdown": slowdown}))
        return drawn.model_copy(update={"groups": tuple(groups)})

    def draw_lengths(self, rng: np.random.Generator) -> LengthScale:
        """Return the factors on prompt and output lengths of one episode."""
        prompt, output = (
            1.0 if value is None else draw(value, rng) for value in (self.prompt_scale, self.output_scale)
        )
        return LengthScale(prompt, output)
