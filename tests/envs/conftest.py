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
