"""Time of one step of ``EngineDispatch-v0`` beside the policy's own: 4 engines with 32 to 64 running requests each.

Run with ``pytest tests/benchmarks -s``.
"""

from __future__ import annotations

import time

import numpy as np

from servegym.envs.engine_dispatch import EngineDispatchEnv

CEILING_S = 40e-6


def test_step_time() -> None:
    env = EngineDispatchEnv(
        {
            "cluster": {"engines": 4, "profile": "qwen3-30b-a3b-h200"},
            "workload": {"name": "azure-conv", "load": 0.35},
            "episode_requests": 5000,
        }
    )
    medians, running = [], []
    for seed in range(3):
        env.reset(seed=seed)
        times = []
        for step in range(4900):
            start = time.perf_counter()
            env.step(step % 4)
            times.append(time.perf_counter() - start)
            if step % 50 == 0 and step > 1000:
                running.append(env._run.memory.engines["running"].mean())
        medians.append(float(np.mean(times[1000:])))
    print(f"env step: {1e6 * min(medians):.1f} us mean, running requests per engine {np.mean(running):.0f}")
    assert 32 <= np.mean(running) <= 64
    assert min(medians) <= CEILING_S
