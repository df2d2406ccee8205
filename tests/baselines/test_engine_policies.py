"""The rule of every dispatch heuristic, on views small enough to decide by hand."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.interface import E_AVAILABLE, EngineViews, pick


def choose(spec: str, request, engines) -> int:
    return pick(registry.create("engine", spec).score(request, engines), engines.available)


def test_round_robin_skips_engines_that_are_down(make_request, make_engines) -> None:
    engines = make_engines(4, available=[1, 1, 0, 1])
    chosen = [-1]
    for _ in range(6):
        chosen.append(choose("round_robin", make_request(last_engine=chosen[-1]), engines))
    assert chosen[1:] == [0, 1, 3, 0, 1, 3]


def test_random_is_uniform_over_the_available(make_request, make_engines) -> None:
    engines = make_engines(4, available=[1, 0, 1, 1])
    draws = (np.arange(300) + 0.5) / 300
    chosen = [choose("random", make_request(uniforms=(u, 0.0)), engines) for u in draws]
    assert np.bincount(chosen, minlength=4).tolist() == [100, 0, 100, 100]


def test_least_requests(make_request, make_engines) -> None:
    assert choose("least_requests", make_request(), make_engines(3, inflight=[4, 2, 3])) == 1
    assert choose("least_requests", make_request(), make_engines(3, inflight=[4, 2, 3], available=[1, 0, 1])) == 2


@pytest.mark.parametrize(("last", "expected"), [(-1, 0), (0, 1), (1, 3), (3, 0)])
def test_least_requests_lets_equal_engines_take_turns(make_request, make_engines, last, expected) -> None:
    engines = make_engines(4, inflight=[1, 1, 2, 1])
    assert choose("least_requests", make_request(last_engine=last), engines) == expected


def test_power_of_two_takes_the_lighter_of_every_pair_equally_often(make_request, make_engines) -> None:
    engines = make_engines(4, inflight=[9, 1, 5, 3], available=[1, 0, 1, 1])
    policy = registry.create("engine", "power_of_two")
    pairs: dict[tuple[int, ...], int] = {}
    for u in (np.arange(6) + 0.5) / 6:
        for v in (np.arange(6) + 0.5) / 6:
            scores = policy.score(make_request(uniforms=(u, v)), engines)
            drawn = tuple(np.flatnonzero(scores < np.inf).tolist())
            pairs[drawn] = pairs.get(drawn, 0) + 1
            assert scores.argmin() == min(drawn, key=lambda e: engines.inflight[e])
    assert pairs == {(0, 2): 12, (0, 3): 12, (2, 3): 12}


def test_power_of_two_with_equal_engines_is_uniform(make_request, make_engines) -> None:
    grid = (np.arange(12) + 0.5) / 12
    chosen = [choose("power_of_two", make_request(uniforms=(u, v)), make_engines(4)) for u in grid for v in grid]
    assert np.bincount(chosen, minlength=4).tolist() == [36, 36, 36, 36]


def test_power_of_two_with_one_engine_left(make_request, make_engines) -> None:
    assert choose("power_of_two", make_request(uniforms=(0.99, 0.99)), make_engines(3, available=[0, 0, 1])) == 2


def test_lmetric_weighs_cached_tokens_against_the_batch(make_request, make_engines) -> None:
    # P = 0 + 1000 - 800 = 200, B = 3 + 1: 800.   P = 0 + 1000, B = 0 + 1: 1000.
    engines = make_engines(2, inflight=[3, 0], hit_tokens=[800, 0])
    scores = registry.create("engine", "lmetric").score(make_request(prompt_tokens=1000), engines)
    assert scores == pytest.approx([800, 1000])
    busier = make_engines(2, inflight=[4, 0], hit_tokens=[700, 0], prefill_tokens=[50, 0])  # 350 * 5
    assert choose("lmetric", make_request(prompt_tokens=1000), busier) == 1


def test_lmetric_prefers_the_cache_among_idle_engines(make_request, make_engines) -> None:
    assert choose("lmetric", make_request(last_engine=0), make_engines(3, hit_tokens=[0, 0, 64])) == 2
    full_hit = make_engines(2, hit_tokens=[0, 100], inflight=[0, 99])  # one token is always computed: 1 * 100
    assert registry.create("engine", "lmetric").score(make_request(), full_hit) == pytest.approx([100, 100])


def test_session_sticky_prefers_session_then_user_then_fewest(make_request, make_engines) -> None:
    columns = {"inflight": [9, 5, 1], "user_home": [0, 1, 0], "session_home": [1, 0, 0]}
    assert choose("session_sticky", make_request(), make_engines(3, **columns)) == 0
    assert choose("session_sticky", make_request(), make_engines(3, **columns, available=[0, 1, 1])) == 1
    assert choose("session_sticky", make_request(), make_engines(3, inflight=[9, 5, 1])) == 2


@pytest.mark.parametrize(("gap", "expected"), [(8, 0), (7, 1), (4, 1), (3, 2)])
def test_session_sticky_leaves_an_overloaded_home(make_request, make_engines, gap, expected) -> None:
    engines = make_engines(3, inflight=[9, 5, 1], user_home=[0, 1, 0], session_home=[1, 0, 0])
    assert choose(f"session_sticky,max_gap={gap}", make_request(), engines) == expected


@pytest.mark.parametrize(
    ("case", "columns", "expected"),
    [
        ("home within both gaps", {"kv_usage": [0.3, 0.2, 0.2], "user_home": [1, 0, 0]}, 0),
        ("home within the load gap", {"inflight_prompt_tokens": [3000, 0, 0], "user_home": [1, 0, 0]}, 0),
        ("home beyond the KV gap", {"kv_usage": [0.5, 0.3, 0.2], "user_home": [1, 0, 0]}, 2),
        ("home beyond the load gap", {"inflight_prompt_tokens": [3001, 9, 0], "user_home": [1, 0, 0]}, 2),
        ("home saturated", {"kv_usage": [0.9, 0.85, 0.85], "user_home": [1, 0, 0]}, 2),
        ("KV gap comes before load", {"kv_usage": [0.5, 0.3, 0.4], "inflight_prompt_tokens": [0, 9000, 0]}, 1),
        ("load gap", {"inflight_prompt_tokens": [9000, 5000, 6000]}, 1),
        ("small gaps: the next in turn", {"kv_usage": [0.2, 0.3, 0.25], "inflight_prompt_tokens": [0, 0, 3000]}, 2),
        ("all saturated: all are candidates", {"kv_usage": [0.97, 0.95, 0.96], "user_home": [1, 0, 0]}, 0),
        ("a saturated engine does not widen the gap", {"kv_usage": [0.95, 0.5, 0.45]}, 2),
        ("an engine that is down is no home", {"available": [0, 1, 1], "user_home": [1, 0, 0]}, 2),
    ],
)
def test_load_aware_cascade(make_request, make_engines, case, columns, expected) -> None:
    assert choose("load_aware", make_request(last_engine=1), make_engines(3, **columns)) == expected, case


def test_load_aware_thresholds_are_parameters(make_request, make_engines) -> None:
    engines = make_engines(2, kv_usage=[0.5, 0.3], user_home=[1, 0])
    assert choose("load_aware", make_request(), engines) == 1
    assert choose("load_aware,theta_diff=0.25", make_request(), engines) == 0


@pytest.mark.parametrize("spec", ["least_requests", "lmetric", "load_aware", "session_sticky"])
def test_scores_follow_the_engines_under_permutation(make_request, make_engines, spec) -> None:
    rng = np.random.default_rng(11)
    policy = registry.create("engine", spec)
    for _ in range(100):
        # Distinct loads, so that no tie is left to the rotation, and a gap that takes `load_aware` past round robin.
        engines = make_engines(
            5,
            inflight=rng.permutation(30)[:5],
            kv_usage=rng.permutation([0.05, 0.3, 0.5, 0.7, 0.95]),
            inflight_prompt_tokens=rng.permutation(50)[:5] * 997,
            prefill_tokens=rng.permutation(5000)[:5],
            hit_tokens=rng.integers(0, 99, 5),
        )
        order = rng.permutation(5)
        choice = pick(policy.score(make_request(), engines), engines.available)
        shuffled = EngineViews(engines.data[order])
        assert order[pick(policy.score(make_request(), shuffled), shuffled.available)] == choice


@pytest.mark.parametrize("spec", registry.names("engine"))
def test_no_engine_available_or_none_at_all(make_request, make_engines, spec) -> None:
    policy = registry.create("engine", spec)
    assert np.isinf(policy.score(make_request(), make_engines(3, available=0))).all()
    assert policy.score(make_request(), make_engines(0)).shape == (0,)


@pytest.mark.parametrize("spec", registry.names("engine"))
def test_a_score_depends_on_the_views_alone(draw_decision, spec) -> None:
    rng = np.random.default_rng(3)
    used, decisions = registry.create("engine", spec), [draw_decision(rng) for _ in range(50)]
    first = [used.score(*decision) for decision in decisions]
    for scores, (request, engines) in reversed(list(zip(first, decisions, strict=True))):
        np.testing.assert_array_equal(used.score(request, engines), scores)
        np.testing.assert_array_equal(registry.create("engine", spec).score(request, engines), scores)
        assert np.isfinite(scores[engines.data[:, E_AVAILABLE] > 0]).any() or not engines.available.any()
