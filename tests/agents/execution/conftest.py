"""Backends for tests: processes, a Ray cluster of two CPUs, and submitit's local executor."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servegym.agents.execution import BackendConfig


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray cluster of this machine; tests that need it are skipped, visibly, without Ray."""
    pytest.importorskip("ray", reason="needs servegym[ray]")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of pytest's settings, which workers do not read
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def backend(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackendConfig:
    """The backend of a name, with two workers, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    if request.param == "ray":
        return BackendConfig(name="ray", address=request.getfixturevalue("ray_address"), workers=2)
    if request.param == "slurm":
        pytest.importorskip("submitit", reason="needs servegym[slurm]")
        return BackendConfig(name="slurm", address="local", workers=2)
    return BackendConfig(workers=2)
