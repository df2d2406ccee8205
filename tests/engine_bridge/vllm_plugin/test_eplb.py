"""Our expert policies in the place of vLLM's, called as vLLM calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.registry import create
from servegym.engine_bridge.vllm_plugin.eplb import install
from servegym.errors import InputError

torch = pytest.importorskip("torch")


class Stock:
    """Stands for vLLM's default policy."""

    @classmethod
    def rebalance_experts(cls, weight, slots, groups, nodes, ranks, old=None):
        return "stock"


def policies(spec: str) -> type:
    table: dict[str, type] = {"default": Stock}
    install(spec, table)
    return table["default"]


@pytest.mark.parametrize("spec", ["eplb", "flashlb", "metro", "edr", "source_aware", "linear"])
def test_it_answers_what_the_policy_wants(spec: str) -> None:
    rng = np.random.default_rng(0)
    mine, theirs = create("expert", spec), policies(spec)
    held = linear_placement(3, 16, 20)
    for _ in range(3):
        tokens = np.floor(rng.dirichlet(np.full(16, 0.5), size=3) * 1e5)
        placed = mine.place(ExpertLoad(tokens), Placement(held, 4))
        answer = theirs.rebalance_experts(torch.from_numpy(tokens), 20, 1, 1, 4, torch.from_numpy(held))
        expected = held if placed is None else placed.physical_to_logical
        assert answer.dtype == torch.int64
        np.testing.assert_array_equal(answer.numpy(), expected)
        held = expected
    assert theirs.failures == 0


@pytest.mark.parametrize("fault", ["raise ValueError('no')", "return Placement(current.physical_to_logical * 0, 4)"])
def test_a_policy_that_fails_leaves_it_to_vllm(tmp_path: Path, fault: str) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        "from servegym.baselines.interface import Placement\n"
        f"class Mine:\n    def place(self, load, current):\n        {fault}\n"
    )
    theirs = policies(f"{module}:Mine")
    weight, old = torch.ones((2, 8)), torch.from_numpy(linear_placement(2, 8, 8))
    assert theirs.rebalance_experts(weight, 8, 1, 1, 4, old) == "stock"
    assert theirs.failures == 1


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("oracle", "policy expert=oracle: needs the future"),
        ("exflow", "got exflow, whose time limit makes ranks differ"),
        ("eplbb", "did you mean eplb?"),
    ],
)
def test_what_cannot_run_there_is_refused(spec: str, line: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        policies(spec)
    assert line in str(caught.value)


@pytest.mark.vllm
def test_the_plugin_replaces_vllms_own() -> None:
    python = os.environ.get("SERVEGYM_VLLM_PYTHON")
    if not python:
        pytest.skip("SERVEGYM_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    code = (
        "import torch\n"
        "from servegym.engine_bridge.vllm_plugin.plugin import register\n"
        "register(); register()\n"
        "from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy\n"
        "policy = EPLB_POLICIES['default']\n"
        "assert issubclass(policy, AbstractEplbPolicy), policy.__mro__\n"
        "weight = torch.tensor([[900, 10, 10, 10, 10, 10, 10, 40]])\n"
        "old = torch.arange(8)[None]\n"
        "placed = policy.rebalance_experts(weight, 8, 1, 1, 2, old)\n"
        "print(policy.__name__, policy.failures, sorted(placed[0].tolist()) == list(range(8)))\n"
    )
    package = Path(__file__).parents[3] / "src"
    environment = os.environ | {"PYTHONPATH": str(package), "SERVEGYM_EPLB_POLICY": "flashlb,worse_ratio=1.0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[-2] == "ServegymEplb 0 True", done.stderr[-2000:]
