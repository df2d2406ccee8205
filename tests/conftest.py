"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servegym.engine_bridge.cluster.config import ClusterFile


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the public traces and kernel tables; tests that need it are skipped, visibly, without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SERVEGYM_DATA", default))
    if not (folder / "traces").is_dir():
        pytest.skip(f"public data not found in {folder}; set SERVEGYM_DATA to its folder")
    return folder


@pytest.fixture
def fake_cluster(tmp_path: Path) -> Callable[..., ClusterFile]:
    """Makes cluster files whose engines are fakes; the options are those of fake_vllm.py."""
    python = tmp_path / "python"
    fake = Path(__file__).with_name("fake_vllm.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "$@"\n')
    python.chmod(0o755)

    def make(options: dict[str, Any] | None = None, **fields: Any) -> ClusterFile:
        content = {"name": "fake", "model": "some/model", "python": str(python), "engines": 2, "ready_timeout_s": 30}
        content |= {"environment": {"FAKE_VLLM": json.dumps(options or {})}} | fields
        return ClusterFile.model_validate(content)

    return make


# Programs that run in vLLM's own environment; nothing here can import them.
collect_ignore = ["oracle/vllm_schedule.py", "baselines/vllm_balancer.py"]
