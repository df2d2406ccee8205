"""Many clusters at once: a dispatch decision in each by one call, with the rewards and the features of the next.

What a call of a compiled function costs from Python is more than what the simulation between two decisions costs, so
that environments that are stepped together are stepped here. A lane is one environment's episode; its record holds
addresses of memory that the environment owns, and what a lane does to it is what the environment's own step would do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, farray

from servegym.baselines.features import fill_dispatch_features
from servegym.baselines.interface import E_AVAILABLE, ENGINE_COLUMNS, R_INDEX, REQUEST_COLUMNS
from servegym.envs.simulator.kernel.cluster import DISPATCH, advance_with_totals
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import cluster_at, floats

LANE = np.dtype(
    [
        ("cluster_at", "i8"),
        ("horizon_s", "f8"),
        ("totals_at", "i8"),  # f8 (3,)
        # The reward meter's, see envs/rewards.py; P parts.
        ("weights_at", "i8"),  # f8 (P,)
        ("seen_at", "i8"),  # f8 (P,)
        ("reference_at", "i8"),  # f8 (R + 1, 3), 0 without a reference
        ("reference_seen_at", "i8"),  # f8 (P,)
        ("now_at", "i8"),  # f8 (1,)
    ],
    align=True,
)


@jit
def _reward(lane: Any, row: int, parts: int, kernel_parts: int) -> float:
    """As ``RewardMeter.take(row).sum()``, where no part but the kernel's has a weight."""
    totals, seen, weights = floats(lane.totals_at), floats(lane.seen_at), floats(lane.weights_at)
    reward = 0.0
    for k in range(parts):
        gained = 0.0
        if k < kernel_parts:
            gained = totals[k] - seen[k]
            seen[k] = totals[k]
            if lane.reference_at != 0:
                reference, reference_seen = floats(lane.reference_at)[3 * row + k], floats(lane.reference_seen_at)
                gained -= reference - reference_seen[k]
                reference_seen[k] = reference
        reward += -weights[k] * gained
    return reward


@jit
def step_lanes(
    lanes: Any,
    actions: Any,
    parts: int,
    kernel_parts: int,
    engines: Any,
    requests: Any,
    masks: Any,
    rewards: Any,
    elapsed_s: Any,
    reasons: Any,
) -> None:
    """Send the pending request of each lane to an engine, and advance to the next one.

    Args:
        lanes: records, shape (lanes,).
        actions: engines, shape (lanes,); a lane with a negative one is left alone.
        parts: parts of a reward.
        kernel_parts: how many of them the kernel integrates, the first ones.
        engines: output, features of the engines at the next decision, shape (lanes, slots, features).
        requests: output, features of its request, shape (lanes, features).
        masks: output, 1 where an engine may be chosen, shape (lanes, slots).
        rewards: output, shape (lanes,).
        elapsed_s: output, simulated time of the step, shape (lanes,).
        reasons: output, why each lane stopped, shape (lanes,). Only of those that did for DISPATCH are the other
            outputs written; the caller goes on with the rest.
    """
    for i in range(len(lanes)):
        if actions[i] < 0:
            continue
        lane = lanes[i]
        s = cluster_at(lane.cluster_at, 0)
        reason = advance_with_totals(s, lane.horizon_s, actions[i], carray(floats(lane.totals_at), (3,)))
        reasons[i] = reason
        if reason != DISPATCH:
            continue
        request = carray(floats(s.request_row_at), (REQUEST_COLUMNS,))
        view = farray(floats(s.engine_view_at), (s.engine_count, ENGINE_COLUMNS))
        rewards[i] = _reward(lane, int(request[R_INDEX]), parts, kernel_parts)
        now = floats(lane.now_at)
        before = now[0]
        now[0] = max(s.totals_s, before)
        elapsed_s[i] = now[0] - before
        fill_dispatch_features(request, view, engines[i], requests[i])
        masks[i, :] = 0
        for e in range(s.engine_count):
            masks[i, e] = np.int8(view[e, E_AVAILABLE])
