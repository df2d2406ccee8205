"""Repairing placements: what is estimated of pairs, what an exchange gains, and when a layer is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.baselines.expert.loads import balancedness, moved_experts, rank_loads, replica_counts
from servegym.baselines.expert.repair import exchange, layer_cost, start_from, within_layers
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.registry import create


def typed(seed: int = 0, tokens: int = 4000) -> tuple[Any, Any]:
    """Three layers of 8 experts, 2 of them per token, chosen by one of four kinds; the same pair in all layers.

    Kind ``k`` takes the experts ``k`` and ``k + 4``.
    """
    kind = np.random.default_rng(seed).integers(4, size=tokens)
    ids = np.stack([kind, kind + 4], axis=1)
    pairs = np.zeros((2, 8, 8))
    for i in range(2):
        for j in range(2):
            np.add.at(pairs, (slice(None), ids[:, i], ids[:, j]), 1.0)
    counts = np.tile(np.bincount(ids.ravel(), minlength=8).astype(float), (3, 1))
    return counts, pairs


def test_pairs_within_a_layer_follow_from_pairs_of_neighbours() -> None:
    excess = within_layers(typed()[1])
    assert excess.shape == (3, 8, 8)
    for layer in excess:
        np.testing.assert_array_equal(layer[:4].argmax(axis=1), [4, 5, 6, 7])
        np.testing.assert_allclose(layer, layer.T, atol=1e-7)
        assert not layer.diagonal().any()


def test_independent_experts_have_no_excess() -> None:
    share = np.random.default_rng(1).dirichlet(np.ones(6), size=3)
    pairs = np.einsum("li,lj->lij", share[:-1], share[1:]) * 1e5
    np.testing.assert_allclose(within_layers(pairs), 0.0, atol=1e-6)


def test_exchange_takes_the_cost_down_by_what_it_says() -> None:
    rng = np.random.default_rng(2)
    slots, load = np.arange(16), rng.dirichlet(np.ones(16))
    cost = rng.random((16, 4)) * 0.01
    excess = rng.normal(size=(16, 16)) * 0.01
    excess += excess.T
    np.fill_diagonal(excess, 0.0)
    before = layer_cost(slots, load, cost, excess, 1.0)
    exchange(slots, load, cost, excess, 1.0, 20)
    assert sorted(slots) == list(range(16))
    after = layer_cost(slots, load, cost, excess, 1.0)
    assert after < before - 0.05
    # No pair is left whose exchange pays, by the objective itself.
    for p in range(16):
        for q in range(p + 1, 16):
            other = slots.copy()
            other[p], other[q] = other[q], other[p]
            assert layer_cost(other, load, cost, excess, 1.0) > after - 2e-9


def test_start_from_keeps_what_stands_and_parts_copies() -> None:
    current = np.array([0, 1, 2, 3, 4, 0])
    wanted = np.array([0, 1, 2, 2, 3, 4])
    found = start_from(wanted, current, 3)
    assert sorted(found) == sorted(wanted)
    np.testing.assert_array_equal(found[:5], current[:5])
    assert found[5] == 2
    assert sorted(start_from(np.array([0, 0, 1, 2]), np.array([0, 1, 2, 1]), 2).tolist()) == [0, 0, 1, 2]


def test_experts_of_one_kind_of_token_come_together() -> None:
    counts, pairs = typed()
    wanted = create("expert", "collocate").place(
        ExpertLoad(counts, None, pairs, steps=10), Placement(linear_placement(3, 8, 8), 4)
    )
    assert wanted is not None
    for layer in wanted.physical_to_logical.reshape(3, 4, 2):
        assert {frozenset(rank) for rank in layer.tolist()} == {frozenset((k, k + 4)) for k in range(4)}


def test_without_pairs_it_balances() -> None:
    tokens = np.random.default_rng(3).dirichlet(np.ones(32), size=4) * 1e5
    current = Placement(linear_placement(4, 32, 32), 4)
    wanted = create("expert", "collocate").place(ExpertLoad(tokens, steps=10), current)
    assert wanted is not None
    assert balancedness(rank_loads(tokens, wanted)).min() > 0.95


def test_a_gate_leaves_layers_alone_and_moving_has_a_price() -> None:
    tokens = np.ones((2, 16)) * 1000
    tokens[0, :4] = 4000  # layer 0 is uneven, layer 1 is not
    current = Placement(linear_placement(2, 16, 16), 4)
    load = ExpertLoad(tokens, steps=10)
    wanted = create("expert", "collocate").place(load, current)
    assert wanted is not None
    assert moved_experts(current, wanted)[1].sum() == 0
    assert moved_experts(current, wanted)[0].sum() > 0
    assert create("expert", "collocate,gate=10").place(load, current) is None
    assert create("expert", "collocate,move=1000").place(load, current) is None


def test_a_trend_looks_ahead() -> None:
    rising = np.ones((1, 8)) * 100.0
    current = Placement(linear_placement(1, 8, 8), 2)
    first, second = rising.copy(), rising.copy()
    second[0, 0] = second[0, 1] = 150.0
    ahead, behind = (create("expert", f"collocate,trend={trend},activation=0,gate=0,move=0") for trend in (2, 0.2))
    for policy in (ahead, behind):
        policy.place(ExpertLoad(first, steps=1), current)
    forecasts = []
    for policy in (ahead, behind):
        policy.place(ExpertLoad(second, steps=1), current)
        forecasts.append(policy._forecast(ExpertLoad(second, steps=1), policy.params.model_dump())[0, 0])
    share = 150.0 / second.sum()
    assert forecasts[1] < share < forecasts[0]


def test_redundant_slots_copy_the_heaviest() -> None:
    tokens = np.array([[300.0, 100, 100, 100, 100, 100, 100, 100]])
    wanted = create("expert", "collocate").place(ExpertLoad(tokens, steps=10), Placement(linear_placement(1, 8, 12), 4))
    assert wanted is not None
    counts = replica_counts(wanted.physical_to_logical, 8)[0]
    assert counts[0] == counts.max() > 2
    for rank in wanted.physical_to_logical.reshape(4, 3):
        assert list(rank).count(0) <= 1


class TestPeriodic:
    current = Placement(linear_placement(1, 8, 8), 2)

    @staticmethod
    def load(heavy: int) -> ExpertLoad:
        tokens = np.ones((1, 8))
        tokens[0, heavy] = 9.0
        return ExpertLoad(tokens, steps=5)

    def test_it_asks_after_a_quarter_and_then_once_an_interval(self) -> None:
        policy = create("expert", "periodic,inner=eplb,every=8,windows=1")
        answers = [policy.place(self.load(0), self.current) is not None for _ in range(19)]
        assert [i for i, moved in enumerate(answers) if moved] == [1, 9, 17]
        policy.reset(0)
        assert policy.place(self.load(0), self.current) is None

    def test_it_sums_windows(self) -> None:
        policy = create("expert", "periodic,inner=eplb,every=4,windows=2")
        policy.place(self.load(0), self.current)
        for heavy in (1, 2, 3):
            policy.place(self.load(heavy), self.current)
        got = policy.place(self.load(4), self.current)
        both = ExpertLoad(self.load(3).tokens + self.load(4).tokens)
        wanted = create("expert", "eplb").place(both, self.current)
        assert got is not None
        assert wanted is not None
        np.testing.assert_array_equal(got.physical_to_logical, wanted.physical_to_logical)

    @pytest.mark.parametrize("inner", ["edr", "source_aware"])
    def test_it_hands_on_what_the_inner_rule_needs(self, inner: str) -> None:
        policy = create("expert", f"periodic,inner={inner}")
        assert policy.needs_coactivation == (inner == "edr")
        assert policy.needs_sources == (inner == "source_aware")
