"""Where episodes come from: a workload and the cluster that serves it, or one of several such pairs each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from servegym.configuration import Config, merged, validate
from servegym.envs.randomisation import draw
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable

if TYPE_CHECKING:
    from servegym.envs.episode import EpisodeConfig


class Scenario(Config):
    """A workload and the cluster that serves it."""

    workload: WorkloadChoice = Field(description="the requests; their own load or rate_rps is not used")
    cluster: dict[str, Any] = Field(default_factory=dict, description="changes to the common cluster, by key")

    def on(self, cluster: ClusterConfig, label: str) -> ClusterConfig:
        """Return the cluster with the changes.

        Raises:
            InputError: they are not allowed.
        """
        if not self.cluster:
            return cluster
        changed = merged(cluster.model_dump(mode="json"), self.cluster)
        return validate(ClusterConfig, changed, f"scenarios.{label}.cluster")


class EpisodeSource:
    """Draws episodes.

    Args:
        config: what may differ between them.

    Raises:
        InputError: an unknown workload or profile.
    """

    def __init__(self, config: EpisodeConfig) -> None:
        self._config = config
        clusters = config.clusters()
        workloads = [scenario.workload for scenario in config.scenarios.values()] or [config.workload]
        self._sources = [
            (cluster, RequestSource(workload, cluster)) for cluster, workload in zip(clusters, workloads, strict=True)
        ]

    def draw(
        self, rng: np.random.Generator, load: float | None = None, scenario: int | None = None
    ) -> tuple[ClusterConfig, RequestTable, int]:
        """Return the cluster, the requests and the run's seed of an episode.

        Args:
            rng: of the draws.
            load: of the episode; None: as the config says.
            scenario: which one, counted on beyond the last; None: drawn.
        """
        config = self._config
        run_seed = int(rng.integers(2**31))
        drawn = int(rng.integers(len(self._sources))) if len(self._sources) > 1 else 0
        chosen = drawn if scenario is None else scenario % len(self._sources)
        base, source = self._sources[chosen]
        cluster = config.randomise.draw(base, rng)
        scale = config.randomise.draw_lengths(rng)
        if load is None and config.load is not None:
            load = draw(config.load, rng)
        count = (source.choice.requests if config.scenarios else None) or config.episode_requests
        if config.requests_grow:
            count = max(count * cluster.size // base.size, 1)
        if config.random_end:
            count = int(rng.geometric(1.0 / count))
        if config.live is not None:
            return cluster, config.live.table(config.workload, run_seed, count), run_seed
        return cluster, source.table(run_seed, load=load, requests=count, cluster=cluster, scale=scale), run_seed
