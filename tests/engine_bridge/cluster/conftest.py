"""A cluster file whose engines are fakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servegym.engine_bridge.cluster.config import ClusterFile

FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture
def fake_cluster(tmp_path: Path) -> Callable[..., ClusterFile]:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    python.chmod(0o755)

    def make(options: dict[str, Any] | None = None, **fields: Any) -> ClusterFile:
        content = {"name": "fake", "model": "some/model", "python": str(python), "engines": 2, "ready_timeout_s": 30}
        content |= {"environment": {"FAKE_VLLM": json.dumps(options or {})}} | fields
        return ClusterFile.model_validate(content)

    return make
