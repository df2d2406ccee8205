"""EPLB places experts exactly as vLLM's own policy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.expert.eplb import eplb_placement, keep_slots
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import Placement

HERE = Path(__file__).parent
# layers, experts, slots, groups, nodes, ranks
SHAPES = [
    (4, 16, 16, 1, 1, 4),
    (4, 16, 20, 1, 1, 4),
    (3, 64, 72, 8, 2, 8),
    (3, 64, 64, 8, 4, 8),
    (2, 128, 144, 1, 1, 8),
    (2, 128, 128, 4, 3, 8),  # groups that do not divide among nodes: global
    (2, 256, 288, 8, 4, 32),
    (5, 8, 8, 1, 1, 8),  # one expert per rank
]


@pytest.mark.vllm
def test_the_same_placement_as_vllm(vllm_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}  # type: ignore[type-arg]
    cases = [(shape, kept) for shape in SHAPES for kept in (False, True) for _ in range(6)]
    for index, ((layers, experts, slots, groups, nodes, ranks), kept) in enumerate(cases):
        skew = rng.dirichlet(np.full(experts, rng.uniform(0.3, 5.0)), size=layers)
        # Whole counts without ties, which NumPy's sort may order either way.
        tokens = np.argsort(np.argsort(skew, axis=1), axis=1) + np.floor(skew * 1e6).astype(np.int64)
        arrays[f"tokens_{index}"] = tokens
        arrays[f"shape_{index}"] = np.array([slots, groups, nodes, ranks, 1])
        if kept:
            arrays[f"old_{index}"] = rng.permuted(linear_placement(layers, experts, slots), axis=1)
    path, out = tmp_path / "cases.npz", tmp_path / "placed.npz"
    np.savez(path, count=np.array(len(cases)), **arrays)
    subprocess.run([vllm_python, str(HERE / "vllm_eplb.py"), str(path), str(out)], check=True, capture_output=True)
    expected = np.load(out, allow_pickle=False)
    for index, ((_, _, slots, groups, nodes, ranks), kept) in enumerate(cases):
        placed = eplb_placement(arrays[f"tokens_{index}"].astype(np.float64), slots, ranks, nodes, groups)
        if kept:
            placed = keep_slots(placed, Placement(arrays[f"old_{index}"], ranks))
        np.testing.assert_array_equal(placed, expected[f"placed_{index}"], err_msg=f"case {index}: {cases[index]}")
