"""Drawing workloads: rates, common random numbers, sessions, determinism, and refusals."""

from __future__ import annotations

import hashlib
import time
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.configuration import validate
from servegym.envs.workloads.generation import generate, mean_lengths
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.workload import WorkloadConfig
from servegym.errors import InputError

SINGLE: dict[str, Any] = {
    "name": "single",
    "description": "single requests",
    "source": "invented",
    "arrivals": {"process": "gamma", "shape": 0.5},
    "prompt_tokens": {"kind": "lognormal", "mu": [5.0], "sigma": [1.0]},
    "output_tokens": {"kind": "lognormal", "mu": [4.0], "sigma": [1.0]},
    "templates": [{"share": 0.5, "count": 3, "tokens": {"kind": "uniform", "low": 20, "high": 90}}],
    "users": {"count": 10},
    "priorities": {"shares": {0: 0.2, 1: 0.8}},
    "deadline": {"base_s": 1.0, "per_1k_prompt_tokens_s": 0.5},
    "prediction": {"sigma": 0.4},
}
SESSIONS: dict[str, Any] = SINGLE | {
    "name": "sessions",
    "sessions": {
        "turns": {"kind": "geometric", "p": 0.25},
        "think_s": {"kind": "lognormal", "mu": [2.0], "sigma": [1.0]},
        "append_tokens": {"kind": "lognormal", "mu": [3.0], "sigma": [1.0]},
    },
}
COMPACTING: dict[str, Any] = SESSIONS | {
    "name": "compacting",
    "sessions": SESSIONS["sessions"] | {"compact_tokens": {"kind": "fixed", "value": 100}},
}
LENGTHS = ("prompt_tokens", "output_tokens", "user", "priority", "template", "template_tokens", "deadline_s")


def config(content: dict[str, Any], **changes: Any) -> WorkloadConfig:
    return validate(WorkloadConfig, content | changes, "test")


def digest(table: RequestTable) -> str:
    columns = [getattr(table, item.name) for item in fields(table)]
    return hashlib.sha256(b"".join(np.asarray(column).tobytes() for column in columns)).hexdigest()


@pytest.mark.parametrize("content", [SINGLE, SESSIONS, COMPACTING])
def test_same_seed_same_bytes(content: dict[str, Any]) -> None:
    once, again = (generate(config(content), requests=2000, rate_rps=5, seed=3) for _ in range(2))
    assert digest(once) == digest(again)
    assert digest(once) != digest(generate(config(content), requests=2000, rate_rps=5, seed=4))


def test_rate_and_number_leave_requests_alone() -> None:
    slow = generate(config(SINGLE), requests=1000, rate_rps=2.0, seed=1)
    fast = generate(config(SINGLE), requests=3000, rate_rps=9.0, seed=1)
    for name in (*LENGTHS, "predicted_tokens"):
        np.testing.assert_array_equal(getattr(slow, name), getattr(fast, name)[:1000])
    np.testing.assert_allclose(slow.arrival_s * 2.0, fast.arrival_s[:1000] * 9.0)


def test_the_arrival_process_leaves_lengths_alone() -> None:
    changed = config(SINGLE, arrivals={"process": "poisson"})
    one, other = (generate(item, requests=500, rate_rps=2.0, seed=1) for item in (config(SINGLE), changed))
    for name in LENGTHS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("content", [SESSIONS, COMPACTING])
def test_rate_leaves_turns_alone(content: dict[str, Any]) -> None:
    """Rows are sorted by time, which depends on the rate; the turns themselves do not."""
    tables = [generate(config(content), requests=2000, rate_rps=rate, seed=1, max_tokens=2000) for rate in (2.0, 9.0)]
    rows = [
        sorted(zip(*(getattr(table, name).tolist() for name in ("turn", *LENGTHS)), strict=True)) for table in tables
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("content", [SINGLE, SESSIONS])
def test_mean_rate_of_all_requests(content: dict[str, Any]) -> None:
    table = generate(config(content), requests=50_000, rate_rps=8.0, seed=2)
    assert len(table) == 50_000
    assert len(table) / table.arrival_s.max() == pytest.approx(8.0, rel=0.03)


def test_sessions_are_in_a_steady_state() -> None:
    """As many requests in each tenth of the run, and as deep into their sessions, from the first tenth on."""
    calm = config(SESSIONS, arrivals={"process": "poisson"})
    table = generate(calm, requests=100_000, rate_rps=20.0, seed=0)
    tenth = np.minimum((table.arrival_s / 500).astype(int), 9)
    assert np.bincount(tenth) == pytest.approx([10_000] * 10, rel=0.08)
    turns = np.bincount(tenth, table.turn) / np.bincount(tenth)
    assert turns == pytest.approx([3.0] * 10, rel=0.12)


@pytest.mark.parametrize("content", [SESSIONS, COMPACTING])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), requests=st.integers(1, 300), limit=st.sampled_from([None, 2, 300, 2000]))
def test_session_invariants(content: dict[str, Any], seed: int, requests: int, limit: int | None) -> None:
    table = generate(config(content), requests=requests, rate_rps=5.0, seed=seed, max_tokens=limit)
    table.check()
    assert len(table) == requests
    assert (np.diff(table.arrival_s) >= 0).all()
    child = np.flatnonzero(table.parent >= 0)
    parent = table.parent[child]
    assert (parent < child).all()
    assert (table.session[child] == table.session[parent]).all()
    assert (table.user[child] == table.user[parent]).all()
    assert (table.template[child] == table.template[parent]).all()
    assert (table.turn[child] == table.turn[parent] + 1).all()
    np.testing.assert_allclose(table.arrival_s[child] - table.arrival_s[parent], table.think_s[child], atol=1e-6)
    repeats = table.stream[child] == table.stream[parent]
    total = table.prompt_tokens + table.output_tokens
    assert (table.prompt_tokens[child] >= total[parent])[repeats].all()
    if limit is not None:
        assert total.max() <= limit
    if content is SESSIONS:
        assert repeats.all()
    assert len(np.unique(table.session[table.parent < 0])) == (table.parent < 0).sum()


def test_a_full_conversation_ends_or_is_compacted() -> None:
    ended = generate(config(SESSIONS), requests=3000, rate_rps=5, seed=0, max_tokens=600)
    compacted = generate(config(COMPACTING), requests=3000, rate_rps=5, seed=0, max_tokens=600)
    assert compacted.turn.mean() > 1.5 * ended.turn.mean()
    child = np.flatnonzero(compacted.parent >= 0)
    restarted = compacted.stream[child] != compacted.stream[compacted.parent[child]]
    assert 0.05 < restarted.mean() < 0.9


def test_templates_are_the_beginning_of_prompts() -> None:
    table = generate(config(SINGLE), requests=3000, rate_rps=5, seed=0)
    plain = generate(config(SINGLE, templates=[]), requests=3000, rate_rps=5, seed=0)
    np.testing.assert_array_equal(table.prompt_tokens, plain.prompt_tokens + table.template_tokens)
    assert (table.template_tokens[table.template < 0] == 0).all()
    assert (table.template >= 0).mean() == pytest.approx(0.5, abs=0.04)


def test_duration() -> None:
    table = generate(config(SINGLE), duration_s=1000.0, rate_rps=10.0, seed=0)
    assert table.arrival_s.max() < 1000.0
    assert len(table) == pytest.approx(10_000, rel=0.05)
    assert len(generate(config(SINGLE), duration_s=1000.0, requests=50, rate_rps=10.0)) == 50
    sessions = generate(config(SESSIONS), duration_s=100.0, rate_rps=10.0, seed=0)
    assert len(sessions) == 1000
    assert sessions.arrival_s.max() < 100.0
    assert len(generate(config(SESSIONS), duration_s=100.0, requests=50, rate_rps=10.0)) == 50


def test_max_tokens_of_engine_and_workload() -> None:
    limited = config(SINGLE, max_tokens=300)
    for engine, expected in ((None, 300), (1000, 300), (200, 200)):
        table = generate(limited, requests=3000, rate_rps=1.0, max_tokens=engine)
        assert (table.prompt_tokens + table.output_tokens).max() == expected


def test_mean_lengths() -> None:
    prompt, output = mean_lengths(config(SINGLE, templates=[]))
    assert prompt == pytest.approx(np.exp(5.5), rel=0.05)
    assert output == pytest.approx(np.exp(4.5), rel=0.05)


@pytest.mark.parametrize("content", [SINGLE, SESSIONS])
def test_a_million_requests_take_well_under_two_seconds(content: dict[str, Any]) -> None:
    start = time.process_time()
    assert len(generate(config(content), requests=1_000_000, rate_rps=50.0)) == 1_000_000
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rate_rps": 1.0}, "requests"),
        ({"requests": 10}, "rate_rps"),
        ({"requests": 10, "rate_rps": -1.0}, "rate_rps"),
        ({"requests": 10, "rate_rps": float("nan")}, "rate_rps"),
        ({"requests": 0, "rate_rps": 1.0}, "requests"),
        ({"duration_s": 0.0, "rate_rps": 1.0}, "duration_s"),
        ({"duration_s": 1e-9, "rate_rps": 1.0}, "duration_s"),
        ({"requests": 10, "rate_rps": 1.0, "max_tokens": 1}, "max_tokens"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        generate(config(SINGLE), **arguments)
    assert (caught.value.source, caught.value.field) == ("single", field)
