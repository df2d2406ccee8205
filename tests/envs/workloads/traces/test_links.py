"""Block hashes and sessions of traces, against plain loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces.links import (
    close_loop,
    conversation_streams,
    previous_turns,
    turn_numbers,
    with_prefixes,
)

SESSIONS = st.lists(st.integers(-1, 4), min_size=1, max_size=30)


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=20))
def test_equal_hashes_mean_equal_prefixes(blocks: list[list[int]]) -> None:
    count = len(blocks)
    lists = np.empty(count, dtype=object)
    lists[:] = blocks
    prompts = [max(1, 4 * len(row)) for row in blocks]
    table = with_prefixes(RequestTable.build(np.arange(count), prompts, np.ones(count)), lists, 4)
    prefixes: dict[int, tuple[int, ...]] = {}
    for row, ids in enumerate(blocks):
        hashes = table.prefix_ids[table.prefix_start[row] : table.prefix_start[row + 1]].tolist()
        assert len(hashes) == len(ids)
        for end, value in enumerate(hashes, start=1):
            assert prefixes.setdefault(value, tuple(ids[:end])) == tuple(ids[:end])
            assert value >= 0
    assert len(prefixes) == len({tuple(ids[:end]) for ids in blocks for end in range(1, len(ids) + 1)})


@given(SESSIONS)
def test_turns_of_sessions(sessions: list[int]) -> None:
    session = np.array(sessions, dtype=np.int32)
    latest: dict[int, int] = {}
    seen: dict[int, int] = {}
    previous, turns = previous_turns(session), turn_numbers(session)
    for row, name in enumerate(sessions):
        if name < 0:
            assert (previous[row], turns[row]) == (-1, 0)
            continue
        assert previous[row] == latest.get(name, -1)
        assert turns[row] == seen.get(name, 0)
        latest[name], seen[name] = row, seen.get(name, 0) + 1


@given(SESSIONS, st.integers(0, 1000))
def test_streams_continue_only_where_the_prompt_has_room(sessions: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = len(sessions)
    table = RequestTable.build(
        np.arange(count), rng.integers(1, 30, count), rng.integers(1, 9, count), session=sessions
    )
    streams, previous = conversation_streams(table), previous_turns(table.session)
    for row in range(count):
        before = previous[row]
        room = before >= 0 and table.prompt_tokens[row] >= table.prompt_tokens[before] + table.output_tokens[before]
        assert (streams[row] == streams[before]) == room if before >= 0 else streams[row] == row


def test_close_loop_keeps_the_recorded_gaps() -> None:
    table = close_loop(RequestTable.build([0, 1, 5, 6], [1] * 4, [1] * 4, session=[3, -1, 3, 3]))
    assert table.parent.tolist() == [-1, -1, 0, 2]
    assert table.think_s.tolist() == [0, 0, 5, 1]
    table.check()
