"""How many requests per second a cluster can finish, by saturating it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig, Telemetry
from servegym.envs.workloads.table import RequestTable

# Requests per slot of the running batches: enough for a steady middle.
_WAVES = 4


def capacity_rps(cluster: ClusterConfig, sample: Callable[[int], RequestTable]) -> float:
    """Measure the throughput of a saturated cluster, in requests per second.

    All requests are there from the start and go to the engine with the fewest; the rate is that of the middle of the
    run, when all batches are full. Faults and stale telemetry do not count.

    Args:
        cluster: the cluster.
        sample: returns a table of about as many requests as asked for, all open-loop.
    """
    undisturbed = cluster.model_copy(update={"faults": (), "random_faults": (), "telemetry": Telemetry(period_s=0.0)})
    slots = sum(spec.limits.max_num_seqs for spec in cluster.expand())
    table = sample(_WAVES * slots)
    run = SimulatedCluster(undisturbed, table, create("request", "fcfs"), create("engine", "least_requests"))
    run.run()
    finish = np.sort(run.memory.requests["finish_s"])
    low, high = int(0.2 * len(finish)), int(0.7 * len(finish))
    return float((high - low) / (finish[high] - finish[low]))
