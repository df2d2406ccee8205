"""Heuristics that are linear in the features of a decision, from which a network may start."""

from __future__ import annotations

from typing import Literal

from servegym.engine_bridge.decisions import Level

Prior = Literal["lmetric", "least_requests", "shortest", "aged", "oldest", "none"]

# Factors of a candidate's features in the key of the heuristic, lower is better. The features are logarithms: LMetric's
# product of prefill work and batch size becomes a sum, and so does a response ratio.
PRIORS: dict[Level, dict[Prior, dict[str, float]]] = {
    "engine": {
        "lmetric": {"log_prefill_work": 1.0, "log_batch": 1.0},
        "least_requests": {"log_batch": 1.0},
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
