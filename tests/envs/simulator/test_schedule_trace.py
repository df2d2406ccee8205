"""Known schedules, and invariants of any schedule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.configuration import validate
from servegym.envs.simulator.schedule_trace import ScheduleSpec, schedule_trace
from servegym.errors import InputError

BASE: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "num_blocks": 400,
    "block_size": 16,
    "max_model_len": 2048,
}


def _trace(**changes: Any) -> list[dict[str, Any]]:
    return list(schedule_trace(validate(ScheduleSpec, BASE | changes, "spec.json")))


def _request(name: str, prompt: int, output: int, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": list(range(prompt)), "output_len": output} | more


def test_the_null_block_is_never_free() -> None:
    first = _trace(requests=[_request("r0", 270, 1)])[0]
    assert first == {"step": 0, "scheduled": {"r0": 270}, "preempted": [], "free_blocks": 399 - 17}


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decodes() -> None:
    tokens = [step["scheduled"] for step in _trace(requests=[_request("r0", 1200, 3)])]
    assert tokens == [{"r0": 512}, {"r0": 512}, {"r0": 176}, {"r0": 1}, {"r0": 1}]


def test_idle_steps_are_printed() -> None:
    steps = _trace(requests=[_request("r0", 8, 1, arrival_step=2)])
    assert [step["scheduled"] for step in steps] == [{}, {}, {"r0": 8}]


def test_a_shared_prefix_is_not_computed_twice_even_in_the_same_step() -> None:
    steps = _trace(prefix_caching=True, requests=[_request("a", 64, 1), _request("b", 64, 1)])
    # Three of four blocks are found; the last token is always computed, and with it its block.
    assert steps[0]["scheduled"] == {"a": 64, "b": 16}


def test_priority_goes_before_arrival() -> None:
    requests = [_request("late", 8, 1, priority=5), _request("soon", 8, 1, priority=1)]
    steps = _trace(policy="priority", max_num_seqs=1, requests=requests)
    assert [list(step["scheduled"]) for step in steps] == [["soon"], ["late"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": []}, "requests"),
        ({"num_blocks": 3, "requests": [_request("r0", 100, 1)]}, "can never fit"),
        ({"requests": [_request("r0", 0, 1)]}, "requests.0.prompt"),
        ({"requests": [_request("r0", 1, 0)]}, "requests.0.output_len"),
        ({"policy": "lifo", "requests": [_request("r0", 1, 1)]}, "policy: got 'lifo'"),
        ({"requests": [_request("r0", 1, 1), _request("r0", 1, 1)]}, "stands twice"),
        ({"blocks": 3, "requests": [_request("r0", 1, 1)]}, "blocks: unknown key"),
    ],
)
def test_a_bad_spec_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        _trace(**changes)
    assert message in str(caught.value)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.sampled_from([1, 4, 16]))
    seqs = draw(st.integers(1, 8))
    count = draw(st.integers(1, 15))
    lengths = [(draw(st.integers(1, 60)), draw(st.integers(1, 20))) for _ in range(count)]
    needed = max(-(-(prompt + output) // size) for prompt, output in lengths)
    vocabulary = draw(st.sampled_from([1, 2, 1000]))
    return {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": seqs + draw(st.integers(0, 60)),
        "num_blocks": 1 + needed + draw(st.integers(0, 2 * needed)),
        "block_size": size,
        "max_model_len": 128,
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "prefix_caching": draw(st.booleans()),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 7])),
        "async_scheduling": draw(st.booleans()),
        "requests": [
            {
                "id": f"r{i}",
                "arrival_step": draw(st.integers(0, 12)),
                "prompt": [(i * p) % vocabulary for p in range(prompt)],
                "output_len": output,
                "priority": draw(st.integers(0, 2)),
            }
            for i, (prompt, output) in enumerate(lengths)
        ],
    }


@settings(max_examples=200, deadline=None)
@given(specs())
def test_schedules_conserve_blocks_tokens_and_requests(spec: dict[str, Any]) -> None:
    steps = list(schedule_trace(validate(ScheduleSpec, spec, "spec")))
    capacity = spec["num_blocks"] - 1
    computed = dict.fromkeys((request["id"] for request in spec["requests"]), 0)
    known = {request["id"]: request for request in spec["requests"]}
    preempted_ever: set[str] = set()
    for number, step in enumerate(steps):
        assert step["step"] == number
        assert 0 <= step["free_blocks"] <= capacity
        assert sum(step["scheduled"].values()) <= spec["max_num_batched_tokens"]
        assert len(step["scheduled"]) <= spec["max_num_seqs"]
        assert not set(step["preempted"]) & set(step["scheduled"])
        for name, tokens in step["scheduled"].items():
            assert tokens > 0
            assert known[name]["arrival_step"] <= number
            computed[name] += tokens
        preempted_ever |= set(step["preempted"])
    for name, request in known.items():
        needed = len(request["prompt"]) + request["output_len"] - 1
        if not spec["prefix_caching"] and name not in preempted_ever:
            assert computed[name] == needed  # each token once, the last one never
        else:
            assert computed[name] >= request["output_len"]
