"""What a deployment remembers of its last seconds."""

from __future__ import annotations

import pytest

from servegym.engine_bridge.gateway.recent import RecentTraffic


def test_rates_shares_and_percentiles_of_the_window_alone() -> None:
    recent = RecentTraffic(window_s=10.0)
    recent.sent(1.0, "old", 0, None)
    recent.first_token(1.5, "old", 0, 99.0)
    recent.unserved(2.0, "failed")
    for k in range(30):
        recent.sent(91.0 + 0.3 * k, "a" if k % 3 else "b", k % 2, k % 10 > 0)
        recent.first_token(91.0 + 0.3 * k, "a" if k % 3 else "b", k % 2, 0.01 * (k + 1))
    recent.unserved(95.0, "refused")
    found = recent.summary(100.0, engines=3)
    assert found["window_s"] == 10.0
    assert found["total"]["requests_per_s"] == 3.0
    assert found["total"]["ttft_s"]["p50"] == pytest.approx(0.155)
    assert found["total"]["ttft_s"]["p99"] < 0.31
    assert found["policies"]["a"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert set(found["policies"]) == {"a", "b"}
    assert [engine["requests_per_s"] for engine in found["engines"]] == [1.5, 1.5, 0.0]
    assert found["engines"][2]["ttft_s"] is None
    assert found["unserved_per_s"] == {"refused": 0.1}
    assert found["agreement"] == 0.9


def test_young_and_crowded_deployments_count_by_the_time_that_they_remember() -> None:
    recent = RecentTraffic(window_s=30.0, kept=100)
    for k in range(20):
        recent.sent(0.1 * k, "a", 0, None)
    assert recent.summary(2.0, 1)["total"]["requests_per_s"] == 10.0
    for k in range(1000):
        recent.sent(2.0 + 0.01 * k, "a", 0, None)
    assert recent.summary(12.0, 1)["total"]["requests_per_s"] == pytest.approx(100.0, rel=0.02)
    assert recent.summary(12.0, 1)["agreement"] is None
    assert RecentTraffic().summary(0.0, 2)["total"] == {"requests_per_s": 0.0, "ttft_s": None}
