"""A run over time: queues, KV use, latencies and the balance of experts in equal intervals."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import simpy

from servegym.baselines.interface import FloatArray

if TYPE_CHECKING:
    from servegym.envs.simulator.cluster import SimulatedCluster


def sample_every(cluster: SimulatedCluster, every_s: float, take: Callable[[], None]) -> None:
    """Have ``take`` called every ``every_s`` seconds of a run, until all requests have finished."""

    def process() -> Generator[simpy.Event, Any, None]:
        while cluster.finished < len(cluster.table):
            yield cluster.environment.timeout(every_s)
            take()

    cluster.environment.process(process())


def kv_usage(engines: npt.NDArray[Any]) -> FloatArray:
    """Return the share of each engine's KV blocks that is in use, shape (engines,), from its record."""
    return np.asarray(1.0 - engines["free_blocks"] / (engines["num_blocks"] - 1))


class Timeline:
    """Samples a cluster every ``every_s`` seconds while it runs.

    Args:
        cluster: the cluster, not yet run.
        every_s: length of an interval, seconds.
    """

    def __init__(self, cluster: SimulatedCluster, every_s: float) -> None:
        self._cluster = cluster
        self._rows: list[dict[str, float]] = []
        self._balance = self._balance_sums()
        sample_every(cluster, every_s, self._sample)

    def table(self) -> dict[str, list[float]]:
        """Return one list per column, an entry per whole interval of the run.

        Columns: ``time_s`` (end of the interval); ``running``, ``waiting`` (all engines) and ``kv_usage`` (mean) then;
        ``ttft_s`` of the first tokens and ``tpot_s`` of the requests that ended in the interval (NaN without
        any); with an expert model ``balancedness``, the mean over steps and layers of mean rank load over the heaviest,
        and ``replacements`` begun so far.
        """
        names = ["time_s", "running", "waiting", "kv_usage"]
        names += ["balancedness", "replacements"] if self._cluster.experts is not None else []
        columns = {name: [row[name] for row in self._rows] for name in names}
        times = np.array(columns["time_s"])
        requests = self._cluster.memory.requests
        gaps = np.where(requests["output"] > 1, requests["output"] - 1, np.nan)
        tpot = (requests["finish_s"] - requests["first_s"]) / gaps
        ttft = requests["first_s"] - requests["arrival_s"]
        if self._cluster.frontend is not None:
            ttft = ttft + self._cluster.frontend.before_s(requests["prompt"]) + self._cluster.frontend.after_s
        columns["ttft_s"] = self._means(times, requests["first_s"], ttft)
        columns["tpot_s"] = self._means(times, requests["finish_s"], tpot)
        return columns

    def _means(self, times: Any, when: Any, values: Any) -> list[float]:
        """Mean of the values that fall into each interval."""
        known = np.isfinite(values) & np.isfinite(when)
        interval = np.searchsorted(times, when[known])
        sums = np.bincount(interval, weights=values[known], minlength=len(times) + 1)[: len(times)]
        counts = np.bincount(interval, minlength=len(times) + 1)[: len(times)]
        return [float(total / count) if count else float("nan") for total, count in zip(sums, counts, strict=True)]

    def _balance_sums(self) -> tuple[float, int]:
        if self._cluster.experts is None:
            return 0.0, 0
        records = self._cluster.experts.records
        return float(records["balancedness_sum"].sum()), int(records["steps"].sum())

    def _sample(self) -> None:
        cluster, engines = self._cluster, self._cluster.memory.engines
        row = {
            "time_s": float(cluster.environment.now),
            "running": float((engines["running"] + engines["leaving"]).sum()),
            "waiting": float(engines["waiting"].sum()),
            "kv_usage": float(kv_usage(engines).mean()),
        }
        if cluster.experts is not None:
            (total, steps), (total_before, steps_before) = self._balance_sums(), self._balance
            self._balance = total, steps
            change = steps - steps_before
            row["balancedness"] = (total - total_before) / change if change else float("nan")
            row["replacements"] = float(sum(replacer.count for replacer in cluster.replacers))
        self._rows.append(row)
