"""A run in detail: each engine and the experts over time, as pictures show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import FloatArray
from servegym.envs.simulator.timeline import kv_usage, sample_every

if TYPE_CHECKING:
    from servegym.envs.simulator.cluster import SimulatedCluster


@dataclass(frozen=True, slots=True)
class ExpertSeries:
    """The experts of a run over time; loads are those of the last window of steps, as an expert policy sees them.

    Attributes:
        popularity: tokens of each logical expert over the mean of its layer, shape (samples, layers, experts).
        heaviest: load of the heaviest EP rank over the mean rank, mean over groups, shape (samples, layers).
        replacements: re-placements begun so far in all groups, shape (samples,).
    """

    popularity: npt.NDArray[np.float32]
    heaviest: FloatArray
    replacements: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Series:
    """A run over time.

    Attributes:
        time_s: of the samples, seconds, shape (samples,).
        waiting: requests in the waiting queue of each engine, shape (samples, engines).
        running: requests in its running batch, shape (samples, engines).
        kv_usage: share of its KV blocks in use, 0..1, shape (samples, engines).
        experts: None without an expert model.
    """

    time_s: FloatArray
    waiting: FloatArray
    running: FloatArray
    kv_usage: FloatArray
    experts: ExpertSeries | None


class Recording:
    """Samples the engines and experts of a cluster every ``every_s`` seconds while it runs.

    Args:
        cluster: the cluster, not yet run.
        every_s: length of an interval, seconds.
    """

    def __init__(self, cluster: SimulatedCluster, every_s: float) -> None:
        self._cluster = cluster
        self._rows: dict[str, list[npt.NDArray[np.float64]]] = {
            name: [] for name in ("time_s", "waiting", "running", "kv_usage", "heaviest", "replacements")
        }
        self._popularity: list[npt.NDArray[np.float32]] = []
        sample_every(cluster, every_s, self._sample)

    def series(self) -> Series:
        """Return what was sampled so far."""
        arrays = {name: np.array(rows, dtype=np.float64) for name, rows in self._rows.items()}
        experts = None
        if self._cluster.experts is not None:
            replacements = arrays["replacements"].astype(np.int64)
            experts = ExpertSeries(np.array(self._popularity), arrays["heaviest"], replacements)
        return Series(arrays["time_s"], arrays["waiting"], arrays["running"], arrays["kv_usage"], experts)

    def _sample(self) -> None:
        cluster, engines, rows = self._cluster, self._cluster.memory.engines, self._rows
        rows["time_s"].append(np.asarray(cluster.environment.now))
        rows["waiting"].append(engines["waiting"].copy())
        rows["running"].append(engines["running"] + engines["leaving"])
        rows["kv_usage"].append(kv_usage(engines))
        if cluster.experts is None:
            return
        groups = cluster.experts.groups
        tokens = np.sum([group.load(sources=False).tokens for group in groups], axis=0)
        mean = tokens.mean(axis=1, keepdims=True)
        self._popularity.append(np.where(mean > 0, tokens / np.maximum(mean, 1e-300), 1.0).astype(np.float32))
        rows["heaviest"].append(np.mean([group.rank_heat().max(axis=1) for group in groups], axis=0))
        rows["replacements"].append(np.asarray(sum(replacer.count for replacer in cluster.replacers)))
