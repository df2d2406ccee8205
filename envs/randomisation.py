"""What may differ from episode to episode, so that a policy learns more than one cluster."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from servegym.configuration import Config
from servegym.envs.simulator.config import ClusterConfig, Telemetry

Number = Annotated[float, Field(gt=0)]
Sampled = Number | tuple[Number, Number]
"""A fixed value, or the ends of an interval from which each episode draws uniformly."""


def draw(value: Sampled, rng: np.random.Generator) -> float:
    """Return a fixed value, or a uniform draw from an interval."""
    return float(rng.uniform(*value)) if isinstance(value, tuple) else float(value)


class ClusterRandomisation(Config):
    """Draws per episode; without a field the cluster's own value stays."""

    engines: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="numbers of engines to choose from"
    )
    slowdown: Sampled | None = Field(default=None, description="factor on step times, per engine: unequal hardware")
    step_time: Sampled | None = Field(default=None, description="factor on step times of the whole cluster")
    telemetry_lag_s: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None

    def draw(self, cluster: ClusterConfig, rng: np.random.Generator) -> ClusterConfig:
        """Return the cluster of one episode."""
        changes: dict[str, object] = {}
        if self.engines:
            changes["engines"] = int(rng.choice(self.engines))
        if self.telemetry_lag_s is not None:
            lag = float(rng.uniform(*self.telemetry_lag_s))
            changes["telemetry"] = Telemetry(period_s=cluster.telemetry.period_s, lag_s=lag)
        drawn = cluster.model_copy(update=changes)
        if self.slowdown is None and self.step_time is None:
            return drawn
        common = draw(self.step_time, rng) if self.step_time is not None else 1.0
        groups = []
        for group in drawn.all_groups:
            for _ in range(group.count):
                own = draw(self.slowdown, rng) if self.slowdown is not None else 1.0
                groups.append(group.model_copy(update={"count": 1, "slowdown": group.slowdown * common * own}))
        return drawn.model_copy(update={"groups": tuple(groups)})
