"""How long placing takes and how even it comes out, beside vLLM's own policy where that is installed.

Run with ``pytest tests/benchmarks/test_placement_speed.py -s``; SERVEGYM_VLLM_PYTHON names vLLM's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.expert.loads import balancedness, rank_loads
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.registry import create, names

ORACLE = Path(__file__).parents[1] / "oracle" / "vllm_eplb.py"
# layers, experts, slots, ranks
SHAPES = [(48, 128, 128, 8), (48, 128, 144, 8), (58, 256, 288, 32)]


def _load(layers: int, experts: int, ranks: int) -> ExpertLoad:
    rng = np.random.default_rng(0)
    tokens = np.floor(rng.dirichlet(np.full(experts, 3.0), size=layers) * 4e6)
    sources = rng.dirichlet(np.full(ranks, 2.0), size=(layers, experts)).swapaxes(1, 2) * tokens[:, None]
    pairs = np.stack([np.outer(tokens[n], tokens[n + 1]) for n in range(layers - 1)])
    pairs *= rng.gamma(0.2, 5.0, size=pairs.shape) / 1e8
    return ExpertLoad(tokens, sources, pairs, steps=1000, future=tokens, top_k=8)


@pytest.mark.parametrize("shape", SHAPES)
def test_placement_speed(shape: tuple[int, int, int, int], tmp_path: Path) -> None:
    layers, experts, slots, ranks = shape
    load = _load(layers, experts, ranks)
    current = Placement(linear_placement(layers, experts, slots), ranks)
    print(f"\n{layers} layers, {experts} experts, {slots} slots, {ranks} ranks")
    seconds, balance = {}, {}
    for name in names("expert"):
        create("expert", name).place(load, current)  # compile
        times = []
        for _ in range(3):
            policy = create("expert", name)
            start = time.perf_counter()
            wanted = policy.place(load, current) or current
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
        balance[name] = float(balancedness(rank_loads(load.tokens, wanted)).mean())
        print(f"  {name:<14} {seconds[name] * 1e3:8.2f} ms  balancedness {balance[name]:.4f}")
    assert seconds["eplb"] < 0.020
    python = os.environ.get("SERVEGYM_VLLM_PYTHON", sys.executable)
    path, out = tmp_path / "case.npz", tmp_path / "placed.npz"
    case = {"tokens_0": load.tokens.astype(np.int64), "shape_0": np.array([slots, 1, 1, ranks, 5])}
    np.savez(path, count=np.array(1), **case)  # type: ignore[arg-type]
    if subprocess.run([python, str(ORACLE), str(path), str(out)], capture_output=True, check=False).returncode:
        pytest.skip(f"vLLM cannot be run by {python}")
    reference = np.load(out)
    even = float(balancedness(rank_loads(load.tokens, Placement(reference["placed_0"], ranks))).mean())
    print(f"  vLLM's EPLB    {float(reference['seconds_0']) * 1e3:8.2f} ms  balancedness {even:.4f}")
    assert balance["eplb"] >= even - 1e-9
    assert seconds["eplb"] < float(reference["seconds_0"])
