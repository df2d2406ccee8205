"""Time of one decision of a deployed policy, numpy alone. Run with ``pytest tests/benchmarks -s``."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from servegym.agents.training.config import TrainConfig
from servegym.agents.training.trainer import train
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DECODE_STEP_S,
    E_KV_TOKENS,
    E_MAX_NUM_SEQS,
    E_PREFILL_TOKENS_PER_S,
    ENGINE_COLUMNS,
    EngineViews,
    RequestView,
)
from servegym.configuration import validate
from servegym.engine_bridge.bundle import load_bundle

CEILING_S = 1e-3  # what a router may spend on a decision, 99th percentile


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "name": "speed",
        "total_steps": 128,
        "algorithm": {"n_envs": 4, "n_steps": 32, "batch_size": 64},
        "env": {"workload": {"name": "azure-conv", "load": 0.5}, "episode_requests": 50, "reference": "lmetric"},
        "evaluation": {"every_steps": 128, "episodes": 1},
    }
    out = tmp_path_factory.mktemp("runs") / "speed"
    return train(validate(TrainConfig, config, "test"), out=out, progress=False).policy


@pytest.mark.parametrize("engines", [4, 16, 64])
def test_a_decision_is_fast(bundle: Path, engines: int) -> None:
    policy = load_bundle(bundle)
    rng = np.random.default_rng(0)
    data = rng.uniform(0, 50, (engines, ENGINE_COLUMNS))
    data[:, E_AVAILABLE] = 1.0
    data[:, E_MAX_NUM_SEQS], data[:, E_KV_TOKENS] = 256, 750_000
    data[:, E_PREFILL_TOKENS_PER_S], data[:, E_DECODE_STEP_S] = 60_000, 0.004
    request, views = RequestView(0, 1.0, 1.0, 800), EngineViews(data)
    times = []
    for _ in range(3000):
        start = time.perf_counter()
        policy.score(request, views)
        times.append(time.perf_counter() - start)
    p50, p99 = np.quantile(times[200:], (0.5, 0.99)).tolist()
    print(f"{engines:2d} engines: {1e6 * p50:.0f} us median, {1e6 * p99:.0f} us p99 a decision")
    assert p99 <= CEILING_S
