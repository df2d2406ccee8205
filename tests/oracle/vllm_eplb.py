"""Run inside vLLM's interpreter: the placements of its default EPLB policy for the loads in a .npz file, with times."""

from __future__ import annotations

import sys
import time

import numpy as np


def main(source: str, target: str) -> None:
    """Place every case of ``source``; write placements and seconds to ``target``."""
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    cases = np.load(source, allow_pickle=False)
    results = {}
    for index in range(int(cases["count"])):
        slots, groups, nodes, ranks, repeats = cases[f"shape_{index}"].tolist()
        weight = torch.from_numpy(cases[f"tokens_{index}"])
        old = torch.from_numpy(cases[f"old_{index}"]) if f"old_{index}" in cases else None
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            placed = DefaultEplbPolicy.rebalance_experts(weight, slots, groups, nodes, ranks, old)
            times.append(time.perf_counter() - start)
        results[f"placed_{index}"] = placed.numpy()
        results[f"seconds_{index}"] = np.array(min(times))
    np.savez(target, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
