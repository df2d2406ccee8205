"""Features: known values, equivariance, masking, finiteness."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.features import ENGINE_FEATURE_NAMES, REQUEST_FEATURE_NAMES, dispatch_features
from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DECODE_STEP_S,
    E_FIRST_TOKEN_S,
    E_FRESH_TOKENS,
    E_HIT_TOKENS,
    E_INDEX_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_KV_TOKENS,
    E_KV_USAGE,
    E_MAX_BATCHED_TOKENS,
    E_MAX_NUM_SEQS,
    E_MOE_PRESSURE,
    E_PREFILL_REQUESTS,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
    E_TTFT_EWMA_S,
    E_UNCACHED_TOKENS,
    ENGINE_COLUMNS,
    EngineViews,
    FloatArray,
    RequestView,
)

OF_QUEUES = ("prompt_above", "prompt_below", "prompt_work", "queue_work", "queue_batch")


def _engines(count: int) -> FloatArray:
    rng = np.random.default_rng(0)
    data = rng.uniform(0, 50, (count, ENGINE_COLUMNS))
    data[:, E_AVAILABLE] = 1.0
    data[:, E_KV_USAGE] = rng.uniform(0, 1, count)
    data[:, E_MAX_NUM_SEQS], data[:, E_KV_TOKENS] = 256, 750_000
    data[:, E_PREFILL_TOKENS_PER_S], data[:, E_DECODE_STEP_S] = 60_000, 0.004
    return data


REQUEST = RequestView(index=3, now_s=1.0, arrival_s=1.0, prompt_tokens=800, turn=1)


def test_values_of_one_engine() -> None:
    data = _engines(2)
    data[0, E_PREFILL_TOKENS], data[0, E_HIT_TOKENS], data[0, E_INFLIGHT] = 1500.0, 300.0, 7.0
    data[0, E_TTFT_EWMA_S] = 0.3
    engines, request = dispatch_features(REQUEST, EngineViews(data))
    first = dict(zip(ENGINE_FEATURE_NAMES, engines[0].tolist(), strict=True))
    assert first["log_prefill_work"] == pytest.approx(np.log(2.0), abs=1e-6)
    assert first["log_batch"] == pytest.approx(np.log(8 / 32), abs=1e-6)
    assert first["hit_share"] == pytest.approx(300 / 800)
    assert first["batch_share"] == pytest.approx(7 / 256)
    assert first["ttft"] == pytest.approx(np.log(4.0), abs=1e-6)
    assert first["prefill_time"] == pytest.approx(np.log1p(2000 / 60_000 / 0.1), abs=1e-6)
    named = dict(zip(REQUEST_FEATURE_NAMES, request.tolist(), strict=True))
    assert named["log_prompt"] == pytest.approx(np.log(0.8), abs=1e-6)
    assert (named["follow_up"], named["urgency"]) == (1.0, 0.0)
    assert named["log_engines"] == pytest.approx(np.log(2.0), abs=1e-6)


def test_relative_features_are_zero_at_the_best_engine() -> None:
    engines, _ = dispatch_features(REQUEST, EngineViews(_engines(5)))
    for name in ("relative_prefill_work", "relative_batch", "relative_kv_usage"):
        column = engines[:, ENGINE_FEATURE_NAMES.index(name)]
        assert column.min() == 0.0
        assert (column[1:] != column[0]).any()


def _named(data: FloatArray, prompt: int) -> list[dict[str, float]]:
    engines, _ = dispatch_features(RequestView(0, 0.0, 0.0, prompt), EngineViews(data))
    return [dict(zip(ENGINE_FEATURE_NAMES, row, strict=True)) for row in engines.tolist()]


def test_sizes_are_compared_where_requests_queue() -> None:
    data = _engines(2)
    data[:, [E_HIT_TOKENS, E_INDEX_TOKENS]] = 0.0
    data[0, [E_PREFILL_TOKENS, E_PREFILL_REQUESTS, E_INFLIGHT, E_INFLIGHT_PROMPT_TOKENS]] = 600.0, 3.0, 3.0, 600.0
    data[1, [E_PREFILL_TOKENS, E_PREFILL_REQUESTS, E_INFLIGHT, E_INFLIGHT_PROMPT_TOKENS]] = 0.0, 0.0, 4.0, 2_600.0
    data[:, E_PREFILL_TOKENS_PER_S] = 300.0
    first, second = _named(data, 800)
    # A second of backlog on average: queueing 1/2.
    assert first["prompt_above"] == pytest.approx(np.log(4.0) / 2, abs=1e-6)
    assert (first["prompt_below"], second["prompt_above"], second["prompt_below"]) == (0.0, 0.0, 0.0)
    assert _named(data, 50)[0]["prompt_below"] == pytest.approx(np.log(4.0) / 2, abs=1e-6)
    # The mean prompt is 4,000 / 8; work 1,400 against 800.
    work, size = np.log(1400 / 800), np.log(800 / 500)
    assert first["queue_work"] == pytest.approx(work / 2, abs=1e-6)
    assert first["prompt_work"] == pytest.approx(work * size / 2, abs=1e-6)
    assert second["queue_batch"] == pytest.approx(np.log(5 / 4) / 2, abs=1e-6)
    assert second["prompt_work"] == 0.0
    # Of rare sizes only the direction counts.
    assert _named(data, 100_000)[0]["prompt_work"] == pytest.approx(np.log(100_600 / 100_000) * 2 / 2, abs=1e-6)


def test_without_a_queue_sizes_count_for_nothing() -> None:
    data = _engines(3)
    data[:, [E_PREFILL_TOKENS, E_PREFILL_REQUESTS]] = 0.0
    for row in _named(data, 5_000):
        assert {row[name] for name in OF_QUEUES} == {0.0}


def test_where_slots_run_out_sizes_fade_and_work_counts() -> None:
    data = _engines(2)
    data[:, E_MAX_NUM_SEQS] = 100.0
    data[:, E_PREFILL_TOKENS_PER_S] = 300.0
    data[:, E_PREFILL_REQUESTS] = 40.0, 30.0
    data[:, E_INFLIGHT] = 110.0, 60.0  # 70 and 30 decode: many wait, none of them for a slot
    calm = _named(data, 800)
    data[0, E_INFLIGHT] = 115.0
    quarter = _named(data, 800)
    data[0, E_INFLIGHT] = 140.0
    full = _named(data, 800)
    for rows, crowding in ((calm, 0.0), (quarter, 0.25), (full, 1.0)):
        for row in rows:
            assert row["crowded_work"] == pytest.approx(10.0 * crowding * row["relative_prefill_work"], abs=1e-5)
            assert row["crowded_batch"] == pytest.approx(crowding * row["relative_batch"], abs=1e-5)
            assert row["crowded_step"] == pytest.approx(crowding * row["decode_step"], abs=1e-5)
    for k in range(2):
        for name in ("prompt_above", "prompt_below", "queue_work"):  # which do not see the requests that decode
            assert quarter[k][name] == pytest.approx(0.75 * calm[k][name], abs=1e-5)
        assert {full[k][name] for name in OF_QUEUES} == {0.0}
    for name in ("crowded_work", "crowded_batch", "crowded_step"):
        assert any(row[name] != 0.0 for row in full)
    assert any(row["queue_work"] > 0.0 for row in calm)


@pytest.mark.parametrize(("engines", "full", "crowded"), [(16, 1, 1.0), (17, 1, 0.0), (17, 2, 1.0), (33, 2, 0.0)])
def test_of_many_engines_some_may_be_full(engines: int, full: int, crowded: float) -> None:
    data = np.repeat(_engines(1), engines + 1, axis=0)
    data[:, [E_INFLIGHT, E_PREFILL_REQUESTS]] = 10.0, 0.0
    data[:full, E_INFLIGHT] = 256.0
    data[-1, [E_AVAILABLE, E_INFLIGHT]] = 0.0, 256.0  # which counts for nothing
    row = _named(data, 800)[0]
    assert row["relative_batch"] > 0.0
    assert row["crowded_batch"] == pytest.approx(crowded * row["relative_batch"], abs=1e-6)


@pytest.mark.parametrize(("received", "last", "expected"), [(0, 1, [0, 0]), (7, 1, [0, 1]), (7, -1, [0, 0])])
def test_requests_that_resume_may_stay_together(received: int, last: int, expected: list[float]) -> None:
    request = RequestView(0, 2.0, 1.0, 800, last_engine=last, received_tokens=received)
    engines, _ = dispatch_features(request, EngineViews(_engines(2)))
    assert engines[:, ENGINE_FEATURE_NAMES.index("resumed")].tolist() == expected


def test_cached_tokens_count_as_such_and_as_share_of_the_cache() -> None:
    data = _engines(2)
    data[0, [E_HIT_TOKENS, E_INDEX_TOKENS]] = 500.0, 375_000.0
    first = _named(data, 800)[0]
    assert first["log_hit"] == pytest.approx(np.log(1.5), abs=1e-6)
    assert first["index_share"] == pytest.approx(0.5)


def test_what_was_sent_before_the_last_first_token_is_in_the_running_step() -> None:
    data = _engines(3)
    data[:, [E_HIT_TOKENS, E_DECODE_STEP_S, E_MAX_BATCHED_TOKENS]] = 0.0, 0.01, 2000.0
    data[:, E_PREFILL_TOKENS_PER_S] = 50_000.0  # 20 us a token, 5 of them the step's own
    data[0, [E_UNCACHED_TOKENS, E_FRESH_TOKENS, E_FIRST_TOKEN_S]] = 3000.0, 1000.0, 99.98
    data[1, [E_UNCACHED_TOKENS, E_FRESH_TOKENS, E_FIRST_TOKEN_S]] = 3000.0, 1000.0, 50.0
    data[2, [E_UNCACHED_TOKENS, E_FRESH_TOKENS]] = 0.0, 0.0
    engines, _ = dispatch_features(RequestView(0, 100.0, 100.0, 800), EngineViews(data))
    rows = [dict(zip(ENGINE_FEATURE_NAMES, row, strict=True)) for row in engines.tolist()]
    expected = np.array([(0.01 + 0.03 - 0.02) + 0.01 + 0.027, 0.01 + 0.027, 0.01 + 0.012])
    np.testing.assert_allclose([row["log_expected_ttft"] for row in rows], np.log(10 * expected), atol=1e-5)
    assert rows[0]["log_uncached_work"] == pytest.approx(np.log(3.8), abs=1e-6)


def test_pressure_of_experts_is_zero_where_unknown_and_bounded() -> None:
    data = _engines(4)
    data[:, E_MOE_PRESSURE] = 1.0, 1.1, 0.0, 50.0
    values = [row["moe_pressure"] for row in _named(data, 800)]
    assert values == pytest.approx([0.0, 10.0 * np.log(1.1), -10.0, 10.0], abs=1e-5)


def test_permuting_engines_permutes_their_features() -> None:
    data, order = _engines(6), [3, 0, 5, 1, 4, 2]
    engines, request = dispatch_features(REQUEST, EngineViews(data))
    permuted, same = dispatch_features(REQUEST, EngineViews(data[order]))
    np.testing.assert_array_equal(permuted, engines[order])
    np.testing.assert_allclose(same, request, rtol=1e-6)


def test_unavailable_engines_are_zero_and_count_for_nothing() -> None:
    data = _engines(4)
    data[2, E_AVAILABLE] = 0.0
    engines, request = dispatch_features(REQUEST, EngineViews(data))
    fewer, without = dispatch_features(REQUEST, EngineViews(np.delete(data, 2, axis=0)))
    assert (engines[2] == 0).all()
    np.testing.assert_array_equal(np.delete(engines, 2, axis=0), fewer)
    np.testing.assert_array_equal(request, without)


def test_idle_engines_give_finite_features() -> None:
    data = _engines(3)
    data[:, 1:E_MAX_NUM_SEQS] = 0.0
    engines, request = dispatch_features(RequestView(0, 0.0, 0.0, 1), EngineViews(data))
    assert np.isfinite(engines).all()
    assert np.isfinite(request).all()
