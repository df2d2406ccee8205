"""The table of requests: selection, scaling, and the promises that it checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


def chain() -> RequestTable:
    """Two sessions: rows 0, 2, 4 and rows 1, 3; with block hashes."""
    return RequestTable.build(
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [10, 20, 30, 40, 50],
        [1, 2, 3, 4, 5],
        parent=[-1, -1, 0, 1, 2],
        session=[0, 1, 0, 1, 0],
        think_s=[0, 0, 2, 2, 2],
        prefix_start=[0, 1, 1, 3, 6, 6],
        prefix_ids=[7, 8, 9, 1, 2, 3],
        prefix_block_tokens=10,
    )


def test_take_remaps_parents_and_prefixes() -> None:
    part = chain().take([0, 2, 3])
    part.check()
    assert part.arrival_s.tolist() == [0, 2, 3]
    assert part.parent.tolist() == [-1, 0, -1]
    assert part.prefix_start.tolist() == [0, 1, 3, 6]
    assert part.prefix_ids.tolist() == [7, 8, 9, 1, 2, 3]
    last = chain().take([3, 4])
    assert last.parent.tolist() == [-1, -1]
    assert last.prefix_ids.tolist() == [1, 2, 3]


@given(st.lists(st.booleans(), min_size=5, max_size=5))
def test_take_keeps_each_row_whole(kept: list[bool]) -> None:
    table, rows = chain(), np.flatnonzero(kept)
    part = table.take(rows)
    for new, old in enumerate(rows):
        assert part.prompt_tokens[new] == table.prompt_tokens[old]
        assert part.prefix_ids[part.prefix_start[new] : part.prefix_start[new + 1]].tolist() == (
            table.prefix_ids[table.prefix_start[old] : table.prefix_start[old + 1]].tolist()
        )
        if part.parent[new] >= 0:
            assert rows[part.parent[new]] == table.parent[old]
        else:
            assert table.parent[old] not in rows


def test_take_without_prefixes() -> None:
    table = RequestTable.build([0.0, 1.0], [1, 1], [1, 1])
    assert len(table.take([1])) == 1
    assert len(table.take([])) == 0


def test_window_starts_at_zero() -> None:
    part = chain().window(2, 99)
    assert part.arrival_s.tolist() == [0, 1, 2]
    assert part.parent.tolist() == [-1, -1, 0]
    assert len(chain().window(5, 9)) == 0


def test_rates() -> None:
    table = chain()
    assert table.scaled(2.0).arrival_s.tolist() == [0, 0.5, 1, 1.5, 2]
    assert table.at_rate(0.5).arrival_s.tolist() == [0, 2, 4, 6, 8]
    assert table.at_rate(0.5).think_s.tolist() == table.think_s.tolist()
    burst = RequestTable.build([3.0, 3.0], [1, 1], [1, 1])
    assert burst.at_rate(9.0).arrival_s.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"arrival_s": np.array([0.0, 1, 2, 3, np.nan])}, "arrival_s[4]"),
        ({"arrival_s": np.array([5.0, 1, 2, 3, 4])}, "arrival_s"),
        ({"priority": np.array([0], dtype=np.int32)}, "priority"),
        ({"prompt_tokens": np.array([10, 0, 30, 40, 50], dtype=np.int32)}, "prompt_tokens[1]"),
        ({"output_tokens": np.array([1, 2, 3, 4, -5], dtype=np.int32)}, "output_tokens[4]"),
        ({"think_s": np.array([0.0, 0, -1, 0, 0])}, "think_s[2]"),
        ({"parent": np.array([-1, -1, 2, 1, 2], dtype=np.int32)}, "parent[2]"),
        ({"parent": np.array([-1, -1, 0, 0, 2], dtype=np.int32)}, "parent"),
        ({"deadline_s": np.array([1.0, np.nan, 1, 1, 1])}, "deadline_s[1]"),
        ({"template_tokens": np.array([0, 0, 31, 0, 0], dtype=np.int32)}, "template_tokens[2]"),
        ({"template_tokens": np.array([0, -1, 0, 0, 0], dtype=np.int32)}, "template_tokens[1]"),
        ({"prefix_start": np.array([0, 6])}, "prefix_start"),
    ],
)
def test_check_names_row_and_column(change: dict[str, Any], field: str) -> None:
    chain().check()
    with pytest.raises(InputError) as caught:
        replace(chain(), **change).check("x.csv")
    assert (caught.value.source, caught.value.field) == ("x.csv", field)


def test_an_empty_table_is_an_error() -> None:
    with pytest.raises(InputError, match="no requests"):
        RequestTable.build([], [], []).check()
