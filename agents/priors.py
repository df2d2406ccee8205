"""Heuristics that are linear in the features of a decision, from which a network may start."""

from __future__ import annotations

from typing import Literal

from servegym.engine_bridge.decisions import Level

Prior = Literal["lmetric", "least_requests", "shortest", "aged", "oldest", "general", "none"]

# Factors of a candidate's features in the key of the heuristic, lower is better. The features are logarithms: LMetric's
# product of prefill work and batch size becomes a sum, and so does a response ratio.
PRIORS: dict[Level, dict[Prior, dict[str, float]]] = {
    "engine": {
        "lmetric": {"log_prefill_work": 1.0, "log_batch": 1.0},
        "least_requests": {"log_batch": 1.0},
        # What searches over many kinds of clusters came to, rounded: where the next one starts, at scale 1.
        "general": {
            "log_batch": 2.0,
            "log_running": -1.0,
            "log_dispatched_since": 1.0,
            "telemetry_age": -2.0,
            "hit_share": 3.0,
            "user_home": 0.5,
            "session_home": -11.0,
            "ttft": 1.0,
            "prompt_share": 3.0,
            "prefill_time": 5.5,
            "decode_step": 1.5,
            "relative_prefill_work": -3.0,
            "relative_batch": 1.0,
            "prompt_above": 6.0,
            "prompt_below": 3.0,
            "prompt_work": -1.5,
            "queue_work": -2.5,
            "queue_batch": 3.5,
            "log_hit": -1.0,
            "log_uncached_work": 1.0,
            "log_expected_ttft": 4.0,
            "crowded_work": 2.0,
            "crowded_batch": -3.0,
            "crowded_step": -8.0,
            "resumed": -30.0,
        },
        "none": {},
    },
    "request": {
        "shortest": {"log_prefill": 1.0},
        "aged": {"log_prefill": 1.0, "log_wait": -0.3},
        "oldest": {"log_wait": -1.0},
        "none": {},
    },
    "expert": {"none": {}},
}
