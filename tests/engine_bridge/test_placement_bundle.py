"""Placement policies as bundles: settings of the rule `collocate`, scaled by a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from servegym.baselines.expert.loads import check_placement
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.placement_features import PLACEMENT_CONTEXT, SETTING_FEATURES, SETTINGS, placement_context
from servegym.baselines.registry import create
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.bundle_policy import LearnedPlacement
from servegym.engine_bridge.decisions import PLACEMENT
from servegym.engine_bridge.set_scorer import SetScorer, weight_shapes
from servegym.errors import InputError

SHAPES = weight_shapes(len(SETTING_FEATURES), len(PLACEMENT_CONTEXT), 1, pooled=False)
CURRENT = Placement(linear_placement(4, 32, 32), 4)


def load(seed: int = 0) -> ExpertLoad:
    rng = np.random.default_rng(seed)
    tokens = rng.dirichlet(np.full(32, 2.0), size=4) * 1e5
    return ExpertLoad(tokens, None, rng.gamma(0.3, 1.0, (3, 32, 32)) * 100, steps=50, top_k=4)


def learned(**prior: float) -> LearnedPlacement:
    weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    for name, value in prior.items():
        weights["prior.weight"][0, PLACEMENT.item_names.index(name)] = value
    return LearnedPlacement(SetScorer(weights))


def test_the_settings_are_those_of_the_rule() -> None:
    assert tuple(type(create("expert", "collocate").params).model_fields) == SETTINGS


def test_without_weights_it_is_the_rule() -> None:
    mine, rule = learned().place(load(), CURRENT), create("expert", "collocate").place(load(), CURRENT)
    assert mine is not None
    assert rule is not None
    np.testing.assert_array_equal(mine.physical_to_logical, rule.physical_to_logical)


def test_a_weight_scales_one_setting_by_the_load() -> None:
    policy, rule = learned(move=float(np.log(3.0)), gate_by_drift=2.0, local=50.0), create("expert", "collocate")
    before = load(1).tokens
    settings = policy.settings(load(), before, CURRENT)
    drift = placement_context(load(), before, CURRENT)[1]
    assert drift > 0.1
    assert settings["move"] == pytest.approx(3.0 * rule.params.move, rel=1e-5)
    assert settings["gate"] == pytest.approx(rule.params.gate * np.exp(10.0 * drift), rel=1e-5)
    assert settings["local"] == pytest.approx(1000.0 * rule.params.local)  # bounded
    assert settings["together"] == rule.params.together
    assert policy.settings(load(), None, CURRENT)["gate"] == pytest.approx(rule.params.gate, rel=1e-5)


def test_a_bundle_comes_back_as_it_was(save_actor: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_actor(tmp_path / "placement", decisions=PLACEMENT, width=4)
    policy = load_bundle(folder)
    assert policy.manifest.layer == "expert"
    assert "policy.place(load, current)" in (folder / "README.md").read_text(encoding="utf-8")
    named = create("expert", str(folder))
    twin = copy.deepcopy(named)
    wanted = named.place(load(), CURRENT)
    check_placement(wanted, 32)
    again = twin.place(load(), CURRENT)
    np.testing.assert_array_equal(wanted.physical_to_logical, again.physical_to_logical)
    with pytest.raises(InputError, match="expert level"):
        create("engine", str(folder))


def test_it_forgets_at_a_reset(save_actor: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = create("expert", str(save_actor(tmp_path / "placement", decisions=PLACEMENT, width=4)))
    first = policy.place(load(), CURRENT)
    policy.place(load(5), CURRENT)
    policy.reset(0)
    again = policy.place(load(), CURRENT)
    np.testing.assert_array_equal(first.physical_to_logical, again.physical_to_logical)


def test_counts_alone_are_enough(save_actor: Callable[..., Path], tmp_path: Path) -> None:
    policy = create("expert", str(save_actor(tmp_path / "placement", decisions=PLACEMENT, width=4)))
    wanted = policy.place(ExpertLoad(load().tokens), CURRENT)
    check_placement(wanted, 32)
