"""Where the real vLLM is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; skips where there is none."""
    python = os.environ.get("SERVEGYM_VLLM_PYTHON", sys.executable)
    found = subprocess.run(
        [python, "-c", "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))"],
        capture_output=True,
        check=False,
    )
    if found.returncode != 0:
        pytest.skip(f"vLLM is not installed for {python}; set SERVEGYM_VLLM_PYTHON to an interpreter that has it")
    return python
