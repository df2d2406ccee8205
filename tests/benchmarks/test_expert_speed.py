"""Speed of the simulator with the expert model. Run with ``pytest tests/benchmarks/test_expert_speed.py -s``."""

from __future__ import annotations

import time

import numpy as np
import pytest

from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable

# The promise: mean-field keeps a quarter of the kernel's own floor of 200,000 requests/s.
FLOOR_RPS = 50_000


def _table(count: int, rate_rps: float) -> RequestTable:
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.exponential(500, count), 1, 8000).astype(np.int32)
    outputs = np.clip(rng.exponential(250, count), 1, 4000).astype(np.int32)
    return RequestTable.build(np.cumsum(rng.exponential(1 / rate_rps, count)), prompts, outputs)


def _measure(name: str, mode: str | None, count: int, ranks: int) -> float:
    experts = None if mode is None else {"mode": mode, "ranks": ranks, "routing": {"preset": "qwen3-30b-a3b"}}
    cluster = ClusterConfig.model_validate(
        {"engines": ranks, "profile": "qwen3-30b-a3b-h200-ep4", "mode": "lockstep", "experts": experts}
    )
    best = np.inf
    for _ in range(3):
        run = SimulatedCluster(
            cluster, _table(count, 20.0 * ranks), create("request", "fcfs"), create("engine", "round_robin")
        )
        run.warm_up()
        start = time.perf_counter()
        run.run()
        best = min(best, time.perf_counter() - start)
    steps = int(run.memory.engines["steps"].max())
    print(f"{ranks} ranks, {name:9s}: {count / best:11,.0f} requests/s, {steps / best:11,.0f} steps/s")
    return count / best


@pytest.mark.parametrize("ranks", [4, 8])
def test_the_mean_field_keeps_the_kernels_speed(ranks: int) -> None:
    _measure("balanced", None, 100_000, ranks)
    assert _measure("mean field", "mean_field", 100_000, ranks) >= FLOOR_RPS
    _measure("sampled", "sampled", 500, ranks)
