"""The block pool at the end of a run: every block free exactly once, every number of a block accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from support import random_table, session_table

from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.kernel.blocks import HOLE, PUBLIC
from servegym.envs.workloads.table import RequestTable

TABLES = {
    "private": random_table(3, rate_rps=80.0),
    "templates": random_table(
        4, rate_rps=80.0, template=np.arange(400) % 3, template_tokens=np.minimum(64, random_table(4).prompt_tokens)
    ),
    "sessions": session_table(5),
}


def run(table: RequestTable, profile: str, **engine: object) -> SimulatedCluster:
    cluster = ClusterConfig.model_validate({"profile": profile, "engines": 2, "engine": engine})
    simulated = SimulatedCluster(cluster, table, create("request", "fcfs"), create("engine", "round_robin"))
    simulated.run()
    return simulated


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("blocks", [160, 2000])
@pytest.mark.parametrize("name", TABLES)
def test_every_block_is_free_once(name: str, blocks: int, ahead: bool, toy_profile: str) -> None:
    simulated = run(TABLES[name], toy_profile, num_blocks=blocks, async_scheduling=ahead)
    if name == "private":
        assert simulated.memory.engines["preemptions"].any() == (blocks == 160)
    for engine, record in enumerate(simulated.memory.engines):
        ring = simulated.memory.array(engine, "free")
        places = (int(record["free_head"]) + np.arange(int(record["free_entries"]))) % len(ring)
        entries = ring[places]
        entries = entries[entries != HOLE]
        private, public = entries[entries & PUBLIC == 0], entries[entries & PUBLIC != 0] & ~PUBLIC
        assert (private > 0).all()
        assert len(np.unique(public)) == len(public) == record["numbered"] - record["returned"]
        assert private.sum() + len(public) + record["unhashed"] == record["free_blocks"] == blocks - 1
        assert record["findable"] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_content_that_nobody_shares_costs_what_it_costs_without_a_cache(ahead: bool, toy_profile: str) -> None:
    outcomes = []
    for caching in (True, False):
        simulated = run(TABLES["private"], toy_profile, enable_prefix_caching=caching, async_scheduling=ahead)
        assert not simulated.memory.engines["preemptions"].any()
        outcomes.append(simulated.memory.requests[["first_s", "finish_s", "engine"]].tolist())
        if caching:
            assert not simulated.memory.engines["table_used"].any()
    assert outcomes[0] == outcomes[1]
