"""What a learned placement policy sees: each candidate placement, and the load that all of them are for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from servegym.baselines.expert.loads import balancedness, crossing_share, moved_experts, rank_loads, remote_share
from servegym.baselines.features import Feature
from servegym.baselines.interface import ExpertLoad, FloatArray, Placement

PLACEMENT_FEATURES = (
    Feature("keep", "1 for the current placement", high=1.0),
    Feature("imbalance", "tokens of the heaviest rank over the mean, less 1, mean over layers"),
    Feature("worst_imbalance", "the same of the worst layer"),
    Feature("imbalance_gain", "imbalance now less that of the candidate", low=-math.inf),
    Feature("activation_imbalance", "activated experts of the heaviest rank over the mean, less 1, mean over layers"),
    Feature("remote", "share of (token, expert) pairs on another rank than the token's; 0 if unknown", high=1.0),
    Feature("crossing", "share of tokens that change the rank between layers; 0 if unknown", high=1.0),
    Feature("moved", "experts that ranks receive, over slots", high=1.0),
)
PLACEMENT_CONTEXT = (
    Feature("log_tokens_per_step", "ln(1 + experts chosen per layer and step)"),
    Feature("drift", "total variation of the loads between this window and the last, mean over layers", high=1.0),
    Feature("imbalance_now", "imbalance of the current placement"),
    Feature("layers", "MoE layers / 64"),
    Feature("log_experts", "ln(experts per rank)"),
)


def placement_features(load: ExpertLoad, current: Placement, candidates: Sequence[Placement | None]) -> FloatArray:
    """Return one row per candidate; None stands for the current placement. Shape (candidates, PLACEMENT_FEATURES)."""
    rows = np.zeros((len(candidates), len(PLACEMENT_FEATURES)), dtype=np.float64)
    now = _imbalance(load.tokens, current).mean()
    for row, candidate in zip(rows, candidates, strict=True):
        placement = current if candidate is None else candidate
        imbalance = _imbalance(load.tokens, placement)
        rate = load.tokens / max(load.steps, 1)
        row[0] = candidate is None
        row[1] = imbalance.mean()
        row[2] = imbalance.max()
        row[3] = now - imbalance.mean()
        row[4] = _imbalance(-np.expm1(-rate), placement).mean()
        row[5] = 0.0 if load.by_source is None else remote_share(load.by_source, placement).mean()
        row[6] = 0.0 if load.coactivation is None else crossing_share(load.coactivation, placement).mean()
        row[7] = moved_experts(current, placement).sum() / placement.physical_to_logical.size
    return rows


def placement_context(load: ExpertLoad, before: FloatArray | None, current: Placement) -> FloatArray:
    """Return what does not depend on the candidate, shape (PLACEMENT_CONTEXT,).

    Args:
        load: the window.
        before: tokens of the window before, shape (layers, experts), None for the first.
        current: the placement in force.
    """
    layers, experts = load.tokens.shape
    drift = 0.0
    if before is not None:
        drift = float(0.5 * np.abs(_shares(load.tokens) - _shares(before)).sum(axis=1).mean())
    return np.array(
        [
            np.log1p(load.tokens.sum() / layers / max(load.steps, 1)),
            drift,
            _imbalance(load.tokens, current).mean(),
            layers / 64.0,
            np.log(experts / current.ranks),
        ]
    )


def _shares(tokens: FloatArray) -> FloatArray:
    return np.asarray(tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1e-300))


def _imbalance(tokens: FloatArray, placement: Placement) -> FloatArray:
    return np.asarray(1.0 / balancedness(rank_loads(tokens, placement)) - 1.0)
