"""Every config that the package carries is valid, and says in its first line what it is."""

from __future__ import annotations

import pytest

from servegym.agents.evaluation.config import EvaluationConfig
from servegym.agents.training.config import TrainConfig
from servegym.configuration import Config, load_config, shipped_configs
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.envs.live.replay import ReplayConfig
from servegym.envs.simulation import SimulationConfig
from servegym.envs.validation.config import ValidationConfig

KINDS: dict[str, type[Config]] = {
    "simulate": SimulationConfig,
    "train": TrainConfig,
    "evaluate": EvaluationConfig,
    "clusters": ClusterFile,
    "replay": ReplayConfig,
    "deploy": DeployConfig,
    "validate": ValidationConfig,
}
SHIPPED = [(kind, name) for kind in KINDS for name in shipped_configs(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_it_is_valid_and_explained(kind: str, name: str) -> None:
    load_config(KINDS[kind], name, kind)
    first = shipped_configs(kind)[name].read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ")
    assert len(first) > 20
