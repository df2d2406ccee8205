"""Rank agreement and queue lengths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from servegym.envs.validation.agreement import QueueLengths, kendall, spearman


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_those_of_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = rng.standard_normal((2, 9))
        if ties:
            left, right = left.round(), right.round()
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
        assert kendall(left, right) == pytest.approx(stats.kendalltau(left, right).statistic)
    assert np.isnan(spearman([1.0, 1.0], [1.0, 2.0]))
    assert np.isnan(kendall([1.0, 1.0], [1.0, 2.0]))


def test_queue_lengths_hold_the_sum_of_waits() -> None:
    """The integral of the number that waits is the sum of the waits (Little)."""
    rng = np.random.default_rng(1)
    sent = np.sort(rng.uniform(0, 10, 50))
    first = sent + rng.exponential(0.7, 50)
    queue = QueueLengths.of(sent, first, 0.5, float(first.max()))
    assert queue.length.sum() * 0.5 == pytest.approx((first - sent).sum())
    assert queue.error(queue) == 0
    longer = QueueLengths.of(sent, first + 0.1, 0.5, float(first.max()) + 0.1)
    assert longer.error(queue) == pytest.approx(50 * 0.1 / (first - sent).sum(), rel=0.1)
