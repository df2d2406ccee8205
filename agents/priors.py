"""Heuristics that are linear in the features of a dispatch decision, from which a network may start."""

from __future__ import annotations

from typing import Literal

Prior = Literal["lmetric", "least_requests", "none"]

# Factors of engine features in the key of the heuristic, lower is better. The features are logarithms: LMetric's
# product of prefill work and batch size becomes a sum.
PRIORS: dict[Prior, dict[str, float]] = {
    "lmetric": {"log_prefill_work": 1.0, "log_batch": 1.0},
    "least_requests": {"log_batch": 1.0},
    "none": {},
}
