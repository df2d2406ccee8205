"""Sessions: growing histories, context limits, compaction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.envs.workloads.sessions import Conversation, Turns, converse, fit
from servegym.envs.workloads.table import Int32


def plan(turns: list[int], *, seed: int = 0, compact: bool = False, template: int = 5) -> Turns:
    """Random token counts for sessions of so many turns."""
    rng = np.random.default_rng(seed)
    session = np.repeat(np.arange(len(turns)), turns).astype(np.int32)
    turn = np.concatenate([np.arange(count) for count in turns]).astype(np.int32)
    total = len(session)

    def tokens(high: int) -> Int32:
        return rng.integers(1, high, total).astype(np.int32)

    return Turns(
        session,
        turn,
        new_tokens=tokens(60),
        output_tokens=tokens(40),
        think_s=np.zeros(total),
        template_tokens=np.full(total, template, dtype=np.int32),
        compact_tokens=tokens(20) if compact else np.full(total, -1, dtype=np.int32),
    )


def by_hand(turns: Turns, max_tokens: int) -> Conversation:
    """The same, row by row."""
    prompt, output = turns.new_tokens.copy(), turns.output_tokens.copy()
    kept, fresh = np.ones(len(prompt), dtype=bool), turns.turn == 0
    for row in range(len(prompt)):
        if turns.turn[row] == 0:
            shortened = fit(prompt[row : row + 1], output[row : row + 1], max_tokens)
            prompt[row], output[row] = shortened[0][0], shortened[1][0]
            continue
        grown = prompt[row - 1] + output[row - 1] + turns.new_tokens[row]
        if not kept[row - 1]:
            kept[row] = False
        elif grown + output[row] <= max_tokens:
            prompt[row] = grown
        elif turns.compact_tokens[row] < 0:
            kept[row] = False
        else:
            start = turns.template_tokens[row] + turns.compact_tokens[row] + turns.new_tokens[row]
            shortened = fit(np.array([start]), output[row : row + 1], max_tokens)
            prompt[row], output[row], fresh[row] = shortened[0][0], shortened[1][0], True
    return Conversation(prompt, output, kept, fresh)


@given(
    turns=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    max_tokens=st.integers(2, 600),
    compact=st.booleans(),
)
def test_like_the_plain_loop(turns: list[int], seed: int, max_tokens: int, compact: bool) -> None:
    planned = plan(turns, seed=seed, compact=compact)
    talk, expected = converse(planned, max_tokens), by_hand(planned, max_tokens)
    np.testing.assert_array_equal(talk.kept, expected.kept)
    for name in ("prompt_tokens", "output_tokens", "fresh"):
        np.testing.assert_array_equal(getattr(talk, name)[talk.kept], getattr(expected, name)[talk.kept])
    total = (talk.prompt_tokens + talk.output_tokens)[talk.kept]
    assert total.max() <= max_tokens
    assert talk.kept[planned.turn == 0].all()
    assert talk.kept.all() or not compact


def test_no_limit() -> None:
    planned = plan([3, 1, 2])
    talk = converse(planned)
    new, out = planned.new_tokens, planned.output_tokens
    assert talk.kept.all()
    assert talk.prompt_tokens[2] == new[0] + out[0] + new[1] + out[1] + new[2]
    assert talk.fresh.tolist() == [True, False, False, True, True, False]


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 10**6))
def test_fit(prompt: int, output: int, limit: int) -> None:
    shorter = fit(np.array([prompt], dtype=np.int32), np.array([output], dtype=np.int32), limit)
    new_prompt, new_output = int(shorter[0][0]), int(shorter[1][0])
    assert 1 <= new_prompt <= prompt
    assert 1 <= new_output <= output
    assert new_prompt + new_output <= limit
    if prompt + output <= limit:
        assert (new_prompt, new_output) == (prompt, output)
    else:
        assert new_prompt + new_output in (limit, limit - limit % 2)
    if min(prompt, output) <= limit // 2:
        assert min(new_prompt, new_output) <= min(prompt, output)


@pytest.mark.parametrize(
    ("prompt", "output", "expected"), [(100, 10, (90, 10)), (10, 500, (10, 90)), (99, 99, (50, 50))]
)
def test_the_longer_part_gives_way(prompt: int, output: int, expected: tuple[int, int]) -> None:
    shorter = fit(np.array([prompt]), np.array([output]), 100)
    assert (int(shorter[0][0]), int(shorter[1][0])) == expected
