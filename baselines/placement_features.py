"""What a learned placement policy sees: each candidate placement, and the load that all of them are for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from servegym.baselines.expert.loads import balancedness, crossing_share, moved_experts, rank_loads, remote_share
from servegym.baselines.features import Feature, Float32Array
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
    Feature("source_skew", "tokens of the busiest source rank over the mean, less 1; 0 if unknown"),
    Feature("source_mix", "total variation between a source rank's load and that of all, mean; 0 if unknown", high=1.0),
)
"""Of the load. The last two tell what dispatch made of it: how uneven the ranks' sources are, and how different."""

SETTINGS = ("half_life", "trend", "activation", "together", "pairs_half_life", "local", "move", "gate")
"""Settings of the placement rule ``collocate`` that a network may scale."""
_GIVEN = ("", "_by_tokens", "_by_drift", "_by_ranks", "_by_skew", "_by_mix")
SETTING_FEATURES = tuple(
    Feature(f"{setting}{given}", f"1 for {setting}{', times a feature of the load' * bool(given)}", low=-math.inf)
    for setting in SETTINGS
    for given in _GIVEN
)


def fill_setting_features(context: FloatArray, items: FloatArray, out: Float32Array, shared: Float32Array) -> None:
    """Write the features of settings, each with its own weights for the load: a linear rule is linear in the load.

    Args:
        context: row of ``PLACEMENT_CONTEXT``.
        items: number of each setting, shape (settings, 1).
        out: output, shape (settings, SETTING_FEATURES).
        shared: output, shape (PLACEMENT_CONTEXT,).
    """
    log_tokens, drift, _, _, log_experts, skew, source_mix = context
    # About -1 to 1: 1 to 50,000 experts chosen per layer and step, loads that stay or move, 64 to 8 experts per rank,
    # engines that are sent equal or unequal amounts, and the same or other requests.
    load = [(log_tokens - 6.0) / 5.0, 5.0 * drift, math.log(32.0) - log_experts, 5.0 * skew, 5.0 * source_mix]
    given = np.array([1.0, *load])
    out[:] = 0.0
    for row, setting in zip(out, items[:, 0].astype(np.int64), strict=True):
        row[setting * len(given) : (setting + 1) * len(given)] = given
    shared[:] = context


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
    skew, source_mix = _sources(load)
    return np.array(
        [
            np.log1p(load.tokens.sum() / layers / max(load.steps, 1)),
            drift,
            _imbalance(load.tokens, current).mean(),
            layers / 64.0,
            np.log(experts / current.ranks),
            skew,
            source_mix,
        ]
    )


def _sources(load: ExpertLoad) -> tuple[float, float]:
    """How unevenly and how differently the source ranks load the experts: what dispatch decides of a placement."""
    if load.by_source is None:
        return 0.0, 0.0
    by_rank = load.by_source.sum(axis=(0, 2))
    if not by_rank.any():
        return 0.0, 0.0
    distance = 0.5 * np.abs(_shares(load.by_source) - _shares(load.tokens)[:, None, :]).sum(axis=2)
    return float(by_rank.max() / by_rank.mean() - 1.0), float(distance[:, by_rank > 0.0].mean())


def _shares(tokens: FloatArray) -> FloatArray:
    return np.asarray(tokens / np.maximum(tokens.sum(axis=-1, keepdims=True), 1e-300))


def _imbalance(tokens: FloatArray, placement: Placement) -> FloatArray:
    return np.asarray(1.0 / balancedness(rank_loads(tokens, placement)) - 1.0)
