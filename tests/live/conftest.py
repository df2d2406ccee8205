"""Real vLLM engines on this machine; without them these tests are skipped, visibly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import find_config, load_mapping
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster


@pytest.fixture(scope="session")
def local_cluster() -> ClusterFile:
    """The shipped cluster of CPU engines."""
    if not os.environ.get("SERVEGYM_VLLM_PYTHON"):
        pytest.skip("SERVEGYM_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    return ClusterFile.model_validate(load_mapping(find_config("local", "clusters")))


@pytest.fixture(scope="session")
def one_engine(local_cluster: ClusterFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """One engine with four slots, whose queue our scheduler orders."""
    folder: Path = tmp_path_factory.mktemp("one_engine")
    changes = {
        "engines": 1,
        "request_policy": PolicySpec(name="fcfs"),
        "arguments": local_cluster.arguments | {"max-num-seqs": 4},
    }
    with running_cluster(local_cluster.model_copy(update=changes), folder) as cluster:
        yield cluster
