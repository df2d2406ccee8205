"""What a learned placement sees of the load."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, FloatArray, Placement
from servegym.baselines.placement_features import (
    PLACEMENT_CONTEXT,
    SETTING_FEATURES,
    SETTINGS,
    fill_setting_features,
    placement_context,
)

CURRENT = Placement(linear_placement(2, 4, 4), 2)


def context(by_source: FloatArray | None, tokens: FloatArray | None = None) -> dict[str, float]:
    """Context of a load of 2 layers, 2 source ranks and 4 experts, by name."""
    if tokens is None:
        assert by_source is not None
        tokens = by_source.sum(axis=1)
    row = placement_context(ExpertLoad(tokens, by_source, steps=10), None, CURRENT)
    return {feature.name: value for feature, value in zip(PLACEMENT_CONTEXT, row.tolist(), strict=True)}


def test_dispatch_shows_in_how_uneven_and_how_different_the_sources_are() -> None:
    alike = np.tile([[[4.0, 3.0, 2.0, 1.0]]], (2, 2, 1))
    assert (context(alike)["source_skew"], context(alike)["source_mix"]) == (0.0, 0.0)
    uneven = alike * np.array([3.0, 1.0])[None, :, None]
    assert context(uneven)["source_skew"] == pytest.approx(0.5)
    assert context(uneven)["source_mix"] == pytest.approx(0.0, abs=1e-12)
    apart = np.array([[[5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0]]] * 2)
    assert context(apart)["source_skew"] == 0.0
    assert context(apart)["source_mix"] == pytest.approx(0.5)


def test_sources_that_are_unknown_or_idle_count_for_nothing() -> None:
    tokens = np.ones((2, 4))
    assert context(None, tokens)["source_mix"] == context(None, tokens)["source_skew"] == 0.0
    nothing = context(np.zeros((2, 2, 4)))
    assert (nothing["source_skew"], nothing["source_mix"]) == (0.0, 0.0)
    one = np.array([[[4.0, 3.0, 2.0, 1.0], [0.0] * 4]] * 2)
    assert (context(one)["source_skew"], context(one)["source_mix"]) == (1.0, 0.0)


def test_each_setting_has_a_weight_of_its_own_for_the_mix_of_dispatch() -> None:
    row = np.array([6.0, 0.0, 0.3, 1.0, np.log(32.0), 0.2, 0.1])
    items = np.arange(len(SETTINGS), dtype=np.float64)[:, None]
    out = np.empty((len(SETTINGS), len(SETTING_FEATURES)), dtype=np.float32)
    shared = np.empty(len(PLACEMENT_CONTEXT), dtype=np.float32)
    fill_setting_features(row, items, out, shared)
    names = [feature.name for feature in SETTING_FEATURES]
    local = dict(zip(names, out[SETTINGS.index("local")].tolist(), strict=True))
    assert {name: value for name, value in local.items() if value} == pytest.approx(
        {"local": 1.0, "local_by_skew": 1.0, "local_by_mix": 0.5}
    )
    np.testing.assert_allclose(shared, row, rtol=1e-6)
