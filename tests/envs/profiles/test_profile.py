"""The format of profiles, their errors, and the cost of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.configuration import shipped_configs
from servegym.envs.profiles import Profile, TokenCurve, decode_step_s, load_profile, prefill_tokens_per_s
from servegym.errors import InputError

SHIPPED = sorted(shipped_configs("profiles"))


def content() -> dict[str, Any]:
    """A profile whose terms are powers of ten apart, so that a sum shows which of them entered how often."""
    return {
        "name": "toy",
        "description": "d",
        "model": "m",
        "hardware": "h",
        "source": "s",
        "engine": {"num_blocks": 100, "max_num_batched_tokens": 64},
        "step_time": {
            "fixed_us": 1000,
            "per_sequence_us": 100,
            "dense_us": {"tokens": [1, 11], "us": [10, 30]},
            "moe_us": {"tokens": [4, 8], "us": [1, 2]},
            "moe_imbalance": 1.5,
            "communication_us": {"tokens": [1, 2], "us": [0.5, 1.0]},
            "prefill_pair_us": 0.01,
            "decode_context_us": 0.001,
        },
    }


def write(folder: Path, change: dict[str, Any]) -> Path:
    """Write the toy profile with dotted keys replaced; the value ``...`` removes the key."""
    data = content()
    for key, value in change.items():
        *parents, leaf = key.split(".")
        target = data
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[leaf]
        else:
            target[leaf] = value
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_step_time_is_the_documented_sum(tmp_path: Path) -> None:
    cost = load_profile(write(tmp_path, {})).compile()
    # A chunk of 3 behind 5 tokens: 6 + 7 + 8 = 21 query-key pairs; one of 2 from the start: 1 + 2 = 3.
    # 7 tokens: dense 10 + 6 * 2 = 22, MoE 1.5 * 1.75, communication 3.5 beyond its last point.
    step = cost.step_s([(5, 3), (0, 2)], [40, 60])
    expected_us = 1000 + 4 * 100 + 22 + 1.5 * 1.75 + 3.5 + 24 * 0.01 + 100 * 0.001
    assert step == pytest.approx(expected_us * 1e-6, rel=1e-12)


def test_rates_are_steps_of_a_full_chunk_and_of_equal_sequences(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, {}))
    cost = profile.compile()
    assert prefill_tokens_per_s(profile) == pytest.approx(64 / cost.step_s([(0, 64)], []))
    assert decode_step_s(profile) == pytest.approx(cost.step_s([], [1]))
    assert decode_step_s(profile, 3, 200) == pytest.approx(cost.step_s([], [200] * 3))
    assert decode_step_s(profile, 100) > decode_step_s(profile, 64)  # beyond the token budget: no table ends there


def test_curve_is_flat_below_linear_between_and_extended_above() -> None:
    curve = TokenCurve(tokens=(10, 20, 40), us=(5, 7, 8))
    assert curve.at(np.array([0, 1, 10, 15, 20, 30, 40, 60])).tolist() == [0, 5, 5, 6, 7, 7.5, 8, 9]


def test_falling_curve_never_gets_negative() -> None:
    assert TokenCurve(tokens=(1, 2), us=(5, 1)).at(np.array([10])).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_time.fixed_us": ...}, "step_time.fixed_us: missing; this field is required"),
        ({"engine.num_blocks": ...}, "engine.num_blocks: missing; this field is required"),
        (
            {"step_time.dense_us": {"tokens": [1, 2]}},
            "step_time.dense_us.us: missing; this field is required",
        ),
        ({"step_time.fixed_us": "slow"}, "step_time.fixed_us: got 'slow'; allowed: a valid number"),
        ({"step_time.prefill_pair_us": -1}, "step_time.prefill_pair_us: got -1; allowed: greater than or equal to 0"),
        (
            {"step_time.decode_context_us": float("nan")},
            "step_time.decode_context_us: got nan; allowed: a finite number",
        ),
        ({"step_time.moe_us.us": [1, float("inf")]}, "step_time.moe_us.us.1: got inf; allowed: a finite number"),
        ({"step_time.moe_imbalance": 0.5}, "step_time.moe_imbalance: got 0.5; allowed: greater than or equal to 1"),
        ({"engine.max_num_seq": 8}, "engine.max_num_seq: unknown key; did you mean max_num_seqs?"),
        ({"engine.block_size": 0}, "engine.block_size: got 0; allowed: greater than or equal to 1"),
        ({"engine.scheduling_policy": "sjf"}, "engine.scheduling_policy: got 'sjf'; allowed: 'fcfs' or 'priority'"),
        (
            {"step_time.dense_us.tokens": [11, 1]},
            "step_time.dense_us: got a mapping; allowed: tokens in increasing order (1 follows 11)",
        ),
        (
            {"step_time.dense_us.us": [1, 2, 3]},
            "step_time.dense_us: got a mapping; allowed: as many values in us (3) as in tokens (2)",
        ),
    ],
)
def test_bad_profile_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, change)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean qwen3-30b-a3b-h200"):
        load_profile("qwen3-30b-h200")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_names_itself_and_its_source(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert "Measured:" in profile.source
    assert "Modelled:" in profile.source
    longest = -(-profile.engine.max_model_len // profile.engine.block_size)
    assert profile.engine.num_blocks > longest  # vLLM refuses a cache that cannot hold one request of full length


def profiles() -> st.SearchStrategy[Profile]:
    return st.sampled_from([load_profile(name) for name in SHIPPED])


@given(profile=profiles(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_more_work_never_takes_less_time(profile: Profile, data: st.DataObject) -> None:
    cost = profile.compile()
    budget = profile.engine.max_num_batched_tokens
    chunk = data.draw(st.integers(1, budget - 8))
    contexts = data.draw(st.lists(st.integers(1, profile.engine.max_model_len), max_size=7))
    before = data.draw(st.integers(0, profile.engine.max_model_len))
    step = cost.step_s([(before, chunk)], contexts)
    assert step > 0
    assert cost.step_s([(before, chunk + 1)], contexts) >= step
    assert cost.step_s([(before + 1, chunk)], contexts) >= step
    assert cost.step_s([(before, chunk)], [*contexts, 1]) > step
