"""Bundles of networks with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from servegym.agents.networks import Actor
from servegym.agents.training.export import actor_weights, torch_logits
from servegym.engine_bridge.bundle_writer import write_bundle
from servegym.engine_bridge.decisions import ADMISSION, DISPATCH, Decisions
from servegym.engine_bridge.manifest import Provenance


def make_actor(seed: int = 0, width: int = 32, decisions: Decisions = DISPATCH, linear: bool = False) -> Actor:
    torch.manual_seed(seed)
    actor = Actor(decisions, width)
    with torch.no_grad():
        actor.head.weight.mul_(0.0 if linear else 3.0)
    return actor


def save(actor: Actor, folder: Path) -> Path:
    training = Provenance(
        run="test", config_sha256="0" * 64, seed=3, steps=4096, environment="none", evaluation={"ttft_s_ratio": 0.9}
    )
    write_bundle(
        folder, actor.decisions, actor_weights(actor), torch_logits(actor), training, {"torch": torch.__version__}
    )
    return folder


@pytest.fixture(scope="session")
def actor() -> Actor:
    return make_actor()


@pytest.fixture
def bundle(actor, tmp_path: Path) -> Path:
    return save(actor, tmp_path / "run" / "policy")


@pytest.fixture(scope="session")
def request_actor() -> Actor:
    return make_actor(decisions=ADMISSION)


@pytest.fixture
def request_bundle(request_actor, tmp_path: Path) -> Path:
    return save(request_actor, tmp_path / "request" / "policy")


@pytest.fixture(scope="session")
def save_actor() -> Callable[..., Path]:
    return lambda folder, **options: save(make_actor(**options), folder)
