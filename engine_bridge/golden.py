"""Golden decisions of policy bundles: plausible views, drawn once per bundle and answered by the trained network."""

from __future__ import annotations

import numpy as np

from servegym.baselines import interface as i
from servegym.baselines.features import Float32Array
from servegym.engine_bridge.manifest import ENGINE_COLUMN_NAMES, REQUEST_COLUMN_NAMES, GoldenPair


def draw_decision(rng: np.random.Generator) -> tuple[i.FloatArray, i.FloatArray]:
    """Draw one dispatch decision over 1 to 8 engines, from idle to overloaded, at least one of them available.

    Returns:
        the ``R_*`` row, shape (REQUEST_COLUMNS,), and the ``E_*`` matrix, shape (engines, ENGINE_COLUMNS).
    """
    count = int(rng.integers(1, 9))
    engines = np.zeros((count, i.ENGINE_COLUMNS))
    prompt = float(rng.integers(1, 8192))
    pressure = rng.exponential(1.0)  # of the cluster: engines of one decision are loaded alike
    engines[:, i.E_AVAILABLE] = rng.random(count) < 0.9
    engines[rng.integers(count), i.E_AVAILABLE] = 1.0
    running = rng.poisson(40 * pressure, count)
    waiting = rng.poisson(3 * pressure * rng.random(count))
    engines[:, i.E_WAITING] = waiting
    engines[:, i.E_RUNNING] = running
    engines[:, i.E_KV_USAGE] = np.round(np.minimum(rng.random(count) * pressure, 1.0), 4)
    engines[:, i.E_TELEMETRY_AGE_S] = np.round(rng.uniform(0, 0.2, count), 4)
    engines[:, i.E_INFLIGHT] = running + waiting
    engines[:, i.E_INFLIGHT_PROMPT_TOKENS] = (running + waiting) * 1000
    engines[:, i.E_PREFILL_REQUESTS] = waiting
    engines[:, i.E_PREFILL_TOKENS] = waiting * rng.integers(1, 4000, count)
    engines[:, i.E_HIT_TOKENS] = rng.integers(0, int(prompt) + 1, count) * (rng.random(count) < 0.3)
    engines[rng.integers(count), i.E_USER_HOME] = 1.0
    engines[rng.integers(count), i.E_SESSION_HOME] = 1.0
    engines[:, i.E_TTFT_EWMA_S] = np.round(rng.exponential(0.3, count), 4)
    engines[:, i.E_ITL_EWMA_S] = np.round(rng.exponential(0.02, count), 5)
    engines[:, i.E_DISPATCHED] = rng.integers(0, 10_000, count)
    engines[:, i.E_DISPATCHED_SINCE] = rng.integers(0, 5, count)
    engines[:, i.E_MAX_NUM_SEQS] = 256
    engines[:, i.E_KV_TOKENS] = 500_000
    engines[:, i.E_MAX_BATCHED_TOKENS] = 8192
    engines[:, i.E_PREFILL_TOKENS_PER_S] = np.round(rng.uniform(5e3, 1e5, count))
    engines[:, i.E_DECODE_STEP_S] = np.round(rng.uniform(0.005, 0.02, count), 5)
    request = np.zeros(i.REQUEST_COLUMNS)
    request[i.R_NOW_S] = request[i.R_ARRIVAL_S] = 100.0
    request[i.R_PROMPT_TOKENS] = prompt
    request[i.R_PRIORITY] = rng.integers(-2, 3)
    request[i.R_DEADLINE_S] = rng.choice([0.5, 2.0, 1e9])
    request[i.R_TURN] = rng.integers(0, 3)
    request[i.R_LAST_ENGINE] = rng.integers(-1, count)
    return request, engines


def golden_pair(request: i.FloatArray, engines: i.FloatArray, logits: Float32Array) -> GoldenPair:
    """Write a decision and its logits down by the names of the columns."""
    return GoldenPair(
        request=dict(zip(REQUEST_COLUMN_NAMES, request.tolist(), strict=True)),
        engines={name: tuple(engines[:, c].tolist()) for c, name in enumerate(ENGINE_COLUMN_NAMES)},
        logits=tuple(
            float(logit) if open_ > 0 else None for logit, open_ in zip(logits, engines[:, i.E_AVAILABLE], strict=True)
        ),
    )
