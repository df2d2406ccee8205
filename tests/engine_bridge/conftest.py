"""A bundle of a network with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from servegym.agents.networks import DispatchActor
from servegym.agents.training.export import actor_weights, torch_logits
from servegym.engine_bridge.bundle_writer import write_bundle
from servegym.engine_bridge.manifest import Provenance


def make_actor(seed: int = 0, width: int = 32) -> DispatchActor:
    torch.manual_seed(seed)
    actor = DispatchActor(width)
    with torch.no_grad():
        actor.head.weight.mul_(3.0)
    return actor


def save(actor: DispatchActor, folder: Path) -> Path:
    training = Provenance(
        run="test", config_sha256="0" * 64, seed=3, steps=4096, environment="none", evaluation={"ttft_s_ratio": 0.9}
    )
    write_bundle(folder, actor_weights(actor), torch_logits(actor), training, {"torch": torch.__version__})
    return folder


@pytest.fixture(scope="session")
def actor() -> DispatchActor:
    return make_actor()


@pytest.fixture
def bundle(actor, tmp_path: Path) -> Path:
    return save(actor, tmp_path / "run" / "policy")


@pytest.fixture(scope="session")
def save_actor() -> Callable[..., Path]:
    return lambda folder, **options: save(make_actor(**options), folder)
