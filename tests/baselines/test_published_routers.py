"""Published dispatch rules, on views small enough to decide by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.interface import pick


def scores(spec: str, request, engines) -> list[float]:
    return registry.create("engine", spec).score(request, engines).tolist()


def choose(spec: str, request, engines) -> int:
    return pick(registry.create("engine", spec).score(request, engines), engines.available)


def test_jsw_oracle_takes_the_least_work_in_seconds(make_request, make_engines) -> None:
    engines = make_engines(
        2, true_prefill_tokens=[100, 300], true_output_tokens=[50, 10], prefill_tokens_per_s=[1000, 500]
    )
    np.testing.assert_allclose(scores("jsw_oracle", make_request(), engines), [1.1, 1.0], atol=1e-5)
    assert choose("jsw_oracle,decode_weight=0", make_request(), engines) == 0


def test_gimbal2_sums_standardised_pressures(make_request, make_engines) -> None:
    engines = make_engines(2, prefill_tokens=[100, 300], kv_usage=[0.6, 0.2], moe_pressure=[1.0, 1.0])
    # Of two, one lies a deviation above the mean and one below; nothing is queued and the pressure is even.
    assert choose("gimbal2,kv=2", make_request(), engines) == 1
    assert choose("gimbal2,prefill=2", make_request(), engines) == 0
    uneven = make_engines(2, kv_usage=[0.2, 0.6], moe_pressure=[1.4, 0.6])
    assert choose("gimbal2,moe=2", make_request(), uneven) == 1
    assert choose("gimbal2,moe=0", make_request(), uneven) == 0


def test_gimbal2_counts_as_queued_what_no_telemetry_has_seen_start(make_request, make_engines) -> None:
    columns = {"prefill_tokens": [400, 400], "prefill_requests": [4, 4]}
    engines = make_engines(2, waiting=[1, 0], dispatched_since=[0, 2], **columns)
    assert choose("gimbal2", make_request(), engines) == 0


def test_dynamo_adds_blocks_to_prefill_and_blocks_held(make_request, make_engines) -> None:
    engines = make_engines(
        3, prefill_tokens=[0, 160, 0], hit_tokens=[0, 320, 0], kv_usage=[0.5, 0.5, 0.1], kv_tokens=[3200] * 3
    )
    # 20 + 100 blocks, 10 + 20 - 20 + 100, and 20 + 20.
    np.testing.assert_allclose(scores("dynamo", make_request(prompt_tokens=320), engines), [120, 110, 40], atol=1e-4)
    assert choose("dynamo,prefill_scale=10", make_request(prompt_tokens=320), engines) == 1


def test_dynamo_with_temperature_draws_by_softmax(make_request, make_engines) -> None:
    engines = make_engines(2, kv_usage=[0.0, 1.0], kv_tokens=[1600, 1600])
    draws = (np.arange(1000) + 0.5) / 1000
    chosen = [choose("dynamo,temperature=1", make_request(uniforms=(u, 0.0)), engines) for u in draws]
    assert np.mean(chosen) == pytest.approx(np.exp(-1) / (1 + np.exp(-1)), abs=0.001)


def test_llm_d_sums_its_three_scores(make_request, make_engines) -> None:
    engines = make_engines(2, waiting=[4, 0], kv_usage=[0.2, 0.4], hit_tokens=[80, 0])
    np.testing.assert_allclose(
        scores("llm_d", make_request(prompt_tokens=100), engines), [-(0 + 1.6 + 2.4), -(2 + 1.2)], atol=1e-5
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"inflight": [40, 0], "hit_tokens": [90, 0]}, 1),  # uneven: the shorter queue
        ({"inflight": [30, 0], "hit_tokens": [90, 0]}, 0),  # even: the match
        ({"hit_tokens": [40, 0], "index_tokens": [640, 64]}, 1),  # no good match: the smaller cache
    ],
)
def test_sglang(make_request, make_engines, columns, expected) -> None:
    assert choose("sglang", make_request(prompt_tokens=100), make_engines(2, **columns)) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"inflight": [12, 0], "hit_tokens": [90, 0]}, 1),
        ({"inflight": [9, 0], "hit_tokens": [10, 0]}, 0),
        ({"hit_tokens": [9, 0], "index_tokens": [640, 64]}, 1),
    ],
)
def test_ray_prefix(make_request, make_engines, columns, expected) -> None:
    assert choose("ray_prefix", make_request(prompt_tokens=100), make_engines(2, **columns)) == expected


def test_br0_keeps_below_the_barrier(make_request, make_engines) -> None:
    engines = make_engines(3, inflight_prompt_tokens=[1000, 700, 200])
    # A prompt of 600 fits only the last engine's room of 800; one of 900 adds least there.
    assert choose("br0", make_request(prompt_tokens=600), engines) == 2
    np.testing.assert_allclose(scores("br0", make_request(prompt_tokens=900), engines), [1800, 900, -600], atol=0.01)


def test_llumnix_takes_the_most_free_tokens_per_request(make_request, make_engines) -> None:
    engines = make_engines(2, kv_usage=[0.5, 0.2], kv_tokens=[4000, 4000], inflight=[2, 4])
    np.testing.assert_allclose(scores("llumnix", make_request(), engines), [-1000, -800], atol=1e-3)


def test_chwbl_follows_the_key_until_the_bound(make_request, make_engines) -> None:
    empty = make_engines(4)
    home = choose("chwbl", make_request(prefix_key=77), empty)
    assert {choose("chwbl", make_request(prefix_key=77, index=k), empty) for k in range(9)} == {home}
    spread = [choose("chwbl", make_request(prefix_key=k), empty) for k in range(1, 2001)]
    assert np.bincount(spread).min() > 430
    # Below ceil(1.25 * (9 + 1) / 4) = 4, at ceil(1.25 * (10 + 1) / 4) = 4.
    inflight = np.full(4, 2)
    inflight[home] = 3
    assert choose("chwbl", make_request(prefix_key=77), make_engines(4, inflight=inflight)) == home
    inflight[home] = 4
    assert choose("chwbl", make_request(prefix_key=77), make_engines(4, inflight=inflight)) != home


def test_an_engine_that_leaves_moves_only_its_own_keys(make_request, make_engines) -> None:
    for key in range(1, 200):
        before = choose("chwbl", make_request(prefix_key=key), make_engines(4))
        after = choose("chwbl", make_request(prefix_key=key), make_engines(4, available=[1, 1, 0, 1]))
        assert after == before or before == 2


def test_dualmap_keeps_to_two_engines_per_key(make_request, make_engines) -> None:
    engines = make_engines(5, prefill_tokens_per_s=[1000] * 5)
    for key in range(1, 50):
        request = make_request(prefix_key=key)
        candidates = np.flatnonzero(np.isfinite(scores("dualmap", request, engines)))
        assert len(candidates) == 2
        hits, work = np.zeros(5), np.zeros(5)
        hits[candidates[1]] = 90
        cached = make_engines(5, prefill_tokens_per_s=[1000] * 5, hit_tokens=hits)
        assert choose("dualmap", request, cached) == candidates[1]
        work[candidates[1]] = 5000  # seconds beyond the objective
        busy = make_engines(5, prefill_tokens_per_s=[1000] * 5, hit_tokens=hits, prefill_tokens=work)
        assert choose("dualmap", request, busy) == candidates[0]


def test_preble_exploits_long_matches_only(make_request, make_engines) -> None:
    columns = {"inflight_prompt_tokens": [500, 0], "kv_tokens": [4000, 4000]}
    assert choose("preble", make_request(), make_engines(2, hit_tokens=[60, 0], **columns)) == 0
    assert choose("preble", make_request(), make_engines(2, hit_tokens=[40, 0], **columns)) == 1
    # 100 missed tokens with 40 free ones: 60 evicted.
    full = make_engines(2, kv_usage=[0.99, 0.5], kv_tokens=[4000, 4000])
    np.testing.assert_allclose(scores("preble", make_request(), full), [160, 100], atol=1e-4)


def test_smetric_stays_on_later_turns_within_the_objective(make_request, make_engines) -> None:
    columns = {"hit_tokens": [80, 0], "inflight": [3, 0], "prefill_tokens_per_s": [1000, 1000]}
    engines = make_engines(2, **columns)
    assert choose("smetric", make_request(turn=0), engines) == 0  # 20 * 4 against 100 * 1
    assert scores("smetric", make_request(turn=1), engines)[0] == -1.0
    busy = make_engines(2, prefill_tokens=[2000, 0], **columns)
    assert choose("smetric", make_request(turn=1), busy) == 1
    assert choose("smetric,slack=3", make_request(turn=1), busy) == 0


def test_autellix_keeps_long_prompts_at_home(make_request, make_engines) -> None:
    engines = make_engines(2, session_home=[1, 0], inflight=[5, 0])
    assert choose("autellix", make_request(prompt_tokens=2048), engines) == 1
    assert choose("autellix", make_request(prompt_tokens=2049), engines) == 0


def test_sita_gives_each_engine_an_interval_of_sizes_once_requests_queue(make_request, make_engines) -> None:
    backlog = {"prefill_tokens": [900, 500, 700, 100], "inflight": [4] * 4, "inflight_prompt_tokens": [2000] * 4}
    busy = make_engines(4, prefill_tokens_per_s=[100] * 4, **backlog)
    sizes = (5, 350, 1000, 60_000)
    assert [choose("sita", make_request(prompt_tokens=size), busy) for size in sizes] == [0, 1, 2, 3]
    # A wider spread lets neighbours with less backlog serve it; cutoffs move with the shift.
    assert choose("sita,spread=1", make_request(prompt_tokens=1000), busy) == 3
    assert choose("sita,shift=-3", make_request(prompt_tokens=350), busy) == 3
    # Intervals are those of the engines that are there.
    fewer = make_engines(4, prefill_tokens_per_s=[100] * 4, available=[0, 1, 1, 0], **backlog)
    assert [choose("sita", make_request(prompt_tokens=size), fewer) for size in sizes] == [1, 1, 2, 2]


def test_sita_is_lmetric_while_nothing_queues(make_request, make_engines) -> None:
    columns = {"prefill_tokens": [300, 200, 0], "inflight": [1, 2, 9], "hit_tokens": [0, 50, 0]}
    idle = make_engines(3, prefill_tokens_per_s=[1e5] * 3, inflight_prompt_tokens=[300, 400, 900], **columns)
    for size in (10, 100, 10_000):
        request = make_request(prompt_tokens=size)
        assert scores("sita", request, idle) == scores("lmetric", request, idle)
