"""Summaries of episodes."""

from __future__ import annotations

import pytest

from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.validation import summarise


def test_ratios_are_geometric_means() -> None:
    episodes = [
        FinishedEpisode(1.0, 10, {"ttft_s": 1.0, "tpot_s": 0.0}, {"ttft_s": 0.5, "tpot_s": 0.1}),
        FinishedEpisode(3.0, 10, {"ttft_s": 2.0, "tpot_s": 0.2}, {"ttft_s": 16.0, "tpot_s": 0.1}),
    ]
    means = summarise(episodes)
    assert means["return"] == 2.0
    assert means["ttft_s"] == 1.5
    assert means["ttft_s_ratio"] == pytest.approx((2.0 / 8.0) ** 0.5)
    # Without a ratio in one of the episodes there is none of all.
    assert "tpot_s_ratio" not in means
    assert means["tpot_s"] == pytest.approx(0.1)
