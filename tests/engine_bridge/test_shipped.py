"""The policies that come with servegym."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.agents.catalogue import catalogue, page
from servegym.baselines.registry import create
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.shipped import resolved, shipped_bundles
from servegym.envs.simulation import SimulationConfig, simulate
from servegym.errors import InputError

NAMES = sorted(shipped_bundles())


def test_there_is_one_for_dispatch() -> None:
    assert "servegym/dispatch" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_by_name_and_has_a_card_with_its_limits(name: str) -> None:
    policy = load_bundle(name)
    assert policy.manifest.golden
    card = (resolved(name) / "README.md").read_text(encoding="utf-8")
    assert "## Results" in card
    assert "## Limits" in card
    assert policy.manifest.training.config_sha256 in card
    entry = next(entry for entry in catalogue()["bundles"] if entry["name"] == name)
    assert policy.manifest.layer in entry["explanation"]
    page(catalogue(), name)


@pytest.mark.parametrize("name", NAMES)
def test_each_decides_in_the_simulator(name: str) -> None:
    layer = load_bundle(name).manifest.layer
    config = SimulationConfig.model_validate(
        {
            "cluster": {"engines": 2},
            "workload": {"name": "azure-conv", "requests": 100, "load": 0.8},
            "policies": {layer: name},
        }
    )
    assert np.isfinite(simulate(config).metrics()["ttft_s"]["mean"])


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=r"servegym/dispach: no such shipped policy.*servegym/dispatch"):
        create("engine", "servegym/dispach")
