"""Mean TTFT under ``vllm bench serve``, vLLM's own client, by the order of the engines' waiting queues.

Two real engines with four slots each behind a deployment; the orders take turns in each repetition. Run with
``SERVEGYM_VLLM_PYTHON=... pytest tests/benchmarks/test_bench_serve.py -s``; SERVEGYM_ORDERING names a run folder of
``servegym train ordering_ppo``, whose bundle then takes part.
"""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gateway_support import SERVEGYM, served

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import find_config, load_mapping
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import free_port
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster

REPETITIONS = 3
LOAD = ["--dataset-name", "random", "--random-input-len", "700", "--random-range-ratio", "0.95"]
LOAD += ["--random-output-len", "16", "--num-prompts", "120", "--request-rate", "40", "--ignore-eos"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LiveCluster]:
    if not os.environ.get("SERVEGYM_VLLM_PYTHON"):
        pytest.skip("SERVEGYM_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    local = load_mapping(find_config("local", "clusters"))
    local |= {"request_policy": "fcfs", "arguments": local["arguments"] | {"max-num-seqs": 4}}
    with running_cluster(ClusterFile.model_validate(local), tmp_path / "runs" / "clusters" / "local") as started:
        yield started


@pytest.fixture
def endpoint(cluster: LiveCluster, tmp_path: Path) -> Iterator[str]:
    """A deployment in a process of its own."""
    port = free_port("127.0.0.1")
    arguments = ["deploy", "least_requests", "--cluster", "local", "--listen", f"127.0.0.1:{port}"]
    with served([*SERVEGYM, *arguments], port, tmp_path) as url:
        yield url


def bench(endpoint: str, cluster: LiveCluster, seed: int, folder: Path) -> float:
    """Run vLLM's client once and return its mean TTFT, ms."""
    # The client asks for metadata of "vllm", which the wheel for the CPU has under another name.
    metadata = folder / "shim" / "vllm-0.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0.0\n")
    command = [os.environ["SERVEGYM_VLLM_PYTHON"], "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai", "--base-url", endpoint, "--model", cluster.model, "--seed", str(seed)]
    command += ["--tokenizer", str(cluster.folder / "tiny-moe"), *LOAD]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "shim")}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    succeeded, ttft = (re.search(rf"{name}:\s+([\d.]+)", text) for name in ("Successful requests", r"Mean TTFT \(ms\)"))
    assert succeeded is not None
    assert succeeded[1] == "120"
    assert ttft is not None
    return float(ttft[1])


def test_ttft_by_the_order_of_the_queues(cluster: LiveCluster, endpoint: str, tmp_path: Path) -> None:
    orders = ["fcfs", "spf_aging,gamma=200"]
    if "SERVEGYM_ORDERING" in os.environ:
        orders.append(os.environ["SERVEGYM_ORDERING"])
    urllib.request.urlopen(f"{endpoint}/v1/models").close()
    found: dict[str, list[float]] = {order: [] for order in orders}
    for seed in range(1, REPETITIONS + 1):
        for order, values in found.items():
            cluster.follow(PolicySpec.parse(order))
            values.append(bench(endpoint, cluster, seed, tmp_path))
    for order, values in found.items():
        gaps = [f"{mine / other - 1:+.0%}" for mine, other in zip(values, found["fcfs"], strict=True)]
        gap = np.mean(values) / np.mean(found["fcfs"]) - 1
        print(f"\n{order}: mean TTFT {np.mean(values):.1f} ms ({gap:+.0%}; by repetition {', '.join(gaps)})", end="")
    for order in orders[1:]:
        assert np.mean(found[order]) < 0.7 * np.mean(found["fcfs"])
