"""The requests of a simulation that repeats a live run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support import session_table

from servegym.baselines.registry import create
from servegym.envs.live.tokens import prompt_tokens
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.metrics import RunOutcome
from servegym.envs.validation.sent import as_sent, with_live_prefixes
from servegym.envs.workloads.table import RequestTable

BLOCK = 16


def hits(table: RequestTable) -> np.ndarray:
    cluster = ClusterConfig(engines=1, profile="cpu-tiny-moe", engine={"block_size": BLOCK, "num_blocks": 4000})
    run = SimulatedCluster(cluster, table, create("request", "fcfs"), create("engine", "round_robin"))
    run.run()
    return RunOutcome.of(run).hit_tokens


def test_requests_are_sent_when_they_truly_were() -> None:
    table = session_table(3, sessions=6, turns=2, think_s=0.1)
    late = table.arrival_s + 0.01
    late[0] = np.nan
    sent = as_sent(table, late)
    roots = np.flatnonzero(table.parent < 0)
    np.testing.assert_allclose(sent.arrival_s[roots[1:]], late[roots[1:]])
    assert sent.arrival_s[0] == table.arrival_s[0]
    sent.check()


def test_a_follow_up_finds_the_prompt_of_the_turn_before_and_not_its_planned_output() -> None:
    table = session_table(4, sessions=5, turns=3, think_s=5.0)
    prompts = np.full(len(table), 100, dtype=np.int32)
    for r in np.flatnonzero(table.parent >= 0):
        prompts[r] = prompts[table.parent[r]] + 40 + 60
    table = replace(table, prompt_tokens=prompts, output_tokens=np.full(len(table), 40, dtype=np.int32))
    followers = np.flatnonzero(table.parent >= 0)
    before = prompts[table.parent[followers]]
    planned, live = hits(table)[followers], hits(with_live_prefixes(table, BLOCK))[followers]
    np.testing.assert_array_equal(live, before // BLOCK * BLOCK)
    np.testing.assert_array_equal(planned, (before + 40 - 1) // BLOCK * BLOCK)


def test_prefixes_are_equal_where_the_tokens_are() -> None:
    table = with_live_prefixes(session_table(5, sessions=4, turns=3), BLOCK)
    original = session_table(5, sessions=4, turns=3)
    tokens = [prompt_tokens(original, r, 2**40) for r in range(len(original))]
    for a in range(len(table)):
        for b in range(a):
            mine, other = (table.prefix_ids[table.prefix_start[r] : table.prefix_start[r + 1]] for r in (a, b))
            blocks = min(len(mine), len(other))
            same = [bool((tokens[a][: (k + 1) * BLOCK] == tokens[b][: (k + 1) * BLOCK]).all()) for k in range(blocks)]
            assert (mine[:blocks] == other[:blocks]).tolist() == same
