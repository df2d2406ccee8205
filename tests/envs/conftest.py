"""Fixtures of the tests of simulator and environments."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import TOY


@pytest.fixture(scope="session")
def toy_profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the toy profile, to be named in a cluster config."""
    path: Path = tmp_path_factory.mktemp("profiles") / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def toy_workload(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small workload with Poisson arrivals."""
    content = {
        "name": "toy",
        "description": "made-up lengths for tests",
        "source": "invented",
        "arrivals": {"process": "poisson"},
        "prompt_tokens": {"kind": "lognormal", "mu": [4.5], "sigma": [0.8]},
        "output_tokens": {"kind": "lognormal", "mu": [3.5], "sigma": [0.7]},
    }
    path = tmp_path_factory.mktemp("workloads") / "toy.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)
