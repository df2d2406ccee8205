"""The closed loop: hand-computed times, and agreement with a loop that takes every step singly."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.profiles.closed_loop import closed_loop
from servegym.envs.profiles.profile import StepCost, load_profile


def constant(tokens: int, fixed_s: float = 1.0, context_s: float = 0.0) -> StepCost:
    none = np.zeros(tokens + 1)
    return StepCost(none, none, none, fixed_s=fixed_s, sequence_s=0.0, pair_s=0.0, context_s=context_s)


def test_a_request_alone_takes_its_chunks_and_then_a_step_a_token() -> None:
    times = closed_loop(constant(8), np.array([20]), np.array([5]), 1, 8)
    assert times.ttft_s.tolist() == [3.0]  # 8 + 8 + 4 tokens
    assert times.tpot_s.tolist() == [1.0]


def test_the_next_request_is_sent_when_one_ends() -> None:
    times = closed_loop(constant(8), np.array([8, 8, 8]), np.array([3, 3, 3]), 1, 8)
    assert times.ttft_s.tolist() == [1.0, 1.0, 1.0]


def test_decoding_sequences_take_their_token_before_prefill() -> None:
    # Step 1: prefill of the first. Steps 2 and 3: one token for it and 7 of the second's 14.
    times = closed_loop(constant(8), np.array([8, 14]), np.array([9, 2]), 2, 8)
    assert times.ttft_s.tolist() == [1.0, 3.0]


def test_stretches_of_decoding_sum_to_single_steps() -> None:
    cost = load_profile("qwen3-30b-a3b-h200").compile()
    times = closed_loop(cost, np.array([100]), np.array([50]), 1, 8192)
    steps = [cost.step_s([], [context]) for context in range(101, 150)]
    assert times.tpot_s[0] == pytest.approx(sum(steps) / 49)
    assert times.ttft_s[0] == pytest.approx(cost.step_s([(0, 100)], []))


def test_scheduling_ahead_costs_a_request_that_follows_another_one_step_more() -> None:
    prompts, outputs = np.array([4, 4, 4]), np.array([3, 10, 2])
    # The third is sent at 3, when the first ends, and arrives at 3.5. The steps that begin at 4 and at 5 are decided on
    # at 4 without scheduling ahead, and at 3 and 4 with it.
    for ahead, ttft in ((False, 2.0), (True, 3.0)):
        times = closed_loop(constant(8), prompts, outputs, 2, 8, ahead=ahead, frontend_s=0.5)
        assert times.ttft_s.tolist() == [1.5, 1.5, ttft]


def test_full_cache_preempts_the_last_and_computes_it_anew() -> None:
    # Both start in step 1 and fill the cache. The second goes back, the first ends with step 4, and the second computes
    # its five tokens in step 5, which gives its second token; the last one comes with step 7.
    times = closed_loop(constant(8), np.array([4, 4]), np.array([4, 4]), 2, 8, capacity=10)
    assert times.ttft_s.tolist() == [1.0, 1.0]
    assert times.tpot_s.tolist() == [1.0, 2.0]


def test_request_waits_until_its_prompt_fits() -> None:
    times = closed_loop(constant(8), np.array([4, 5]), np.array([4, 3]), 2, 8, capacity=8)
    assert times.ttft_s.tolist() == [1.0, 5.0]
    with pytest.raises(ValueError, match="capacity: got 7; allowed: at least the longest request, 8 tokens"):
        closed_loop(constant(8), np.array([4]), np.array([4]), 1, 8, capacity=7)


def test_prefill_of_others_slows_decoding() -> None:
    cost = load_profile("qwen3-30b-a3b-h200").compile()
    rng = np.random.default_rng(1000)
    prompts, outputs = rng.integers(3000, 4000, 64), rng.integers(100, 200, 64)
    alone, many = (closed_loop(cost, prompts, outputs, concurrency, 8192) for concurrency in (1, 16))
    assert many.tpot_s.mean() > 1.5 * alone.tpot_s.mean()
    assert many.ttft_s[0] <= many.ttft_s[:16].max()
