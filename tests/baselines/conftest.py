"""Views made by hand and at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from servegym.baselines import interface as i

EngineFactory = Callable[..., i.EngineViews]
RequestFactory = Callable[..., i.RequestView]
QueueFactory = Callable[..., i.QueueView]


def engines_from(count: int, **columns: object) -> i.EngineViews:
    """Engine views from columns by name; the rest is zero; all are available, rates and pressure 1."""
    data = np.zeros((count, i.ENGINE_COLUMNS))
    data[:, [i.E_AVAILABLE, i.E_PREFILL_TOKENS_PER_S, i.E_MOE_PRESSURE]] = 1.0
    for name, values in columns.items():
        data[:, getattr(i, f"E_{name.upper()}")] = values
    return i.EngineViews(data)


def request_from(**values: object) -> i.RequestView:
    return i.RequestView(**{"index": 0, "now_s": 0.0, "arrival_s": 0.0, "prompt_tokens": 100} | values)


def queue_from(now_s: float, **columns: object) -> i.QueueView:
    """Queue view from columns by name; the wait follows from the arrival, the lengths of outputs are unknown."""
    count = max(len(values) for values in columns.values())
    data = np.zeros((count, i.QUEUE_COLUMNS))
    data[:, [i.Q_OUTPUT_TOKENS, i.Q_PREDICTED_TOKENS]] = np.nan
    data[:, i.Q_DEADLINE_S] = np.inf
    for name, values in columns.items():
        data[:, getattr(i, f"Q_{name.upper()}")] = values
    data[:, i.Q_WAIT_S] = now_s - data[:, i.Q_ARRIVAL_S]
    return i.QueueView(data, now_s, 3, 64, 100, 1000, 16, 40_000.0)


def random_engines(rng: np.random.Generator, count: int) -> i.EngineViews:
    """Engines with many ties: small counts, coarse shares, some (or all) unavailable, some with homes."""
    engines = engines_from(
        count,
        available=rng.random(count) < rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.4, 0.5]),
        waiting=rng.integers(0, 4, count),
        running=rng.integers(0, 5, count),
        kv_usage=rng.integers(0, 21, count) / 20,
        inflight=rng.integers(0, 6, count),
        inflight_prompt_tokens=rng.integers(0, 9, count) * 1000,
        prefill_tokens=rng.integers(0, 4, count) * 250,
        hit_tokens=rng.integers(0, 4, count) * 64,
        dispatched=rng.integers(0, 50, count),
        dispatched_since=rng.integers(0, 3, count),
        prefill_requests=rng.integers(0, 4, count),
        kv_tokens=rng.integers(1, 4, count) * 2000,
        prefill_tokens_per_s=rng.integers(1, 3, count) * 400,
        moe_pressure=rng.integers(2, 7, count) / 4,
        index_tokens=rng.integers(0, 3, count) * 64,
        true_prefill_tokens=rng.integers(0, 900, count),
        true_output_tokens=rng.integers(0, 900, count),
    )
    for home in (i.E_USER_HOME, i.E_SESSION_HOME):
        engines.data[rng.integers(count), home] = rng.integers(2)
    return engines


def random_request(rng: np.random.Generator, count: int) -> i.RequestView:
    return request_from(
        prompt_tokens=int(rng.integers(1, 300)),
        last_engine=int(rng.integers(-1, count)),
        deadline_s=float(rng.choice([0.5, 3.0, np.inf])),
        session=int(rng.integers(-1, 3)),
        user=int(rng.integers(-1, 3)),
        turn=int(rng.integers(0, 2)),
        prefix_key=int(rng.integers(0, 3)) * 2**40,
        uniforms=(float(rng.random()), float(rng.random())),
    )


@pytest.fixture(scope="session")
def make_engines() -> EngineFactory:
    return engines_from


@pytest.fixture(scope="session")
def make_request() -> RequestFactory:
    return request_from


@pytest.fixture(scope="session")
def make_queue() -> QueueFactory:
    return queue_from


@pytest.fixture(scope="session")
def draw_decision() -> Callable[[np.random.Generator], tuple[i.RequestView, i.EngineViews]]:
    """Draws one dispatch decision over 1 to 8 engines."""

    def draw(rng: np.random.Generator) -> tuple[i.RequestView, i.EngineViews]:
        count = int(rng.integers(1, 9))
        return random_request(rng, count), random_engines(rng, count)

    return draw


@pytest.fixture(scope="session")
def draw_queue() -> Callable[[np.random.Generator], i.QueueView]:
    """Draws one waiting queue of 0 to 12 requests, with true and (some) predicted lengths."""

    def draw(rng: np.random.Generator) -> i.QueueView:
        count = int(rng.integers(0, 13))
        predicted = rng.integers(1, 40, count) * 1.0
        predicted[rng.random(count) < 0.3] = np.nan
        return queue_from(
            20.0,
            arrival_s=np.sort(rng.integers(0, 200, count) / 10),
            prompt_tokens=rng.integers(1, 20, count) * 50,
            computed_tokens=rng.integers(0, 2, count) * 16,
            priority=rng.integers(-2, 3, count),
            output_tokens=rng.integers(1, 40, count),
            deadline_s=rng.choice([0.5, 3.0, np.inf], count),
            preemptions=rng.integers(0, 3, count),
            user_served=np.where(rng.random(count) < 0.5, np.nan, rng.integers(0, 40, count)),
            index=rng.integers(0, 10**6, count),
            predicted_tokens=predicted,
        )

    return draw
