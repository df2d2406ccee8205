"""The router's prefix index in the kernel against the plain one in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table, session_table

from servegym.baselines.interface import EngineViews
from servegym.baselines.prefix_index import PrefixIndex, PrefixIndexConfig
from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable


def templates() -> RequestTable:
    """Prompts that begin with one of five templates of 40 to 400 tokens."""
    rng = np.random.default_rng(8)
    template = rng.integers(0, 5, 300)
    return random_table(
        7, 300, template=template, template_tokens=np.array([40, 64, 128, 200, 400])[template], stream=np.arange(300)
    )


def blocks_of(table: RequestTable, r: int, size: int) -> list[tuple[int, ...]]:
    """Names of the full blocks of a prompt that others can share."""
    full = int(table.prompt_tokens[r]) // size
    if table.template[r] >= 0:
        shared = min(full, int(min(table.template_tokens[r], table.prompt_tokens[r])) // size)
        return [(-1, int(table.template[r]), j) for j in range(shared)]
    repeated = (table.stream == table.stream[r]).sum() > 1
    return [(int(table.stream[r]), j) for j in range(full)] if repeated else []


@pytest.mark.parametrize("table", [session_table(3), templates()], ids=["sessions", "templates"])
@pytest.mark.parametrize(
    "index",
    [
        {"block_tokens": 16},
        {"block_tokens": 32, "capacity_blocks": 40},
        {"block_tokens": 16, "capacity_blocks": 7, "max_match_blocks": 5},
        {"block_tokens": 16, "ttl_s": 1.5},
    ],
)
def test_matches_equal_the_plain_index(toy_profile: str, table: RequestTable, index: dict[str, Any]) -> None:
    plain = PrefixIndex(3, PrefixIndexConfig.model_validate(index))
    config = ClusterConfig.model_validate(
        {
            "engines": 3,
            "profile": toy_profile,
            "router": {"prefix_index": index},
            "faults": [{"at_s": 3.0, "engine": 1, "kind": "die"}, {"at_s": 3.0, "engine": 1, "kind": "recover"}],
        }
    )
    simulated = SimulatedCluster(config, table, create("request", "fcfs"))
    rng = np.random.default_rng(5)
    dead, matched, pending = False, 0.0, simulated.next_decision()
    while pending:
        request, engines = simulated.request_view(), simulated.engine_views()
        if request.now_s >= 3.0 and not dead:
            plain.clear(1)
            dead = True
        blocks = blocks_of(table, request.index, plain.config.block_tokens)
        expected = np.minimum(plain.match(blocks, request.now_s), request.prompt_tokens - 1)
        np.testing.assert_array_equal(engines.hit_tokens, expected)
        np.testing.assert_array_equal(engines.index_tokens, plain.tokens())
        matched += expected.sum()
        engine = int(rng.integers(3))
        plain.insert(engine, blocks, request.now_s)
        pending = simulated.dispatch(engine)
    assert dead
    assert matched > 1000


def test_a_prefix_key_is_shared_by_prompts_that_begin_alike(toy_profile: str) -> None:
    table = templates()
    config = ClusterConfig.model_validate(
        {"profile": toy_profile, "router": {"prefix_index": {"block_tokens": 16}, "prefix_key_blocks": 2}}
    )
    simulated = SimulatedCluster(config, table, create("request", "fcfs"))
    keys: dict[int, set[int]] = {}
    pending = simulated.next_decision()
    while pending:
        request = simulated.request_view()
        if request.prompt_tokens >= 32:
            keys.setdefault(int(table.template[request.index]), set()).add(request.prefix_key)
        pending = simulated.dispatch(0)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 5


def test_no_index_no_hits(toy_profile: str) -> None:
    config = ClusterConfig.model_validate({"profile": toy_profile, "router": {"prefix_index": None}})
    simulated = SimulatedCluster(config, session_table(3), create("request", "fcfs"))
    pending = simulated.next_decision()
    while pending:
        engines: EngineViews = simulated.engine_views()
        assert not engines.hit_tokens.any()
        pending = simulated.dispatch(0)
