"""Speed and memory of the simulator on one core. Run with ``pytest tests/benchmarks -s``.

Requests: prompt mean 500, output mean 250 tokens, exponential; 70 % of the measured capacity; round robin and FCFS,
inside the kernel. The ceilings are the project's promises, generous on a quiet machine; the printed table is the
result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.registry import create
from servegym.envs.simulator.capacity import capacity_rps
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable

PROFILE = "qwen3-30b-a3b-h200"


def _table(count: int, rate_rps: float | None) -> RequestTable:
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.exponential(500, count), 1, 8000).astype(np.int32)
    outputs = np.clip(rng.exponential(250, count), 1, 4000).astype(np.int32)
    arrivals = np.zeros(count) if rate_rps is None else np.cumsum(rng.exponential(1 / rate_rps, count))
    return RequestTable.build(arrivals, prompts, outputs)


def _measure(engines: int, count: int, caching: bool, repeats: int = 3) -> dict[str, float]:
    cluster = ClusterConfig(engines=engines, profile=PROFILE, engine={"enable_prefix_caching": caching})
    single = cluster.model_copy(update={"engines": 1})
    rate = 0.7 * engines * capacity_rps(single, lambda wanted: _table(wanted, None))
    table = _table(count, rate)
    best = np.inf
    for _ in range(repeats):
        run = SimulatedCluster(cluster, table, create("request", "fcfs"), create("engine", "round_robin"))
        run.warm_up()
        start = time.perf_counter()
        run.run()
        best = min(best, time.perf_counter() - start)
    assert run.finished == count
    steps = int(run.memory.engines["steps"].sum())
    row = {
        "requests/s": count / best,
        "output tokens/s": float(table.output_tokens.sum()) / best,
        "steps/s": steps / best,
        "batch": float(table.output_tokens.sum()) / steps,
    }
    print(
        f"{engines:3d} engines, {count:9,d} requests, caching {'on ' if caching else 'off'}: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in row.items())
    )
    return row


@pytest.mark.parametrize("caching", [False, True])
def test_requests_per_second_by_engines(caching: bool) -> None:
    rows = {engines: _measure(engines, max(200_000, 12_500 * engines), caching) for engines in (1, 4, 16, 64)}
    floor = 100_000 if caching else 200_000
    assert all(row["requests/s"] >= floor for row in rows.values())
    speeds = [row["requests/s"] for row in rows.values()]
    assert max(speeds) / min(speeds) <= 2.0


@pytest.mark.parametrize("caching", [False, True])
def test_cost_per_request_is_flat_in_their_number(caching: bool) -> None:
    speeds = [_measure(4, count, caching)["requests/s"] for count in (10_000, 100_000, 1_000_000)]
    assert max(speeds) / min(speeds) <= 2.0


def test_a_million_requests_fit_into_a_gigabyte() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, env=environment)
    peak = int(process.stdout)
    print(f"peak memory for a million requests, caching on: {peak / 2**20:.0f} MiB")
    assert peak < 2**30


if __name__ == "__main__":
    simulated = SimulatedCluster(
        ClusterConfig(engines=4, profile=PROFILE),
        _table(1_000_000, 150.0),
        create("request", "fcfs"),
        create("engine", "round_robin"),
    )
    simulated.run()
    # Not getrusage: its peak survives exec, and would be that of the process which started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)
