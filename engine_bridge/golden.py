"""Golden decisions of policy bundles: plausible views, drawn once per bundle and answered by the trained network."""

from __future__ import annotations

import numpy as np

from servegym.baselines import interface as i
from servegym.baselines.features import Float32Array
from servegym.baselines.placement_features import SETTINGS
from servegym.engine_bridge.decisions import Decisions
from servegym.engine_bridge.manifest import GoldenPair


def draw_dispatch(rng: np.random.Generator) -> tuple[i.FloatArray, i.FloatArray]:
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
    engines[:, i.E_MOE_PRESSURE] = np.round(rng.lognormal(0.0, 0.1, count), 4)
    engines[:, i.E_UNCACHED_TOKENS] = engines[:, i.E_PREFILL_TOKENS] // 2
    engines[:, i.E_FRESH_TOKENS] = engines[:, i.E_PREFILL_TOKENS] // 4
    engines[:, i.E_FIRST_TOKEN_S] = np.round(100.0 - rng.exponential(0.05, count), 4)
    request = np.zeros(i.REQUEST_COLUMNS)
    request[i.R_NOW_S] = request[i.R_ARRIVAL_S] = 100.0
    request[i.R_PROMPT_TOKENS] = prompt
    request[i.R_PRIORITY] = rng.integers(-2, 3)
    request[i.R_DEADLINE_S] = rng.choice([0.5, 2.0, 1e9])
    request[i.R_TURN] = rng.integers(0, 3)
    request[i.R_LAST_ENGINE] = rng.integers(-1, count)
    request[i.R_RECEIVED_TOKENS] = rng.integers(0, 3)
    return request, engines


def draw_queue(rng: np.random.Generator) -> tuple[i.FloatArray, i.FloatArray]:
    """Draw the decision about a queue of 1 to 12 requests.

    Returns:
        the ``C_*`` row, shape (CONTEXT_COLUMNS,), and the ``Q_*`` matrix, shape (waiting, QUEUE_COLUMNS).
    """
    count = int(rng.integers(1, 13))
    queue = np.zeros((count, i.QUEUE_COLUMNS))
    queue[:, i.Q_WAIT_S] = np.round(np.sort(rng.exponential(2.0, count))[::-1], 4)
    queue[:, i.Q_PROMPT_TOKENS] = rng.integers(1, 8192, count)
    queue[:, i.Q_COMPUTED_TOKENS] = queue[:, i.Q_PROMPT_TOKENS] // 2 * (rng.random(count) < 0.1)
    queue[:, i.Q_PRIORITY] = rng.integers(-2, 3, count)
    queue[:, i.Q_DEADLINE_S] = rng.choice([0.5, 2.0, 1e9], count)
    queue[:, i.Q_TURN] = rng.integers(0, 3, count)
    queue[:, i.Q_PREEMPTIONS] = rng.random(count) < 0.1
    queue[:, i.Q_ARRIVAL_S] = 100.0 - queue[:, i.Q_WAIT_S]
    queue[:, i.Q_PREDICTED_TOKENS] = rng.integers(1, 2000, count)
    queue[:, i.Q_INDEX] = np.arange(count)
    context = np.zeros(i.CONTEXT_COLUMNS)
    context[i.C_NOW_S] = 100.0
    context[i.C_MAX_NUM_SEQS] = 256
    context[i.C_RUNNING] = rng.integers(0, 257)
    context[i.C_TOTAL_BLOCKS] = 30_000
    context[i.C_FREE_BLOCKS] = rng.integers(0, 30_001)
    context[i.C_BLOCK_SIZE] = 16
    context[i.C_PREFILL_TOKENS_PER_S] = np.round(rng.uniform(5e3, 1e5))
    context[i.C_WAITING] = count
    context[i.C_WAITING_TOKENS] = (queue[:, i.Q_PROMPT_TOKENS] - queue[:, i.Q_COMPUTED_TOKENS]).sum()
    return context, queue


def draw_placement(rng: np.random.Generator) -> tuple[i.FloatArray, i.FloatArray]:
    """Draw the load of 4 to 64 experts per rank, and all settings of a placement.

    Returns:
        the row of ``PLACEMENT_CONTEXT``, and the number of each setting, shape (settings, 1).
    """
    tokens, drift, imbalance = rng.uniform(0.0, 12.0), rng.uniform(0.0, 0.5), rng.exponential(0.3)
    layers, experts = rng.integers(4, 65) / 64.0, np.log(rng.choice([4, 8, 16, 32, 64]))
    skew, source_mix = rng.exponential(0.1), rng.uniform(0.0, 0.3)
    context = np.round([tokens, drift, imbalance, layers, experts, skew, source_mix], 4)
    return context, np.arange(len(SETTINGS), dtype=np.float64)[:, None]


_DRAWN = {"engine": draw_dispatch, "request": draw_queue, "expert": draw_placement}


def draw_decision(decisions: Decisions, rng: np.random.Generator) -> tuple[i.FloatArray, i.FloatArray]:
    """Draw a decision of a kind: the row of its context and the matrix of its candidates."""
    return _DRAWN[decisions.layer](rng)


def golden_pair(decisions: Decisions, context: i.FloatArray, items: i.FloatArray, logits: Float32Array) -> GoldenPair:
    """Write a decision and its logits down by the names of the columns."""
    return GoldenPair(
        context=dict(zip(decisions.context_columns, context.tolist(), strict=True)),
        items={name: tuple(items[:, c].tolist()) for c, name in enumerate(decisions.item_columns)},
        logits=tuple(
            float(logit) if open_ else None for logit, open_ in zip(logits, decisions.eligible(items), strict=True)
        ),
    )
