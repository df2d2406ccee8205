"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the public traces and kernel tables; tests that need it are skipped, visibly, without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SERVEGYM_DATA", default))
    if not (folder / "traces").is_dir():
        pytest.skip(f"public data not found in {folder}; set SERVEGYM_DATA to its folder")
    return folder


# Programs that run in vLLM's own environment; nothing here can import them.
collect_ignore = ["oracle/vllm_schedule.py", "baselines/vllm_balancer.py"]
