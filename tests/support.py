"""Requests, profiles and the command line for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs.workloads.table import RequestTable

TOY: dict[str, Any] = {
    "name": "toy",
    "description": "made-up numbers for tests",
    "model": "none",
    "hardware": "none",
    "source": "invented",
    "engine": {
        "block_size": 16,
        "num_blocks": 2000,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "max_model_len": 4096,
    },
    "step_time": {
        "fixed_us": 2000,
        "per_sequence_us": 5,
        "dense_us": {"tokens": [1, 512], "us": [500, 9000]},
        "moe_us": {"tokens": [1, 512], "us": [300, 4000]},
        "moe_imbalance": 1.2,
        "prefill_pair_us": 0.002,
        "decode_context_us": 0.05,
    },
}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run ``servegym`` with arguments, the name of a command first; its exit code."""
    from servegym.agents.cli import main

    monkeypatch.setattr("sys.argv", ["servegym", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def random_table(seed: int, count: int = 400, rate_rps: float = 40.0, **columns: Any) -> RequestTable:
    """Poisson arrivals with exponential lengths, prompt mean 150 and output mean 60 tokens."""
    rng = np.random.default_rng(seed)
    return RequestTable.build(
        np.cumsum(rng.exponential(1 / rate_rps, count)),
        np.clip(rng.exponential(150, count), 1, 2000).astype(int),
        np.clip(rng.exponential(60, count), 1, 500).astype(int),
        **columns,
    )


def session_table(seed: int, sessions: int = 60, turns: int = 4, think_s: float = 0.5) -> RequestTable:
    """Closed-loop sessions whose prompts repeat all that went before."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, float]] = []
    for session in range(sessions):
        start, length = float(rng.uniform(0, 10)), 0
        for turn in range(int(rng.integers(1, turns + 1))):
            prompt, output = length + int(rng.integers(1, 200)), int(rng.integers(1, 80))
            parent = len(rows) - 1 if turn else -1
            rows.append(
                {
                    "arrival_s": start,
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "user": session % 7,
                    "session": session,
                    "turn": turn,
                    "parent": parent,
                    "think_s": float(rng.exponential(think_s)) if turn else 0.0,
                    "stream": session,
                }
            )
            length = prompt + output
    roots = sorted((i for i, row in enumerate(rows) if row["parent"] < 0), key=lambda i: rows[i]["arrival_s"])
    order: list[int] = []
    for root in roots:
        order.append(root)
        while order[-1] + 1 < len(rows) and rows[order[-1] + 1]["parent"] == order[-1]:
            order.append(order[-1] + 1)
    new = {old: i for i, old in enumerate(order)}
    for row in rows:
        row["parent"] = new.get(int(row["parent"]), -1)
    columns = {name: [rows[i][name] for i in order] for name in rows[0]}
    return RequestTable.build(**columns)
